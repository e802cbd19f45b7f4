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
    """Holds the source rows on entry, the output rows on return."""
    output_offset: int
    """Where the output rows go in `buffer`."""
    source_offset: int
    """Where the source rows begin: so that no output row is over a source row still to be read."""


class TargetFactors(Protocol):
    """The adapter tensors of one target, in the backend's own form."""


class Backend(Protocol):
    """Arithmetic on one device; several threads may call it at the same time."""

    name: str

    def load_factors(self, target: TensorPlan, raw: list[bytearray]) -> TargetFactors:
        """Convert a target's factors to the compute dtype.

        Args:
            target: The target.
            raw: Bytes of each factor, in the order of the target's terms.
        """

    def apply(self, tile: Tile, factors: TargetFactors) -> bool:
        """Merge one tile in place; return whether all of its results are finite."""

    def close(self) -> None:
        """Give back what was taken from the process; the backend is not used any more."""
