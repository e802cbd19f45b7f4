"""Weights that are stored as codes: every byte of every part once, in tiles that can be encoded."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from streammerge.checkpoint.header import StoredTensor, parse_header
from streammerge.codecs.registry import find_codec
from streammerge.codecs.schemes import section_of
from streammerge.dtypes import Dtype
from streammerge.plan.layout import ShardPlan, lay_out
from streammerge.plan.memory import plan_memory
from streammerge.plan.ops import ApplyTerms, CopyBytes, Encoding, TensorPlan
from streammerge.plan.tiles import MIN_TILE_ROWS, Block, cut_shard, factor_bytes

NO_LIMIT = 10**9
# a machine that does other work too is slow now and then
UNTIMED = settings(deadline=None)
FP8_BLOCKS = {"quant_method": "fp8", "weight_block_size": [16, 32]}


def section(form: str, *, is_nested: bool = False) -> dict[str, Any]:
    if form == "fp8-blocks":
        return FP8_BLOCKS
    return section_of(form, group_size=-1, is_nested=is_nested, dtype=Dtype.BF16)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Item:
    """A tensor to be: codes of a form, or bytes that pass through."""

    form: str | None
    is_nested: bool
    dtype: Dtype
    rows: int
    columns: int

    def plan(self, number: int, at: int) -> TensorPlan:
        # some formats want whole groups; words of packed integers are no longer than two values
        wide = {"nvfp4": 16, "mxfp4": 32, "w4a16": 2, "w8a16": 2}.get(
            self.form or "", 1
        ) * self.columns
        name = f"model.layers.{number}.mlp.up_proj.weight"
        source = StoredTensor(name, self.dtype, (self.rows, wide), Path("base"), at)
        if self.form is None:
            return TensorPlan(name, self.dtype, source, CopyBytes(), "copied")
        tensor = TensorPlan(name, self.dtype, source, ApplyTerms(self.dtype, ()), "quantized")
        codec = find_codec(section(self.form, is_nested=self.is_nested), self.dtype)
        return TensorPlan(
            name, self.dtype, source, tensor.op, "quantized", Encoding.of(codec, tensor)
        )


FORMS = [None, "nf4", "fp4", "int8", "fp8", "fp8-blocks", "w8a16", "w4a16", "nvfp4", "mxfp4"]
ITEMS = st.lists(
    st.builds(
        Item,
        st.sampled_from(FORMS),
        st.booleans(),
        st.sampled_from([Dtype.BF16, Dtype.F16, Dtype.F32]),
        st.integers(1, 150),
        st.integers(1, 20),
    ),
    min_size=1,
    max_size=6,
)


def build(items: list[Item]) -> list[TensorPlan]:
    tensors: list[TensorPlan] = []
    at = 64
    for number, item in enumerate(items):
        tensors.append(item.plan(number, at))
        at += tensors[-1].source.nbytes
    return tensors


def least_slab(tensors: list[TensorPlan]) -> int:
    """What `plan_memory` asks for: a step of rows and a short tail."""
    sizes = [1]
    for tensor in tensors:
        if tensor.encoding is None:
            continue
        step = -(-MIN_TILE_ROWS // tensor.encoding.row_step) * tensor.encoding.row_step
        rows = min(step + MIN_TILE_ROWS, tensor.rows)
        sizes.append(rows * tensor.source.dtype.nbytes(tensor.columns))
    return max(sizes)


def cut(
    tensors: list[TensorPlan], spare: int, limit: int
) -> list[tuple[ShardPlan, int, list[Block]]]:
    slab = least_slab(tensors) + spare
    return [
        (shard, slab, list(cut_shard(shard, slab_bytes=slab, max_factor_bytes=NO_LIMIT)))
        for shard in lay_out(tensors, max_shard_bytes=limit, layout="safetensors")
    ]


LIMITS = st.one_of(st.integers(1, 4000), st.just(NO_LIMIT))


@UNTIMED
@given(ITEMS, st.integers(0, 3000), LIMITS)
def test_every_byte_of_a_shard_once_and_within_a_slab(
    items: list[Item], spare: int, limit: int
) -> None:
    for shard, slab, blocks in cut(build(items), spare, limit):
        ends = [len(shard.head)]
        for block in sorted(blocks, key=lambda one: one.offset):
            assert block.offset == ends[-1]
            ends.append(block.offset + block.nbytes)
            assert 0 < block.nbytes <= slab
            assert sum(segment.nbytes for segment in block.segments) <= slab
        assert ends[-1] == shard.file_bytes
        is_ascending = all(one.offset <= two.offset for one, two in pairwise(blocks))
        assert is_ascending or not shard.is_sequential


@UNTIMED
@given(ITEMS, st.integers(0, 3000), LIMITS)
def test_tiles_are_what_encoders_take_and_sources_are_complete(
    items: list[Item], spare: int, limit: int
) -> None:
    for shard, _, blocks in cut(build(items), spare, limit):
        for placed in shard.tensors:
            tensor, encoding = placed.tensor, placed.tensor.encoding
            if encoding is None:
                continue
            row = tensor.source.dtype.nbytes(tensor.columns)
            done = 0
            for block in blocks:
                if not block.tiles or block.tiles[0].target is not tensor:
                    continue
                (tile,), (segment,) = block.tiles, block.segments
                assert tile.begin == done
                assert tile.begin % encoding.row_step == 0
                assert tile.end % encoding.row_step == 0 or tile.end == tensor.rows
                assert tile.end - tile.begin >= min(MIN_TILE_ROWS, tensor.rows)
                done = tile.end
                # read to where the tile is
                assert (segment.offset, segment.nbytes, segment.at) == (
                    tensor.source.offset + tile.begin * row,
                    (tile.end - tile.begin) * row,
                    tile.source_at,
                )
                # the codes of these rows are where the format has them
                extents = {x.role: x for x in encoding.weight.extents(tile.begin, tile.end)}
                codes = extents[encoding.weight.parts[0].role]
                assert block.offset == placed.offsets[0] + codes.offset
                assert block.nbytes == codes.total_bytes
            assert done == tensor.rows


@UNTIMED
@given(ITEMS, st.integers(0, 200), LIMITS)
def test_what_describes_codes_comes_after_all_of_them(
    items: list[Item], spare: int, limit: int
) -> None:
    for shard, _, blocks in cut(build(items), spare, limit):
        for placed in shard.tensors:
            tensor = placed.tensor
            if tensor.encoding is None:
                continue
            rows = [n for n, b in enumerate(blocks) if b.tiles and b.tiles[0].target is tensor]
            sides = [
                (number, block, block.side)
                for number, block in enumerate(blocks)
                if block.side is not None and block.side.target is tensor
            ]
            assert max(rows) < min(number for number, _, _ in sides)
            # the room of a weight is given back once, with its last piece
            assert [side.is_last for _, _, side in sides] == [False] * (len(sides) - 1) + [True]
            pieces = [(side.part, side.begin, block.nbytes) for _, block, side in sides]
            for part, spec in enumerate(tensor.specs[1:], start=1):
                mine = [(begin, nbytes) for number, begin, nbytes in pieces if number == part]
                assert sum(nbytes for _, nbytes in mine) == spec.nbytes
                assert [begin for begin, _ in mine] == [
                    sum(nbytes for _, nbytes in mine[:n]) for n in range(len(mine))
                ]


@UNTIMED
@given(ITEMS, LIMITS)
def test_every_part_is_on_its_boundary_and_in_the_header(items: list[Item], limit: int) -> None:
    tensors = build(items)
    names = []
    for shard in lay_out(tensors, max_shard_bytes=limit, layout="safetensors"):
        found, _ = parse_header(shard.head[8:], path=Path(shard.name), file_bytes=shard.file_bytes)
        stored = {(one.name, one.dtype, one.shape, one.offset) for one in found}
        planned = {
            (spec.name, spec.dtype, spec.shape, offset)
            for placed in shard.tensors
            for spec, offset in zip(placed.tensor.specs, placed.offsets, strict=True)
        }
        assert stored == planned
        assert all(offset % dtype.item_bytes == 0 for _, dtype, _, offset in planned)
        names += [placed.tensor.name for placed in shard.tensors]
        assert shard.data_bytes == sum(placed.tensor.nbytes for placed in shard.tensors)
        assert shard.data_bytes <= limit or len(shard.tensors) == 1
    assert sorted(names) == sorted(tensor.name for tensor in tensors)


@UNTIMED
@given(ITEMS)
def test_planned_slabs_are_large_enough(items: list[Item]) -> None:
    tensors = build(items)
    least = plan_memory(tensors, max_memory=10**13).least_bytes
    memory = plan_memory(tensors, max_memory=least)
    for shard in lay_out(tensors, max_shard_bytes=None, layout="safetensors"):
        blocks = cut_shard(
            shard, slab_bytes=memory.slab_bytes, max_factor_bytes=memory.factor_bytes
        )
        assert sum(block.nbytes for block in blocks) == shard.data_bytes


@pytest.mark.parametrize("form", ["nf4", "int8", "nvfp4"])
def test_what_is_held_of_a_weight_is_counted(form: str) -> None:
    (small,) = build([Item(form, is_nested=True, dtype=Dtype.BF16, rows=64, columns=64)])
    (large,) = build([Item(form, is_nested=True, dtype=Dtype.BF16, rows=640_000, columns=64)])
    assert small.encoding is not None
    assert large.encoding is not None
    side = sum(spec.nbytes for spec in large.specs[1:])
    assert large.encoding.held_bytes >= side
    assert factor_bytes(large) == large.encoding.held_bytes
    needs = [plan_memory([one], max_memory=10**13).least_bytes for one in (small, large)]
    # of two weights at a time; slabs are as small for the one as for the other
    more = large.encoding.held_bytes - small.encoding.held_bytes
    assert needs[1] - needs[0] == 2 * more


def test_rows_that_do_not_fit_are_refused() -> None:
    tensors = build([Item("fp8-blocks", is_nested=False, dtype=Dtype.F32, rows=64, columns=20)])
    (shard,) = lay_out(tensors, max_shard_bytes=NO_LIMIT, layout="safetensors")
    with pytest.raises(ValueError, match=r"16 rows of .* do not fit a block"):
        list(cut_shard(shard, slab_bytes=16 * 80, max_factor_bytes=NO_LIMIT))
