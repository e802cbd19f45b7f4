"""Cut a shard into blocks that fit one buffer, and targets into tiles of rows, in file order."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from streammerge.plan.ops import CopyBytes

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from streammerge.plan.layout import PlacedTensor, ShardPlan
    from streammerge.plan.ops import TensorPlan

__all__ = [
    "MIN_TILE_ROWS",
    "Block",
    "MergeTile",
    "Segment",
    "cut_shard",
    "factor_bytes",
    "split_rows",
]

# below four rows MKL takes another kernel, which rounds otherwise than the whole product does
MIN_TILE_ROWS = 4
# a target that does not fit what is left of a block begins there only if this part of it is left:
# narrow tiles cost a product each
_WORTHWHILE = 4


@dataclass(frozen=True, slots=True)
class Segment:
    """A range of a source file, and its place in a block's buffer."""

    path: Path
    offset: int
    at: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class MergeTile:
    """Rows `[begin, end)` of one target, in a block's buffer."""

    target: TensorPlan
    begin: int
    end: int
    source_at: int
    """Where the source rows are when the block has been read."""
    output_at: int
    """Where the merged rows go: nothing that is still to be read is there."""

    @property
    def is_first(self) -> bool:
        """Whether the target begins here."""
        return self.begin == 0


@dataclass(frozen=True, slots=True)
class Block:
    """Neighbours in an output shard, which travel together: bytes that pass through, and tiles."""

    offset: int
    """Place in the output shard."""
    nbytes: int
    """Bytes of the output."""
    segments: tuple[Segment, ...]
    """What is read, in ascending order of its place in the buffer."""
    tiles: tuple[MergeTile, ...]


def split_rows(begin: int, end: int, step: int) -> list[tuple[int, int]]:
    """Divide rows into ranges of `step`; a tail too short for exact bits joins the last one."""
    if begin == end:
        return []
    edges = list(range(begin, end, step))
    if len(edges) > 1 and end - edges[-1] < MIN_TILE_ROWS:
        edges.pop()
    return list(zip(edges, [*edges[1:], end], strict=True))


def factor_bytes(tensor: TensorPlan) -> int:
    """Return the bytes of a target's factors, as stored and in the widest compute dtype."""
    return sum(f.nbytes + prod(f.shape) * 8 for term in tensor.terms for f in term.factors)


def cut_shard(shard: ShardPlan, *, slab_bytes: int, max_factor_bytes: int) -> Iterator[Block]:
    """Yield the blocks of a shard, at least one.

    Args:
        shard: What to cut.
        slab_bytes: Most bytes of a block, as source and as output.
        max_factor_bytes: Most bytes of the factors of the targets that begin in one block; a single
            target may have more.
    """
    blocks = 0
    cutter = _Cutter(slab_bytes, max_factor_bytes, start=len(shard.head))
    for placed in shard.tensors:
        if not placed.tensor.nbytes:
            continue
        parts = (
            cutter.copy(placed)
            if isinstance(placed.tensor.op, CopyBytes)
            else cutter.merge(placed.tensor)
        )
        for block in parts:
            blocks += 1
            yield block
    if cutter.output_bytes or not blocks:
        yield cutter.close()


@dataclass(slots=True)
class _Part:
    """A part of a block: rows of a target, or bytes that pass through."""

    path: Path
    offset: int
    source_bytes: int
    output_bytes: int
    tile: tuple[TensorPlan, int, int] | None


class _Cutter:
    """Fill one block after the other."""

    def __init__(self, slab_bytes: int, max_factor_bytes: int, *, start: int) -> None:
        self._slab_bytes = slab_bytes
        self._max_factor_bytes = max_factor_bytes
        self._start = start
        self._begin()

    def _begin(self) -> None:
        self._parts: list[_Part] = []
        self._has_copies = False
        self.output_bytes = self._source_bytes = self._lead = self._factor_bytes = 0

    def copy(self, placed: PlacedTensor) -> Iterator[Block]:
        """Add bytes that pass through; they may be cut anywhere."""
        stored, done = placed.tensor.source, 0
        if self._lead or self._source_bytes != self.output_bytes:
            # nothing moves these bytes: they are read to where they are written from
            yield self.close()
        while done < stored.nbytes:
            room = self._slab_bytes - max(self.output_bytes, self._lead + self._source_bytes)
            if room <= 0:
                yield self.close()
                continue
            count = min(room, stored.nbytes - done)
            self._add(_Part(stored.path, stored.offset + done, count, count, None))
            self._has_copies = True
            done += count

    def merge(self, target: TensorPlan) -> Iterator[Block]:
        """Add a target, whole rows at a time."""
        rows = target.shape[0] if target.shape else 1
        columns = prod(target.shape[1:])
        source_row = target.source.dtype.nbytes(columns)
        output_row = target.dtype.nbytes(columns)
        factors = factor_bytes(target)
        if source_row != output_row and self._has_copies:
            yield self.close()
        if self._factor_bytes and self._factor_bytes + factors > self._max_factor_bytes:
            yield self.close()
        self._factor_bytes += factors
        begin = 0
        while begin < rows:
            fitting = self._fitting(source_row, output_row)
            end = min(rows, begin + fitting)
            if 0 < rows - end < MIN_TILE_ROWS:
                # room for a tail that is too short alone
                end -= MIN_TILE_ROWS
            is_worthwhile = not self._parts or end - begin >= (
                self._slab_bytes // max(source_row, output_row) // _WORTHWHILE
            )
            if end < rows and (end - begin < MIN_TILE_ROWS or not is_worthwhile):
                if not self._parts:
                    msg = f"{MIN_TILE_ROWS} rows of {target.name} do not fit a block"
                    raise ValueError(msg)
                yield self.close()
                # the target's factors belong to the block in which it begins
                self._factor_bytes = 0 if begin else factors
                continue
            count = end - begin
            stored = target.source
            self._add(
                _Part(
                    stored.path,
                    stored.offset + begin * source_row,
                    count * source_row,
                    count * output_row,
                    (target, begin, end),
                )
            )
            begin = end

    def close(self) -> Block:
        """Return the block, and begin the next."""
        segments: list[Segment] = []
        tiles = []
        source_at, output_at = self._lead, 0
        for part in self._parts:
            _append(segments, Segment(part.path, part.offset, source_at, part.source_bytes))
            if part.tile is not None:
                tiles.append(MergeTile(*part.tile, source_at, output_at))
            source_at += part.source_bytes
            output_at += part.output_bytes
        block = Block(self._start, self.output_bytes, tuple(segments), tuple(tiles))
        self._start += self.output_bytes
        self._begin()
        return block

    def _fitting(self, source_row: int, output_row: int) -> int:
        """Return how many rows more fit, as source and as output."""
        left = self._slab_bytes - max(self.output_bytes, self._lead + self._source_bytes)
        # where the output is wider, the lead grows with every row
        return left // max(source_row, output_row)

    def _add(self, part: _Part) -> None:
        self._parts.append(part)
        self._source_bytes += part.source_bytes
        self.output_bytes += part.output_bytes
        # sources lie so far back that no output reaches one that is not merged yet
        self._lead = max(self._lead, self.output_bytes - self._source_bytes)


def _append(segments: list[Segment], segment: Segment) -> None:
    """Add a range; one that continues the last range lengthens it, so that it is one read."""
    if segments:
        last = segments[-1]
        if last.path == segment.path and last.offset + last.nbytes == segment.offset:
            segments[-1] = Segment(last.path, last.offset, last.at, last.nbytes + segment.nbytes)
            return
    segments.append(segment)
