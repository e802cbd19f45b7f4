"""The model around its decoder layers: what comes before the first, and what calls them.

transformers' own code runs with recorders in the layers' places, so that masks, positions and
whatever else it gives its layers are what it gives them.
"""

from __future__ import annotations

import inspect
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from streammerge.quantize.skeleton import Skeleton
    from streammerge.quantize.source import MergedSource

__all__ = ["Embedding", "Reached", "Recorders"]


class Reached(Exception):  # noqa: N818 (a jump out of a layer, not an error)
    """The linear that a run was for has its input."""


class _Recorder(torch.nn.Module):
    """Stands in a layer's place: lets the states pass, and keeps what the layer is called with."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        # asked for by some models before they call a layer
        for name in ("attention_type", "layer_type", "is_sliding", "block_type"):
            if hasattr(layer, name):
                setattr(self, name, getattr(layer, name))
        # the first takes the states; some models give others by position too
        self._names = list(inspect.signature(layer.forward).parameters)[1:]
        self.keywords: dict[str, Any] = {}
        self.states: torch.Tensor | None = None
        self.output: torch.Tensor | tuple[torch.Tensor] | None = None

    def forward(self, hidden_states: torch.Tensor, *others: Any, **keywords: Any) -> Any:
        self.states = hidden_states
        self.keywords = {**dict(zip(self._names, others, strict=False)), **keywords}
        return hidden_states if self.output is None else self.output


class Recorders:
    """The model with recorders in place of its layers, and nothing behind them."""

    def __init__(self, skeleton: Skeleton) -> None:
        self._skeleton = skeleton
        self._recorders = torch.nn.ModuleList(_Recorder(layer) for layer in skeleton.layers)

    def __enter__(self) -> Recorders:
        self._put(self._recorders)
        return self

    def __exit__(self, *exc: object) -> None:
        self._put(self._skeleton.layers)

    def _put(self, layers: torch.nn.ModuleList) -> None:
        setattr(self._skeleton.decoder, self._skeleton.layers_name.rpartition(".")[2], layers)

    def run(self, ids: torch.Tensor) -> None:
        """Run one sample, (1, tokens)."""
        last = self._recorders[-1]

        def stop(*_: object) -> None:
            raise Reached

        hook = last.register_forward_hook(stop)
        try:
            with suppress(Reached):
                self._skeleton.decoder(input_ids=ids, use_cache=False)
        finally:
            hook.remove()

    def finish(self, ids: torch.Tensor, output: torch.Tensor | tuple[torch.Tensor]) -> torch.Tensor:
        """Run the whole model as if its last layer had returned `output`; return the logits."""
        last: Any = self._recorders[-1]
        last.output = output
        try:
            logits: torch.Tensor = self._skeleton.model(input_ids=ids, use_cache=False).logits
        finally:
            last.output = None
        return logits

    def first_input(self) -> torch.Tensor:
        """Return the states before the first layer."""
        first: Any = self._recorders[0]
        states: torch.Tensor = first.states
        return states

    @property
    def keywords(self) -> list[dict[str, Any]]:
        """What each layer is called with."""
        found: list[Any] = list(self._recorders)
        return [dict(recorder.keywords) for recorder in found]


class _Rows(torch.nn.Module):
    """Stands in the place of an embedding that has only the rows of some ids."""

    def __init__(self, ids: torch.Tensor, embedding: torch.nn.Module) -> None:
        super().__init__()
        self._ids, self._embedding = ids, embedding

    def forward(self, ids: torch.Tensor) -> Any:
        return self._embedding(torch.searchsorted(self._ids, ids))


class Embedding:
    """Loads what the model needs before its layers; of the vocabulary, only the rows in use."""

    def __init__(
        self, skeleton: Skeleton, source: MergedSource, samples: torch.Tensor, dtype: torch.dtype
    ) -> None:
        self._skeleton, self._source, self._samples = skeleton, source, samples
        self._dtype = dtype
        self._own: list[tuple[torch.nn.Module, str, Any]] = []

    def __enter__(self) -> Embedding:
        skeleton = self._skeleton
        before = skeleton.layers_name.rpartition(".")[0]
        vocabulary = skeleton.model.get_input_embeddings()
        for path, module in list(skeleton.decoder.named_modules()):
            full = f"{before}.{path}" if before and path else before or path
            if full.startswith(skeleton.layers_name) or not path:
                continue
            if module is vocabulary:
                self._replace_vocabulary(path, module, full)
                continue
            for name, parameter in list(module.named_parameters(recurse=False)):
                stored = skeleton.checkpoint_name(f"{full}.{name}")
                if parameter.device.type == "meta" and stored in self._source:
                    self._replace_parameter(module, name, self._source.load(stored, self._dtype))
        return self

    def __exit__(self, *exc: object) -> None:
        for module, name, value in reversed(self._own):
            if isinstance(value, torch.nn.Parameter):
                module._parameters[name] = value  # noqa: SLF001 (as it was)
            else:
                setattr(module, name, value)

    def _replace_vocabulary(self, path: str, module: torch.nn.Module, full: str) -> None:
        ids = torch.unique(self._samples)
        stored = self._skeleton.checkpoint_name(f"{full}.weight")
        rows = self._source.rows(stored, ids).to(self._dtype)
        # the module itself looks them up: some families scale what they find
        self._replace_parameter(module, "weight", rows)
        # matters to gradients alone, and has to be one of the rows
        self._replace(module, "padding_idx", None)
        parent, _, name = path.rpartition(".")
        self._replace(self._skeleton.decoder.get_submodule(parent), name, _Rows(ids, module))

    def _replace_parameter(self, module: torch.nn.Module, name: str, value: torch.Tensor) -> None:
        self._own.append((module, name, module._parameters[name]))  # noqa: SLF001
        module._parameters[name] = torch.nn.Parameter(value, requires_grad=False)  # noqa: SLF001

    def _replace(self, module: torch.nn.Module, name: str, value: Any) -> None:
        self._own.append((module, name, getattr(module, name)))
        setattr(module, name, value)
