"""Blocks: every byte of a shard once, in order, within a slab, from the right place."""

from __future__ import annotations

from itertools import pairwise
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from streammerge.adapters.terms import Factor, Region
from streammerge.checkpoint.header import StoredTensor
from streammerge.dtypes import Dtype
from streammerge.plan.layout import ShardPlan, lay_out
from streammerge.plan.ops import ApplyTerms, BiasTerm, CopyBytes, LoraTerm, TensorPlan
from streammerge.plan.tiles import (
    MIN_TILE_ROWS,
    Block,
    cut_shard,
    factor_bytes,
    shared_factor_bytes,
    split_rows,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from streammerge.plan.ops import Term

FLOATS = [Dtype.BF16, Dtype.F16, Dtype.F32, Dtype.F64]
SHAPES = st.lists(st.integers(0, 12), max_size=3).map(tuple)
# rows enough for several blocks
LONG = st.tuples(st.integers(4, 60), st.integers(1, 9))
# per tensor: source, output (None: a copy), shape, file, gap to the tensor before it in that file,
# length of its factor (0: no term)
ITEMS = st.lists(
    st.tuples(
        st.sampled_from(FLOATS),
        st.sampled_from([None, None, *FLOATS]),
        st.one_of(SHAPES, LONG),
        st.sampled_from(["one", "two"]),
        st.sampled_from([0, 0, 8]),
        st.sampled_from([0, 1, 5, 40]),
    ),
    min_size=1,
    max_size=8,
)
Items = list[tuple[Dtype, "Dtype | None", tuple[int, ...], str, int, int]]
NO_LIMIT = 10**9


def build(items: Items) -> list[TensorPlan]:
    ends = {"one": 64, "two": 128}
    tensors = []
    for number, (stored, output, shape, path, gap, factor) in enumerate(items):
        name = f"t{number}"
        source = StoredTensor(name, stored, shape, Path(path), ends[path] + gap)
        ends[path] = source.offset + source.nbytes
        op = CopyBytes() if output is None else ApplyTerms(stored, terms_of(shape, factor))
        tensors.append(TensorPlan(name, output or stored, source, op, "copied"))
    return tensors


def terms_of(shape: tuple[int, ...], factor: int) -> tuple[Term, ...]:
    """A term with factors of that length; on a part of what has more dimensions than a matrix."""
    if not factor:
        return ()
    vector = StoredTensor("f", Dtype.F32, (factor,), Path("adapter"), 0)
    if len(shape) < 3 or factor == 1 or not shape[1]:
        return (BiasTerm(vector, 1.0),)
    part = Region(range(shape[1]), range(shape[2]))
    whole = Factor(vector)
    return (LoraTerm(whole, whole, 1.0, is_transposed=False, rounds_delta=False, region=part),)


def least_slab(tensors: list[TensorPlan]) -> int:
    """What `plan_memory` asks for: eight rows, or all of a shorter tensor."""
    rows = [
        min(8, t.rows) * t.columns * max(t.dtype.item_bytes, t.source.dtype.item_bytes)
        for t in tensors
        if isinstance(t.op, ApplyTerms)
    ]
    return max([1, *rows])


@pytest.mark.parametrize(
    ("shape", "kinds", "rows", "columns"),
    [
        ((), "", 1, 1),
        ((5,), "b", 5, 1),
        ((5, 3), "", 5, 3),
        ((5, 3), "r", 5, 3),
        ((2, 5, 3), "", 10, 3),
        ((2, 5, 3), "r", 10, 3),
        ((2, 5, 3), "rr", 10, 3),
        # what sees a convolution as a matrix of its outputs
        ((2, 5, 3), "w", 2, 15),
        ((2, 5, 3, 4), "w", 2, 60),
        ((2, 5, 3, 4), "", 30, 4),
        ((0, 5, 3), "", 0, 3),
        ((2, 5, 0), "w", 2, 0),
    ],
)
def test_rows_are_those_that_terms_see(
    shape: tuple[int, ...], kinds: str, rows: int, columns: int
) -> None:
    factor = Factor(StoredTensor("f", Dtype.F32, (2, 2), Path("adapter"), 0))
    region = Region(range(1), range(1))
    made: dict[str, Term] = {
        "b": BiasTerm(factor.tensor, 1.0),
        "w": LoraTerm(factor, factor, 1.0, is_transposed=False, rounds_delta=False),
        "r": LoraTerm(factor, factor, 1.0, is_transposed=False, rounds_delta=False, region=region),
    }
    source = StoredTensor("t", Dtype.BF16, shape, Path("one"), 0)
    op = ApplyTerms(Dtype.BF16, tuple(made[kind] for kind in kinds))
    tensor = TensorPlan("t", Dtype.BF16, source, op, "merged")
    assert (tensor.rows, tensor.columns) == (rows, columns)
    copied = TensorPlan("t", Dtype.BF16, source, CopyBytes(), "copied")
    assert copied.rows * copied.columns == prod(shape)


def is_target(tensor: TensorPlan) -> bool:
    return isinstance(tensor.op, ApplyTerms) and tensor.nbytes > 0


def cuts(
    items: Items, spare: int, *, limit: int = NO_LIMIT, factors: int = NO_LIMIT
) -> Iterator[tuple[ShardPlan, int, list[Block]]]:
    """Each shard, the size of a slab, and the blocks."""
    tensors = build(items)
    slab = least_slab(tensors) + spare
    for shard in lay_out(tensors, max_shard_bytes=limit, layout="safetensors"):
        yield shard, slab, list(cut_shard(shard, slab_bytes=slab, max_factor_bytes=factors))


@given(ITEMS, st.integers(0, 400), st.integers(1, 4000), st.integers(1, 900))
def test_every_byte_once_in_order_and_within_a_slab(
    items: Items, spare: int, limit: int, factors: int
) -> None:
    for shard, slab, blocks in cuts(items, spare, limit=limit, factors=factors):
        position = len(shard.head)
        for block in blocks:
            assert block.offset == position
            assert block.nbytes <= slab
            assert block.nbytes > 0 or not shard.data_bytes
            position += block.nbytes
            # in the slab: one source after the other, and none beyond it
            end = 0
            for segment in block.segments:
                assert segment.at >= end
                assert segment.nbytes > 0
                end = segment.at + segment.nbytes
            assert end <= slab
            for tile in block.tiles:
                count = (tile.end - tile.begin) * tile.target.source.nbytes // tile.target.rows
                assert tile.source_at + count <= slab
                assert tile.output_at + (tile.end - tile.begin) * (
                    tile.target.nbytes // tile.target.rows
                ) <= min(slab, block.nbytes)
        assert position == shard.file_bytes


@given(ITEMS, st.integers(0, 400), st.integers(1, 900))
def test_every_source_byte_is_read_once(items: Items, spare: int, factors: int) -> None:
    for shard, _, blocks in cuts(items, spare, factors=factors):
        wanted = [
            (placed.tensor.source.path, placed.tensor.source.offset + n)
            for placed in shard.tensors
            if placed.tensor.nbytes
            for n in range(placed.tensor.source.nbytes)
        ]
        got = [
            (segment.file, segment.offset + n)
            for block in blocks
            for segment in block.segments
            for n in range(segment.nbytes)
        ]
        assert got == wanted


Byte = tuple[Path, int]
Slots = list[tuple[str, int, int] | Byte | None]


def read(block: Block, slab: int) -> Slots:
    """What is in the slab when a block was read: where each byte comes from."""
    slots: Slots = [None] * slab
    for segment in block.segments:
        for n in range(segment.nbytes):
            slots[segment.at + n] = (segment.file, segment.offset + n)
    return slots


def merge(block: Block, slots: Slots) -> None:
    """Replace the source rows of each tile, in order, by output bytes (name, row, byte)."""
    for tile in block.tiles:
        target = tile.target
        source_row = target.source.nbytes // target.rows
        output_row = target.nbytes // target.rows
        for row in range(tile.begin, tile.end):
            at = tile.source_at + (row - tile.begin) * source_row
            offset = target.source.offset + row * source_row
            # what is merged is still there: no output row is over it
            assert slots[at : at + source_row] == [
                (target.source.path, offset + n) for n in range(source_row)
            ]
            at = tile.output_at + (row - tile.begin) * output_row
            slots[at : at + output_row] = [(target.name, row, n) for n in range(output_row)]


def wanted_bytes(shard: ShardPlan) -> Slots:
    wanted: Slots = []
    for placed in shard.tensors:
        assert placed.offsets[0] == len(shard.head) + len(wanted)
        for tensor in placed.tensor.parts():
            if is_target(tensor):
                row = tensor.nbytes // tensor.rows
                wanted += [(tensor.name, at // row, at % row) for at in range(tensor.nbytes)]
            else:
                source = tensor.source
                wanted += [(source.path, source.offset + n) for n in range(tensor.nbytes)]
    return wanted


def simulate(items: Items, spare: int, factors: int) -> None:
    for shard, slab, blocks in cuts(items, spare, factors=factors):
        got: Slots = []
        for block in blocks:
            slots = read(block, slab)
            merge(block, slots)
            got += slots[: block.nbytes]
        assert got == wanted_bytes(shard)


@settings(max_examples=300)
@given(ITEMS, st.integers(0, 400), st.integers(1, 900))
def test_a_run_in_slabs_gives_the_planned_bytes(items: Items, spare: int, factors: int) -> None:
    simulate(items, spare, factors)


@pytest.mark.parametrize("other", [Dtype.BF16, Dtype.F64])
@pytest.mark.parametrize("order", [(0, 1), (1, 0), (0, 1, 0), (1, 0, 1)])
def test_copies_and_casts_side_by_side(other: Dtype, order: tuple[int, ...]) -> None:
    # where the widths differ, what passes through is not where it is written to
    kinds: Items = [
        (Dtype.F32, None, (6, 4), "one", 0, 0),
        (Dtype.F32, other, (12, 4), "one", 0, 0),
    ]
    simulate([kinds[number] for number in order], 4096, NO_LIMIT)


@given(ITEMS, st.integers(0, 400), st.integers(1, 900))
def test_neighbouring_segments_are_one(items: Items, spare: int, factors: int) -> None:
    for _, _, blocks in cuts(items, spare, factors=factors):
        for block in blocks:
            for left, right in pairwise(block.segments):
                is_next = (left.file, left.offset + left.nbytes) == (right.file, right.offset)
                # a range of the file goes to a range of the slab
                assert not is_next or left.at + left.nbytes != right.at


def test_neighbours_in_a_file_are_read_at_once() -> None:
    items: Items = [
        (Dtype.BF16, None if number % 2 else Dtype.BF16, (12, 3), "one", 0, 5)
        for number in range(6)
    ]
    ((_, _, (block,)),) = cuts(items, 10_000)
    (segment,) = block.segments
    assert (segment.offset, segment.at, segment.nbytes) == (64, 0, 6 * 72)
    assert [tile.output_at for tile in block.tiles] == [0, 144, 288]


@given(ITEMS, st.integers(0, 400), st.integers(1, 900))
def test_targets_are_cut_into_whole_rows(items: Items, spare: int, factors: int) -> None:
    for shard, _, blocks in cuts(items, spare, factors=factors):
        tiles = [tile for block in blocks for tile in block.tiles]
        # in the order of the file
        parts = [part for placed in shard.tensors for part in placed.tensor.parts()]
        names = [part.name for part in parts if is_target(part)]
        assert list(dict.fromkeys(tile.target.name for tile in tiles)) == names
        for name in names:
            mine = [tile for tile in tiles if tile.target.name == name]
            rows, end = mine[0].target.rows, 0
            for tile in mine:
                assert tile.begin == end
                end = tile.end
                assert tile.end - tile.begin >= min(MIN_TILE_ROWS, rows)
                assert tile.is_first == (tile.begin == 0)
            assert end == rows


@given(ITEMS, st.integers(0, 400), st.integers(1, 900))
def test_factors_that_begin_in_a_block_are_limited(items: Items, spare: int, factors: int) -> None:
    for _, _, blocks in cuts(items, spare, factors=factors):
        for block in blocks:
            begun = [factor_bytes(tile.target) for tile in block.tiles if tile.is_first]
            held = [nbytes for nbytes in begun if nbytes]
            assert sum(held) <= factors or len(held) == 1


def test_factors_are_counted_as_stored_and_as_they_are_converted() -> None:
    copy, exact, wider = build(
        [
            (Dtype.F32, None, (3,), "one", 0, 7),
            (Dtype.F32, Dtype.F32, (3,), "one", 0, 7),
            (Dtype.F64, Dtype.F32, (3,), "one", 0, 7),
        ]
    )
    assert factor_bytes(copy) == shared_factor_bytes(copy) == 0
    # what is stored in the compute dtype is used as it is
    assert factor_bytes(exact) == 7 * 4
    assert factor_bytes(wider) == 7 * (4 + 8)
    assert shared_factor_bytes(wider) == 0


@pytest.mark.parametrize("shape", [(0,), (0, 7), (3, 0)])
@pytest.mark.parametrize("output", [None, Dtype.F64])
def test_a_shard_without_data_is_one_empty_block(
    shape: tuple[int, ...], output: Dtype | None
) -> None:
    ((shard, _, (block,)),) = cuts([(Dtype.F32, output, shape, "one", 0, 3)] * 2, 100)
    assert block == Block(len(shard.head), 0, (), ())


def test_rows_that_do_not_fit_are_refused() -> None:
    tensors = build([(Dtype.F32, Dtype.F32, (9, 100), "one", 0, 0)])
    (shard,) = lay_out(tensors, max_shard_bytes=NO_LIMIT, layout="safetensors")
    with pytest.raises(ValueError, match="4 rows of t0 do not fit a block"):
        list(cut_shard(shard, slab_bytes=1599, max_factor_bytes=NO_LIMIT))


@given(st.integers(0, 50), st.integers(1, 300), st.integers(1, 60))
def test_split_rows_covers_the_range(begin: int, count: int, step: int) -> None:
    end = begin + count
    parts = split_rows(begin, end, step)
    assert [row for low, high in parts for row in range(low, high)] == list(range(begin, end))
    assert all(high - low == step for low, high in parts[:-1])
    if step >= MIN_TILE_ROWS:
        assert all(high - low >= min(MIN_TILE_ROWS, count) for low, high in parts)
        assert all(high - low < step + MIN_TILE_ROWS for low, high in parts)


@pytest.mark.parametrize(
    ("end", "expected"),
    [
        (0, []),
        (3, [(0, 3)]),
        (8, [(0, 8)]),
        (11, [(0, 11)]),
        (12, [(0, 8), (8, 12)]),
        (19, [(0, 8), (8, 19)]),
        (20, [(0, 8), (8, 16), (16, 20)]),
    ],
)
def test_a_short_tail_joins_the_last_range(end: int, expected: list[tuple[int, int]]) -> None:
    assert split_rows(0, end, 8) == expected
