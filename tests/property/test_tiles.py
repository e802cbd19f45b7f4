"""Tiles: every byte of a shard once, in order, within a slab, from the right place."""

from __future__ import annotations

from math import prod
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given

from streammerge.checkpoint.header import StoredTensor
from streammerge.dtypes import Dtype
from streammerge.plan.layout import lay_out
from streammerge.plan.ops import ApplyTerms, CopyBytes, TensorPlan
from streammerge.plan.tiles import (
    MIN_TILE_ROWS,
    CopyTile,
    MergeTile,
    Segment,
    ShardTile,
    cut_shard,
    split_rows,
)

FLOATS = [Dtype.BF16, Dtype.F16, Dtype.F32, Dtype.F64]
SHAPES = st.lists(st.integers(0, 12), max_size=3).map(tuple)
# per tensor: source, output (None: a copy), shape, file, gap to the tensor before it in that file
ITEMS = st.lists(
    st.tuples(
        st.sampled_from(FLOATS),
        st.sampled_from([None, None, *FLOATS]),
        SHAPES,
        st.sampled_from(["one", "two"]),
        st.sampled_from([0, 0, 8]),
    ),
    min_size=1,
    max_size=8,
)
Items = list[tuple[Dtype, Dtype | None, tuple[int, ...], str, int]]


def build(items: Items) -> list[TensorPlan]:
    ends = {"one": 64, "two": 128}
    tensors = []
    for number, (stored, output, shape, path, gap) in enumerate(items):
        name = f"t{number}"
        source = StoredTensor(name, stored, shape, Path(path), ends[path] + gap)
        ends[path] = source.offset + source.nbytes
        op = CopyBytes() if output is None else ApplyTerms(stored, ())
        tensors.append(TensorPlan(name, output or stored, source, op, "copied"))
    return tensors


def least_slab(tensors: list[TensorPlan]) -> int:
    """What `plan_memory` asks for: eight rows, or all of a shorter tensor."""
    rows = [
        min(8, t.shape[0] if t.shape else 1)
        * prod(t.shape[1:])
        * max(t.dtype.item_bytes, t.source.dtype.item_bytes)
        for t in tensors
        if isinstance(t.op, ApplyTerms)
    ]
    return max([1, *rows])


def source_range(tile: ShardTile) -> int:
    segments = tile.segments if isinstance(tile, CopyTile) else (tile.source,)
    return sum(segment.nbytes for segment in segments)


@given(ITEMS, st.integers(0, 400), st.integers(1, 4000))
def test_every_byte_once_in_order_and_within_a_slab(items: Items, spare: int, limit: int) -> None:
    tensors = build(items)
    slab = least_slab(tensors) + spare
    for shard in lay_out(tensors, max_shard_bytes=limit, layout="safetensors"):
        position = len(shard.head)
        for tile in cut_shard(shard, slab_bytes=slab):
            assert tile.offset == position
            assert 0 < tile.nbytes <= slab
            assert 0 < source_range(tile) <= slab
            position += tile.nbytes
        assert position == shard.file_bytes


@given(ITEMS, st.integers(0, 400))
def test_copies_come_from_the_right_bytes(items: Items, spare: int) -> None:
    tensors = build(items)
    (shard,) = lay_out(tensors, max_shard_bytes=10**9, layout="safetensors")
    wanted = {
        placed.offset + n: (placed.tensor.source.path, placed.tensor.source.offset + n)
        for placed in shard.tensors
        if isinstance(placed.tensor.op, CopyBytes)
        for n in range(placed.tensor.nbytes)
    }
    got = {}
    for tile in cut_shard(shard, slab_bytes=least_slab(tensors) + spare):
        if isinstance(tile, CopyTile):
            assert sum(segment.nbytes for segment in tile.segments) == tile.nbytes
            position = tile.offset
            for segment in tile.segments:
                for n in range(segment.nbytes):
                    got[position + n] = (segment.path, segment.offset + n)
                position += segment.nbytes
    assert got == wanted


@given(ITEMS, st.integers(0, 400))
def test_neighbouring_segments_are_one(items: Items, spare: int) -> None:
    tensors = build(items)
    (shard,) = lay_out(tensors, max_shard_bytes=10**9, layout="safetensors")
    for tile in cut_shard(shard, slab_bytes=least_slab(tensors) + spare):
        if isinstance(tile, CopyTile):
            for left, right in zip(tile.segments, tile.segments[1:], strict=False):
                assert (left.path, left.offset + left.nbytes) != (right.path, right.offset)


@given(ITEMS, st.integers(0, 400))
def test_targets_are_cut_into_whole_rows(items: Items, spare: int) -> None:
    tensors = build(items)
    (shard,) = lay_out(tensors, max_shard_bytes=10**9, layout="safetensors")
    found: dict[str, list[MergeTile]] = {}
    for tile in cut_shard(shard, slab_bytes=least_slab(tensors) + spare):
        if isinstance(tile, MergeTile):
            found.setdefault(tile.target.name, []).append(tile)
    wanted = {t.name for t in tensors if isinstance(t.op, ApplyTerms) and t.nbytes}
    assert found.keys() == wanted
    for tiles in found.values():
        target, end = tiles[0].target, 0
        rows = target.shape[0] if target.shape else 1
        for tile in tiles:
            assert tile.begin == end
            end = tile.end
            assert tile.end - tile.begin >= min(MIN_TILE_ROWS, rows)
            assert tile.is_first == (tile.begin == 0)
            assert tile.is_last == (tile.end == rows)
            row = target.source.nbytes // rows
            assert tile.columns == prod(target.shape[1:])
            assert tile.source == Segment(
                target.source.path,
                target.source.offset + tile.begin * row,
                (tile.end - tile.begin) * row,
            )
        assert end == rows


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
