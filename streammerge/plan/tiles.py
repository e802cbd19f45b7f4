"""Cut a shard into tiles: pieces of the output that fit one buffer, in the order of the file."""

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
    "CopyTile",
    "MergeTile",
    "Segment",
    "ShardTile",
    "cut_shard",
    "split_rows",
]

# below four rows MKL takes another kernel, which rounds otherwise than the whole product does
MIN_TILE_ROWS = 4


@dataclass(frozen=True, slots=True)
class Segment:
    """A range of a source file."""

    path: Path
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class CopyTile:
    """Bytes that pass through: neighbours in the output, from one or more ranges of the inputs."""

    offset: int
    """Place in the output shard."""
    nbytes: int
    segments: tuple[Segment, ...]


@dataclass(frozen=True, slots=True)
class MergeTile:
    """Rows `[begin, end)` of one target."""

    target: TensorPlan
    begin: int
    end: int
    offset: int
    """Place of the first row in the output shard."""
    is_first: bool
    is_last: bool

    @property
    def columns(self) -> int:
        """Elements of a row."""
        return prod(self.target.shape[1:])

    @property
    def source(self) -> Segment:
        """The rows in the input."""
        stored = self.target.source
        row_bytes = stored.dtype.nbytes(self.columns)
        start = stored.offset + self.begin * row_bytes
        return Segment(stored.path, start, (self.end - self.begin) * row_bytes)

    @property
    def nbytes(self) -> int:
        """Bytes of the rows in the output."""
        return self.target.dtype.nbytes(self.columns) * (self.end - self.begin)


ShardTile = CopyTile | MergeTile


def split_rows(begin: int, end: int, step: int) -> list[tuple[int, int]]:
    """Divide rows into ranges of `step`; a tail too short for exact bits joins the last one."""
    if begin == end:
        return []
    edges = list(range(begin, end, step))
    if len(edges) > 1 and end - edges[-1] < MIN_TILE_ROWS:
        edges.pop()
    return list(zip(edges, [*edges[1:], end], strict=True))


def cut_shard(shard: ShardPlan, *, slab_bytes: int) -> Iterator[ShardTile]:
    """Yield the tiles of a shard, each of at most `slab_bytes`, as source and as output."""
    run: list[Segment] = []
    start = filled = 0
    for placed in shard.tensors:
        if not placed.tensor.nbytes:
            continue
        if not isinstance(placed.tensor.op, CopyBytes):
            if run:
                yield CopyTile(start, filled, tuple(run))
                run, filled = [], 0
            yield from _cut_target(placed, slab_bytes)
            continue
        stored, done = placed.tensor.source, 0
        while done < stored.nbytes:
            if not run:
                start, filled = placed.offset + done, 0
            part = min(stored.nbytes - done, slab_bytes - filled)
            _append(run, Segment(stored.path, stored.offset + done, part))
            done += part
            filled += part
            if filled == slab_bytes:
                yield CopyTile(start, filled, tuple(run))
                run, filled = [], 0
    if run:
        yield CopyTile(start, filled, tuple(run))


def _append(run: list[Segment], segment: Segment) -> None:
    """Add a range; one that continues the last range lengthens it, so that it is one read."""
    if run:
        last = run[-1]
        if last.path == segment.path and last.offset + last.nbytes == segment.offset:
            run[-1] = Segment(last.path, last.offset, last.nbytes + segment.nbytes)
            return
    run.append(segment)


def _cut_target(placed: PlacedTensor, slab_bytes: int) -> Iterator[MergeTile]:
    target = placed.tensor
    columns = prod(target.shape[1:])
    rows = target.shape[0] if target.shape else 1
    row_bytes = columns * max(target.source.dtype.item_bytes, target.dtype.item_bytes)
    # room for a short tail that joins its tile
    step = max(MIN_TILE_ROWS, slab_bytes // row_bytes - MIN_TILE_ROWS + 1)
    out_row_bytes = target.dtype.nbytes(columns)
    for begin, end in split_rows(0, rows, step):
        offset = placed.offset + begin * out_row_bytes
        yield MergeTile(target, begin, end, offset, is_first=begin == 0, is_last=end == rows)
