"""What the engine asks of a device: apply one target's terms to one tile of its rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from streammerge.plan.ops import TensorPlan

__all__ = ["Backend", "TargetFactors", "Tile"]


@dataclass(frozen=True, slots=True)
class Tile:
    """Rows `[begin, end)` of one target; a 0-d or 1-d tensor counts as a single column."""

    target: TensorPlan
    begin: int
    end: int
    buffer: memoryview
    """Holds the source rows on entry (see `source_offset`), the output rows on return, from byte
    0.
    """
    source_offset: int
    """Where the source rows begin in `buffer`: at its end if the output's items are wider."""


class TargetFactors(Protocol):
    """The adapter tensors of one target, in the backend's own form."""


class Backend(Protocol):
    """Arithmetic on one device."""

    name: str

    def load_factors(self, target: TensorPlan, raw: list[bytearray]) -> TargetFactors:
        """Convert a target's factors to the compute dtype.

        Args:
            target: The target.
            raw: Bytes of each factor, in the order of the target's terms.
        """

    def apply(self, tile: Tile, factors: TargetFactors) -> bool:
        """Merge one tile in place; return whether all of its results are finite."""
