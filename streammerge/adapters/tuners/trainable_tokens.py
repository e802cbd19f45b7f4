"""Trained rows of an embedding: `W[token] = row`, whatever the row was before.

Despite the name of the key (`trainable_tokens_delta`) the values are whole rows
(peft.tuners.trainable_tokens). They come by themselves or in a LoRA adapter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from streammerge.adapters.terms import TunerTerm
from streammerge.adapters.tuners.base import Tuner
from streammerge.errors import AdapterError

if TYPE_CHECKING:
    import torch

    from streammerge.adapters.options import Options
    from streammerge.adapters.terms import Weight
    from streammerge.checkpoint.header import StoredTensor

__all__ = ["TUNERS", "RowsTerm", "TrainableTokens"]


@dataclass(frozen=True, slots=True)
class RowsTerm(TunerTerm):
    """Put rows in the place of others."""

    tensor: StoredTensor
    """(number of tokens, dim)"""
    indices: tuple[int, ...]
    """The row that each of them replaces."""

    @property
    def factors(self) -> tuple[StoredTensor, ...]:
        """The rows."""
        return (self.tensor,)

    def work_bytes(self, shape: tuple[int, ...]) -> int:
        """Return what the order of the rows takes while it is made."""
        del shape
        return 5 * 8 * len(self.indices)

    def prepare(self, factors: list[torch.Tensor], weight: Weight) -> Any:
        """Sort the rows by where they go.

        Returns:
            Where each goes, in ascending order; its number among the values; and the values.
        """
        del weight
        import torch  # noqa: PLC0415 (planning needs no torch)

        places, order = torch.tensor(self.indices, dtype=torch.int64).sort()
        return places, order, factors[0]

    def apply(self, rows: torch.Tensor, begin: int, state: Any) -> torch.Tensor:
        """Copy those that are in this tile."""
        import torch  # noqa: PLC0415 (planning needs no torch)

        places, order, values = state
        edges = torch.tensor([begin, begin + len(rows)])
        first, last = torch.searchsorted(places, edges).tolist()
        if first < last:
            here = values[order[first:last]]
            rows.index_copy_(0, places[first:last] - begin, here.to(rows.dtype))
        return rows


class TrainableTokens(Tuner):
    """`peft_type: TRAINABLE_TOKENS`."""

    peft_type = "TRAINABLE_TOKENS"
    title = "Trainable tokens"
    formula = "rows of W are replaced"
    factors = frozenset[str]()
    options = frozenset({"token_indices"})

    def read(self, options: Options) -> None:
        """Check that tokens are named.

        Raises:
            AdapterError: None is.
        """
        if not options.get("token_indices"):
            raise AdapterError("adapter names no tokens", where=options.path)


TUNERS: tuple[Tuner, ...] = (TrainableTokens(),)
