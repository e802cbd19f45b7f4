"""Perplexity of a model on a text, one decoder layer at a time.

Every window of tokens goes through one layer after the other, as in a quantization. Then the
model's own code runs from the last layer's output to the logits, with a piece of the head in the
head's place: whatever it does to logits (scaling, soft-capping) it does to each by itself, so that
pieces of the vocabulary can take turns. The loss of a token is
`log(sum_v exp(logit_v)) - logit_token`, the sum kept up piece by piece.

In memory: one layer, one window's states, one piece of the head and its logits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from streammerge.errors import UnsupportedError
from streammerge.quantize.around import Embedding, Recorders
from streammerge.quantize.hidden import HiddenStates
from streammerge.quantize.runner import LayerRunner

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from streammerge.quantize.skeleton import Skeleton
    from streammerge.quantize.source import MergedSource

__all__ = ["LOGITS_BYTES", "ROWS_BYTES", "Evaluator", "TextLoss"]

# of the logits of one piece of the vocabulary
LOGITS_BYTES = 16 << 20
# of the embedding's rows that are in memory at a time
ROWS_BYTES = 128 << 20
# what a model's own code raises where it cannot run with a piece of its head
_FAULTS = (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError)


@dataclass(frozen=True, slots=True)
class TextLoss:
    """How well a model foresees a text."""

    tokens: int
    """Tokens that were to be foreseen: all but the first of each window."""
    loss: float
    """Mean of the negative log-likelihoods, in nats."""

    @property
    def perplexity(self) -> float:
        """Return exp of the loss."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


@dataclass(slots=True)
class Evaluator:
    """One run over the layers of a model."""

    skeleton: Skeleton
    source: MergedSource
    windows: torch.Tensor
    """(windows, tokens) int64: token ids; each window is on its own."""
    folder: Path
    """For the hidden states, which take twice windows x tokens x hidden."""
    on_layer: Callable[[int], None] = lambda _: None
    """Told the number of each layer that is done."""
    dtype: torch.dtype = torch.float32
    """What layers compute in."""
    logits_bytes: int = LOGITS_BYTES
    _keywords: list[dict[str, Any]] = field(default_factory=list)
    _returns_tuple: bool = False

    @torch.no_grad()
    def run(self) -> TextLoss:
        """Return the loss over all windows.

        Raises:
            StreamMergeError: The model cannot be run layer by layer.
        """
        head = _find_head(self.skeleton, self.source)
        shape = (*self.windows.shape, self.skeleton.hidden_size)
        states = HiddenStates(self.folder, shape=shape, dtype=self.dtype)
        try:
            self._enter(states)
            for number in range(len(self.skeleton.layers)):
                self._layer(number, states)
                self.on_layer(number)
            losses = self._losses(head, states)
        finally:
            states.remove()
        return TextLoss(losses.numel(), float(losses.mean()))

    def _enter(self, states: HiddenStates) -> None:
        """Find what each layer is called with, and the states before the first."""
        recorders = Recorders(self.skeleton)
        for begin, end in self._spans():
            part = self.windows[begin:end]
            with recorders, Embedding(self.skeleton, self.source, part, self.dtype):
                for number in range(begin, end):
                    recorders.run(self.windows[number : number + 1])
                    states.write(0, number, recorders.first_input())
        # windows are equally long, and what layers are called with depends on no more
        self._keywords = recorders.keywords

    def _spans(self) -> Iterator[tuple[int, int]]:
        """Yield runs of windows whose rows of the embedding may be in memory together."""
        most = ROWS_BYTES // (self.dtype.itemsize * self.skeleton.hidden_size)
        begin, ids = 0, self.windows[:0]
        for number, window in enumerate(self.windows):
            together = torch.unique(torch.cat([ids.flatten(), window]))
            if len(together) > most and number > begin:
                yield begin, number
                begin, together = number, torch.unique(window)
            ids = together
        yield begin, len(self.windows)

    def _layer(self, number: int, states: HiddenStates) -> None:
        layer = self.skeleton.load_layer(number, self.source, dtype=self.dtype)
        blocks = self.skeleton.blocks[number]
        runner = LayerRunner(layer, self._keywords[number], states, number, blocks)
        for block in blocks:
            block.run(runner, self.source, self.folder)
        runner.advance(states)
        for block in blocks:
            block.close()
        self._returns_tuple = runner.returns_tuple
        self.skeleton.release(number)

    # behind the last layer

    def _losses(self, head: _Head, states: HiddenStates) -> torch.Tensor:
        """Return the loss of each token but the first, (windows, tokens - 1) float64."""
        targets = self.windows[:, 1:]
        sums = torch.full(targets.shape, -math.inf, dtype=torch.float64)
        reached = torch.full(targets.shape, math.nan, dtype=torch.float64)
        # the logits no longer depend on the ids: one row of the embedding will do
        ids = self.windows[:1, :1].repeat(1, self.windows.shape[1])
        recorders = Recorders(self.skeleton)
        with recorders, Embedding(self.skeleton, self.source, ids, self.dtype), head:
            for begin, piece in self._pieces(head):
                if begin == 0:
                    self._check(recorders, head, ids, piece, states)
                head.use(begin, piece)
                for window in range(states.samples):
                    logits = self._finish(recorders, ids, states, window)[:-1].to(torch.float64)
                    sums[window] = torch.logaddexp(sums[window], logits.logsumexp(-1))
                    places = targets[window] - begin
                    here = ((places >= 0) & (places < len(piece))).nonzero()[:, 0]
                    reached[window, here] = logits[here, places[here]]
        return sums - reached

    def _pieces(self, head: _Head) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield the first row and the values of one piece of the head after the other."""
        step = max(2, self.logits_bytes // (8 * self.windows.shape[1]))
        for begin, rows in self.source.pieces(head.stored):
            for start in range(0, len(rows), step):
                yield begin + start, rows[start : start + step].to(self.dtype)

    def _finish(
        self, recorders: Recorders, ids: torch.Tensor, states: HiddenStates, window: int
    ) -> torch.Tensor:
        """Return the logits of one window, (tokens, rows of the piece)."""
        last = states.read(len(self.skeleton.layers), window)
        return recorders.finish(ids, (last,) if self._returns_tuple else last)[0]

    def _check(
        self,
        recorders: Recorders,
        head: _Head,
        ids: torch.Tensor,
        piece: torch.Tensor,
        states: HiddenStates,
    ) -> None:
        """Make sure that pieces of the vocabulary give the logits that the whole gives.

        Raises:
            UnsupportedError: They do not, or the model does not run with them.
        """
        middle = len(piece) // 2
        try:
            found = []
            for begin, end in ((0, len(piece)), (0, middle), (middle, len(piece))):
                head.use(begin, piece[begin:end])
                found.append(self._finish(recorders, ids, states, 0))
        except _FAULTS as error:
            fault = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
            raise _refusal(
                self.skeleton, f"the model does not run with a part of it ({fault})"
            ) from error
        whole, halves = found[0], torch.cat(found[1:], dim=-1)
        if whole.shape != halves.shape or not torch.allclose(
            whole, halves, rtol=1e-3, atol=1e-3, equal_nan=True
        ):
            raise _refusal(self.skeleton, "its logits depend on each other")


class _Head:
    """The model's head, of which one piece of the vocabulary is there at a time."""

    def __init__(
        self, skeleton: Skeleton, path: str, stored: str, bias: torch.Tensor | None
    ) -> None:
        self.stored = stored
        """Name of the tensor in the checkpoint."""
        parent, _, self._name = path.rpartition(".")
        self._owner = skeleton.model.get_submodule(parent) if parent else skeleton.model
        self._own = skeleton.model.get_submodule(path)
        self._bias = bias
        self._piece = torch.nn.Linear(1, 1, bias=bias is not None, device="meta")

    def __enter__(self) -> _Head:
        setattr(self._owner, self._name, self._piece)
        return self

    def __exit__(self, *exc: object) -> None:
        setattr(self._owner, self._name, self._own)

    def use(self, begin: int, rows: torch.Tensor) -> None:
        """Be the part of the head that starts at a row."""
        self._piece.weight = torch.nn.Parameter(rows, requires_grad=False)
        if self._bias is not None:
            bias = self._bias[begin : begin + len(rows)]
            self._piece.bias = torch.nn.Parameter(bias, requires_grad=False)


def _find_head(skeleton: Skeleton, source: MergedSource) -> _Head:
    """Find the head and its tensor, which may be the embedding's.

    Raises:
        UnsupportedError: The model has no plain linear as its head, or the checkpoint lacks it.
    """
    model = skeleton.model
    module = model.get_output_embeddings()
    if type(module) is not torch.nn.Linear:
        raise _refusal(skeleton, f"its head is {type(module).__name__}, not a plain linear")
    path = next(name for name, found in model.named_modules() if found is module)
    stored = skeleton.checkpoint_name(f"{path}.weight")
    if stored not in source and model.config.get_text_config().tie_word_embeddings:
        embedding = model.get_input_embeddings()
        inputs = next(name for name, found in model.named_modules() if found is embedding)
        stored = skeleton.checkpoint_name(f"{inputs}.weight")
    if stored not in source:
        raise _refusal(skeleton, f"the checkpoint has no '{stored}'")
    if source.plan(stored).shape != tuple(module.weight.shape):
        raise _refusal(
            skeleton,
            f"'{stored}' is {source.plan(stored).shape}, the model's {tuple(module.weight.shape)}",
        )
    bias = None
    if module.bias is not None:
        name = skeleton.checkpoint_name(f"{path}.bias")
        if name not in source:
            raise _refusal(skeleton, f"the checkpoint has no '{name}'")
        bias = source.load(name, torch.float32)
    return _Head(skeleton, path, stored, bias)


def _refusal(skeleton: Skeleton, reason: str) -> UnsupportedError:
    return UnsupportedError(
        f"head of {type(skeleton.model).__name__} cannot be applied piece by piece: {reason}",
        hint="this architecture is not evaluated by this version",
    )
