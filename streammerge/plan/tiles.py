"""Cut a shard into blocks that fit one buffer, and targets into tiles of rows, in file order."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from streammerge.dtypes import Dtype
from streammerge.plan.ops import ApplyTerms, CopyBytes, LoraTerm

if TYPE_CHECKING:
    from collections.abc import Iterator

    from streammerge.adapters.terms import Factor
    from streammerge.checkpoint.header import StoredTensor
    from streammerge.checkpoint.reader import ReadableFile
    from streammerge.plan.layout import PlacedTensor, ShardPlan
    from streammerge.plan.ops import TensorPlan

__all__ = [
    "MIN_TILE_ROWS",
    "Block",
    "MergeTile",
    "Segment",
    "SidePiece",
    "cut_shard",
    "factor_bytes",
    "is_scattered",
    "shared_factor_bytes",
    "split_rows",
]

# below four rows MKL takes another kernel, which rounds otherwise than the whole product does
MIN_TILE_ROWS = 4
# a target that does not fit what is left of a block begins there only if this part of it is left:
# narrow tiles cost a product each
_WORTHWHILE = 4
# of a factor whose rows are this many times as long as what is taken of them, all is kept in memory
_SCATTERED = 4
# pieces of targets in one block: beside its factors each takes some KB for objects of Python's and
# torch's, which is more than tiny experts take themselves
_MOST_PIECES = 256


@dataclass(frozen=True, slots=True)
class Segment:
    """A range of a source file, and its place in a block's buffer."""

    file: ReadableFile
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
class SidePiece:
    """A piece of what describes the codes of a weight, known when all of its rows are encoded."""

    target: TensorPlan
    part: int
    """Which of the weight's parts."""
    begin: int
    """First byte of the part."""
    is_last: bool
    """Whether nothing of the weight comes after it."""


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
    side: SidePiece | None = None
    """What it is instead of rows."""


def split_rows(begin: int, end: int, step: int) -> list[tuple[int, int]]:
    """Divide rows into ranges of `step`; a tail too short for exact bits joins the last one."""
    if begin == end:
        return []
    edges = list(range(begin, end, step))
    if len(edges) > 1 and end - edges[-1] < MIN_TILE_ROWS:
        edges.pop()
    return list(zip(edges, [*edges[1:], end], strict=True))


def factor_bytes(tensor: TensorPlan) -> int:
    """Return the most bytes that a target's factors need: as stored, and as they are computed with.

    A whole factor that is stored in the compute dtype is used as it is. Of a part of a factor only
    that part is read.
    """
    if not isinstance(tensor.op, ApplyTerms):
        return 0
    item = 8 if tensor.op.work_dtype is Dtype.F64 else 4
    total = 0
    if tensor.encoding is not None:
        others = tensor.encoding.together
        total = tensor.encoding.held_bytes + sum(factor_bytes(other) for other in others)
    whole: list[StoredTensor] = []
    for term in tensor.terms:
        total += term.work_bytes(tensor.shape)
        as_is = list(term.factors)
        changed = [term.a, term.b] if isinstance(term, LoraTerm) else []
        for factor in changed:
            if factor.is_whole:
                continue
            as_is = [one for one in as_is if one is not factor.tensor]
            values = prod(factor.shape)
            # what is spread or multiplied is there beside what comes of it
            total += values * item * (2 if factor.is_changed else 1)
            if factor.is_part:
                total += values * factor.tensor.dtype.item_bytes
            else:
                whole.append(factor.tensor)
        whole += as_is
        total += sum(prod(f.shape) * item for f in as_is if f.dtype.item_bytes != item)
    return total + sum(f.nbytes for f in (whole if len(whole) < 2 else dict.fromkeys(whole)))


def is_scattered(factor: Factor) -> bool:
    """Whether a part of a factor lies so far apart that most of what is read for it is not it."""
    if factor.columns is None:
        return False
    return prod(factor.tensor.shape[1:]) >= _SCATTERED * len(factor.columns)


def shared_factor_bytes(tensor: TensorPlan) -> int:
    """Return the bytes of factors of which a target takes scattered parts, and others the rest."""
    terms = [term for term in tensor.terms if isinstance(term, LoraTerm)]
    parts = [f.tensor for term in terms for f in (term.a, term.b) if is_scattered(f)]
    return sum(part.nbytes for part in (parts if len(parts) < 2 else dict.fromkeys(parts)))


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
        for block in _blocks(cutter, placed):
            blocks += 1
            yield block
    if cutter.output_bytes or not blocks:
        yield cutter.close()


def _blocks(cutter: _Cutter, placed: PlacedTensor) -> Iterator[Block]:
    """Yield the blocks that are full with a weight."""
    if placed.tensor.encoding is not None:
        yield from cutter.encode(placed)
        return
    yield from cutter.move_to(placed.offsets[0])
    for part in placed.tensor.parts():
        if part.nbytes:
            is_copy = isinstance(part.op, CopyBytes)
            yield from cutter.copy(part) if is_copy else cutter.merge(part)


@dataclass(slots=True)
class _Part:
    """A part of a block: rows of a target, or bytes that pass through."""

    file: ReadableFile
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

    def move_to(self, offset: int) -> Iterator[Block]:
        """Go on at a place in the file."""
        if self._start + self.output_bytes == offset:
            return
        if self._parts:
            yield self.close()
        self._start = offset

    def encode(self, placed: PlacedTensor) -> Iterator[Block]:
        """Yield a weight that is stored as codes: its rows, then what describes them."""
        target, encoding = placed.tensor, placed.tensor.encoding
        assert encoding is not None
        if self._parts:
            yield self.close()
        row = target.source.dtype.nbytes(target.columns)
        # a short tail may join the last tile
        count = self._slab_bytes // max(row, 1) - (MIN_TILE_ROWS - 1)
        count -= count % encoding.row_step
        if target.source.nbytes <= self._slab_bytes:
            count = max(1, target.rows)
        if count <= 0:
            msg = f"{encoding.row_step} rows of {target.name} do not fit a block"
            raise ValueError(msg)
        at = placed.offsets[0]
        for begin, end in split_rows(0, target.rows, count):
            source = Segment(
                target.source.file, target.source.offset + begin * row, 0, (end - begin) * row
            )
            nbytes = encoding.code_bytes(begin, end)
            yield Block(at, nbytes, (source,), (MergeTile(target, begin, end, 0, 0),))
            at += nbytes
        yield from self._sides(placed)
        self._start = placed.offsets[-1] + target.specs[-1].nbytes

    def _sides(self, placed: PlacedTensor) -> Iterator[Block]:
        specs = placed.tensor.specs
        for number, spec in enumerate(specs[1:], start=1):
            for begin in range(0, spec.nbytes, self._slab_bytes):
                nbytes = min(self._slab_bytes, spec.nbytes - begin)
                is_last = number == len(specs) - 1 and begin + nbytes == spec.nbytes
                side = SidePiece(placed.tensor, number, begin, is_last)
                yield Block(placed.offsets[number] + begin, nbytes, (), (), side)

    def copy(self, tensor: TensorPlan) -> Iterator[Block]:
        """Add bytes that pass through; they may be cut anywhere."""
        stored, done = tensor.source, 0
        if self._lead or self._source_bytes != self.output_bytes:
            # nothing moves these bytes: they are read to where they are written from
            yield self.close()
        while done < stored.nbytes:
            room = self._slab_bytes - max(self.output_bytes, self._lead + self._source_bytes)
            if room <= 0:
                yield self.close()
                continue
            count = min(room, stored.nbytes - done)
            self._add(_Part(stored.file, stored.offset + done, count, count, None))
            self._has_copies = True
            done += count

    def merge(self, target: TensorPlan) -> Iterator[Block]:
        """Add a target, whole rows at a time."""
        rows, columns = target.rows, target.columns
        source_row = target.source.dtype.nbytes(columns)
        output_row = target.dtype.nbytes(columns)
        factors = factor_bytes(target)
        if source_row != output_row and self._has_copies:
            yield self.close()
        is_full = self._factor_bytes and self._factor_bytes + factors > self._max_factor_bytes
        if is_full or len(self._parts) >= _MOST_PIECES:
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
                    stored.file,
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
            _append(segments, Segment(part.file, part.offset, source_at, part.source_bytes))
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
        if last.file == segment.file and last.offset + last.nbytes == segment.offset:
            segments[-1] = Segment(last.file, last.offset, last.at, last.nbytes + segment.nbytes)
            return
    segments.append(segment)
