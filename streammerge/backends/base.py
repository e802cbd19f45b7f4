"""What the engine asks of a device: apply the targets' terms to the tiles of one block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from streammerge.checkpoint.header import StoredTensor
    from streammerge.plan.ops import TensorPlan

__all__ = ["Backend", "SourceReader", "TargetFactors", "Tile"]


class SourceReader(Protocol):
    """Reads a range of a target's source."""

    def __call__(
        self, offset: int, buffer: memoryview, /, source: StoredTensor | None = None
    ) -> None:
        """Fill a buffer with the bytes from `offset` of the tensor, or of another one."""


@dataclass(frozen=True, slots=True)
class Tile:
    """Rows `[begin, end)` of one target, as its plan counts rows."""

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

    def load_factors(
        self,
        target: TensorPlan,
        raw: Mapping[StoredTensor, bytearray],
        read_source: SourceReader | None = None,
    ) -> TargetFactors:
        """Convert a target's factors to the compute dtype, and look at its weight if they need it.

        Args:
            target: The target.
            raw: Bytes of each factor.
            read_source: Reads bytes of the target's source, for terms that look at all of it.
        """

    def apply_block(self, tiles: Iterable[tuple[Tile, TargetFactors]]) -> Iterator[bool]:
        """Merge the tiles of one block in place.

        Args:
            tiles: Those of one buffer, in the order of its bytes, each with its target's factors. A
                backend that merges one at a time asks for a tile when the one before it is merged.

        Yields:
            For each tile, once it is merged, whether all of its results are finite.
        """

    def side(self, factors: TargetFactors, part: int) -> memoryview:
        """Return one of the tensors that describe the codes of a weight.

        Args:
            factors: Of a target with an encoding, all of whose rows were applied.
            part: Its number among the parts of the weight.
        """

    def close(self) -> None:
        """Give back what was taken from the process; the backend is not used any more."""
