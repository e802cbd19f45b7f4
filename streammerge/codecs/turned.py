"""Weights of layers that are kept as (inputs, outputs), as GPT-2's are: codes have them turned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from streammerge.codecs.base import CodedWeight, Extent

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

__all__ = ["TurnedWeight"]

# of the coded matrix, decoded at a time
TILE_VALUES = 1 << 18


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnedWeight(CodedWeight):
    """The transpose of a coded (N, K): every tile of it takes all of the codes."""

    coded: CodedWeight

    @classmethod
    def of(cls, coded: CodedWeight) -> TurnedWeight:
        """Turn a weight."""
        shape = coded.shape[::-1]
        return cls(name=coded.name, shape=shape, dtype=coded.dtype, parts=coded.parts, coded=coded)

    @property
    def row_step(self) -> int:
        """Any row may be the first of a tile."""
        return 1

    def extents(self, begin: int, end: int) -> tuple[Extent, ...]:
        """Return all parts."""
        self.check_tile(begin, end)
        return tuple(self.whole(part.role) for part in self.parts)

    def values(self, begin: int, end: int, data: Mapping[str, memoryview]) -> torch.Tensor:
        """Return (end - begin, N) float32."""
        import torch  # noqa: PLC0415 (planning needs no torch)

        coded = self.coded
        found = torch.empty(end - begin, coded.rows)
        step = max(1, TILE_VALUES // coded.columns // coded.row_step) * coded.row_step
        for first in range(0, coded.rows, step):
            last = min(first + step, coded.rows)
            parts = {e.role: e.take(data[e.role]) for e in coded.extents(first, last)}
            found[:, first:last] = coded.values(first, last, parts)[:, begin:end].T
        return found
