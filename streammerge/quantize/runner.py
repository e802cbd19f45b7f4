"""One decoder layer, and the samples that go through it."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch

from streammerge.quantize.around import Reached

if TYPE_CHECKING:
    from collections.abc import Iterator

    from streammerge.quantize.hidden import HiddenStates

__all__ = ["LayerRunner"]


class LayerRunner:
    """Runs samples through one layer, or up to a linear of it."""

    def __init__(
        self, layer: torch.nn.Module, keywords: dict[str, Any], states: HiddenStates, number: int
    ) -> None:
        self.layer = layer
        self._keywords = keywords
        self._states = states
        self._number = number
        self.returns_tuple = False
        """Whether the layer last returned its output in a tuple."""

    def weight(self, path: str) -> torch.Tensor:
        """Return the weight of a linear, (N, K)."""
        weight = self.layer.get_submodule(path).weight
        assert isinstance(weight, torch.Tensor)
        return weight.data

    def states(self, sample: int) -> torch.Tensor:
        """Return the layer's input for a sample, (1, tokens, hidden)."""
        return self._states.read(self._number, sample)

    def run(self, sample: int) -> torch.Tensor:
        """Return the layer's output for a sample, (1, tokens, hidden)."""
        output = self.layer(self.states(sample), **self._keywords)
        self.returns_tuple = isinstance(output, tuple)
        states: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return states

    def advance(self) -> None:
        """Run every sample, and store what comes out as the states before the next layer."""
        for sample in range(self._states.samples):
            self._states.write(self._number + 1, sample, self.run(sample))

    def inputs(self, path: str) -> Iterator[torch.Tensor]:
        """Yield the input of a linear for each sample."""
        for sample in range(self._states.samples):
            yield self._input(path, sample)

    def groups(self, names: dict[str, str]) -> list[list[str]]:
        """Return the linears that share an input, group by group in the order of the layer's work.

        Linears that no sample reaches are not among them.
        """
        seen: list[tuple[int, tuple[int, ...], str]] = []
        hooks = []
        for path in names:

            def note(_: object, arguments: tuple[torch.Tensor, ...], path: str = path) -> None:
                # kept alive, so that no other tensor gets its address
                kept.append(arguments[0])
                seen.append((arguments[0].data_ptr(), tuple(arguments[0].shape), path))

            hooks.append(self.layer.get_submodule(path).register_forward_pre_hook(note))
        kept: list[torch.Tensor] = []
        try:
            self.run(0)
        finally:
            for hook in hooks:
                hook.remove()
        groups: list[list[str]] = []
        last: tuple[int, tuple[int, ...]] | None = None
        for pointer, shape, path in seen:
            if (pointer, shape) != last:
                groups.append([])
                last = (pointer, shape)
            groups[-1].append(path)
        return groups

    def _input(self, path: str, sample: int) -> torch.Tensor:
        found: list[torch.Tensor] = []

        def take(_: object, arguments: tuple[torch.Tensor, ...]) -> None:
            found.append(arguments[0])
            raise Reached

        hook = self.layer.get_submodule(path).register_forward_pre_hook(take)
        try:
            with suppress(Reached):
                self.run(sample)
        finally:
            hook.remove()
        return found[0]
