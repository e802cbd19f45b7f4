"""One decoder layer, and the samples that go through it."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any, Protocol

from streammerge.quantize.around import Reached
from streammerge.quantize.modules import weight_matrix

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch

    from streammerge.quantize.experts import ExpertBlock
    from streammerge.quantize.hidden import HiddenStates

__all__ = ["LayerRunner", "Samples"]


class Samples(Protocol):
    """What goes into a layer."""

    @property
    def samples(self) -> int:
        """How many there are."""

    def read(self, layer: int, sample: int, /) -> torch.Tensor:
        """Return the input of a layer for a sample, (..., tokens, hidden)."""


class LayerRunner:
    """Runs samples through one layer, or up to a linear of it."""

    def __init__(
        self,
        layer: torch.nn.Module,
        keywords: dict[str, Any],
        states: Samples,
        number: int,
        blocks: Sequence[ExpertBlock] = (),
    ) -> None:
        self.layer = layer
        self._keywords = keywords
        self._states = states
        self._number = number
        self._blocks = blocks
        self.returns_tuple = False
        """Whether the layer last returned its output in a tuple."""

    @property
    def samples(self) -> int:
        """How many samples there are."""
        return self._states.samples

    @property
    def dtype(self) -> torch.dtype:
        """What the layer computes in."""
        return self.states(0).dtype

    def weight(self, path: str) -> torch.Tensor:
        """Return the weight of a linear, (N, K)."""
        return weight_matrix(self.layer.get_submodule(path))

    def states(self, sample: int) -> torch.Tensor:
        """Return the layer's input for a sample, (..., tokens, hidden)."""
        return self._states.read(self._number, sample)

    def run(self, sample: int) -> torch.Tensor:
        """Return the layer's output for a sample, (..., tokens, hidden)."""
        for block in self._blocks:
            block.sample = sample
        output = self.layer(self.states(sample), **self._keywords)
        self.returns_tuple = isinstance(output, tuple)
        states: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return states

    def reach(self, sample: int) -> None:
        """Run the layer up to what jumps out of it."""
        with suppress(Reached):
            self.run(sample)

    def advance(self, states: HiddenStates) -> None:
        """Run every sample, and store what comes out as the states before the next layer."""
        for sample in range(self.samples):
            states.write(self._number + 1, sample, self.run(sample))

    def inputs(self, path: str) -> Iterator[torch.Tensor]:
        """Yield the input of a linear for each sample."""
        for sample in range(self.samples):
            yield self._input(path, sample)

    def steps(self, names: dict[str, str]) -> list[list[str] | ExpertBlock]:
        """Return linears that share an input, and experts, in the order of the layer's work.

        Args:
            names: Has the paths of the linears.

        Returns:
            Linears that the first sample does not reach are not among them.
        """
        # inputs are kept alive, so that no other tensor gets the address of one
        seen: list[tuple[torch.Tensor | None, str | ExpertBlock]] = []
        hooks = [
            self.layer.get_submodule(path).register_forward_pre_hook(
                lambda _, arguments, path=path: seen.append((arguments[0], path))
            )
            for path in names
        ]
        hooks += [
            block.module.register_forward_pre_hook(
                lambda *_, block=block: seen.append((None, block))
            )
            for block in self._blocks
        ]
        try:
            self.run(0)
        finally:
            for hook in hooks:
                hook.remove()
        steps: list[list[str] | ExpertBlock] = []
        last: torch.Tensor | None = None
        for inputs, step in seen:
            if not isinstance(step, str):
                steps.append(step)
            elif last is not None and _is_same(inputs, last):
                assert isinstance(steps[-1], list)
                steps[-1].append(step)
            else:
                steps.append([step])
            last = inputs
        return steps

    def _input(self, path: str, sample: int) -> torch.Tensor:
        found: list[torch.Tensor] = []

        def take(_: object, arguments: tuple[torch.Tensor, ...]) -> None:
            found.append(arguments[0])
            raise Reached

        hook = self.layer.get_submodule(path).register_forward_pre_hook(take)
        try:
            self.reach(sample)
        finally:
            hook.remove()
        return found[0]


def _is_same(one: torch.Tensor | None, other: torch.Tensor) -> bool:
    return one is not None and one.data_ptr() == other.data_ptr() and one.shape == other.shape
