"""Layouts: every tensor once, in order, on its boundary, in shards of the size asked for."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given

from streammerge.checkpoint.header import StoredTensor, parse_header
from streammerge.dtypes import Dtype
from streammerge.plan.layout import Layout, ShardPlan, encode_index, lay_out
from streammerge.plan.ops import Change, CopyBytes, TensorPlan

DTYPES = [Dtype.U8, Dtype.BF16, Dtype.F16, Dtype.F32, Dtype.F64, Dtype.I64, Dtype.F8_E4M3]
LAYOUTS: list[Layout] = ["safetensors", "torch_bin"]


def tensor(
    number: int,
    dtype: Dtype = Dtype.BF16,
    shape: tuple[int, ...] = (4,),
    *,
    path: str = "x",
    change: Change = "copied",
) -> TensorPlan:
    name = f"t{number}"
    return TensorPlan(
        name, dtype, StoredTensor(name, dtype, shape, Path(path), 0), CopyBytes(), change
    )


SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)
TENSORS = st.lists(st.tuples(st.sampled_from(DTYPES), SHAPES), min_size=1, max_size=12).map(
    lambda items: [tensor(n, dtype, shape) for n, (dtype, shape) in enumerate(items)]
)


def names(shards: tuple[ShardPlan, ...]) -> list[list[str]]:
    return [[placed.tensor.name for placed in shard.tensors] for shard in shards]


@given(TENSORS, st.integers(1, 400), st.sampled_from(LAYOUTS))
def test_every_tensor_is_placed_once_and_no_shard_is_too_large(
    tensors: list[TensorPlan], limit: int, layout: Layout
) -> None:
    shards = lay_out(tensors, max_shard_bytes=limit, layout=layout)
    placed = [item for shard in shards for item in sorted(names((shard,))[0], key=_number)]
    assert placed == [t.name for t in tensors]
    for shard in shards:
        sizes = [p.tensor.nbytes for p in shard.tensors]
        assert shard.data_bytes == sum(sizes)
        assert shard.data_bytes <= limit or len([size for size in sizes if size]) == 1
        assert shard.file_bytes == len(shard.head) + shard.data_bytes


def _number(name: str) -> int:
    return int(name[1:])


@given(TENSORS, st.integers(1, 400))
def test_shards_are_filled_greedily(tensors: list[TensorPlan], limit: int) -> None:
    shards = lay_out(tensors, max_shard_bytes=limit, layout="safetensors")
    by_name = {t.name: t for t in tensors}
    for shard, following in itertools.pairwise(shards):
        first = min((p.tensor.name for p in following.tensors), key=_number)
        assert shard.data_bytes + by_name[first].nbytes > limit


@given(TENSORS, st.integers(1, 400), st.sampled_from(LAYOUTS))
def test_offsets_are_contiguous_and_aligned(
    tensors: list[TensorPlan], limit: int, layout: Layout
) -> None:
    for shard in lay_out(tensors, max_shard_bytes=limit, layout=layout):
        position = len(shard.head)
        assert position % 4096 == 0
        for placed in shard.tensors:
            assert placed.offsets[0] == position
            assert placed.offsets[0] % placed.tensor.dtype.item_bytes == 0
            position += placed.tensor.nbytes
        assert position == shard.file_bytes


@given(TENSORS, st.integers(1, 400))
def test_heads_say_where_the_tensors_are(tensors: list[TensorPlan], limit: int) -> None:
    for shard in lay_out(tensors, max_shard_bytes=limit, layout="safetensors"):
        found, metadata = parse_header(
            shard.head[8:], path=Path(shard.name), file_bytes=shard.file_bytes
        )
        assert metadata == {"format": "pt"}
        assert {(t.name, t.dtype, t.shape, t.offset) for t in found} == {
            (p.tensor.name, p.tensor.dtype, p.tensor.shape, p.offsets[0]) for p in shard.tensors
        }


@given(TENSORS, st.integers(1, 400), st.sampled_from(LAYOUTS))
def test_index_maps_every_tensor_and_counts_data_bytes(
    tensors: list[TensorPlan], limit: int, layout: Layout
) -> None:
    shards = lay_out(tensors, max_shard_bytes=limit, layout=layout)
    text = encode_index(shards)
    index = json.loads(text)
    assert text.endswith("}\n")
    assert index["metadata"] == {"total_size": sum(t.nbytes for t in tensors)}
    assert index["weight_map"] == {p.tensor.name: s.name for s in shards for p in s.tensors}
    assert len(index["weight_map"]) == len(tensors)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=5))
def test_keep_reproduces_the_division_of_the_base(sizes: list[int]) -> None:
    tensors = [
        tensor(10 * shard + n, path=f"shard{shard}")
        for shard, count in enumerate(sizes)
        for n in range(count)
    ]
    tensors.append(tensor(999, path="adapter", change="added"))
    expected = [[f"t{10 * s + n}" for n in range(count)] for s, count in enumerate(sizes)]
    expected[-1].append("t999")
    assert names(lay_out(tensors, max_shard_bytes=None, layout="safetensors")) == expected


def test_keep_leaves_a_replaced_tensor_with_its_neighbours() -> None:
    tensors = [
        tensor(0, path="one"),
        tensor(1, path="adapter", change="replaced"),
        tensor(2, path="one"),
        tensor(3, path="two"),
    ]
    shards = lay_out(tensors, max_shard_bytes=None, layout="safetensors")
    assert names(shards) == [["t0", "t1", "t2"], ["t3"]]


def test_keep_takes_a_replaced_first_tensor_into_the_first_shard() -> None:
    tensors = [tensor(0, path="adapter", change="replaced"), tensor(1, path="one")]
    assert names(lay_out(tensors, max_shard_bytes=None, layout="safetensors")) == [["t0", "t1"]]


@pytest.mark.parametrize(
    ("layout", "count", "expected"),
    [
        ("safetensors", 1, ["model.safetensors"]),
        (
            "safetensors",
            2,
            ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
        ),
        ("torch_bin", 1, ["pytorch_model.bin"]),
        (
            "torch_bin",
            2,
            ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"],
        ),
    ],
)
def test_shard_names(layout: Layout, count: int, expected: list[str]) -> None:
    shards = lay_out([tensor(n) for n in range(count)], max_shard_bytes=8, layout=layout)
    assert [shard.name for shard in shards] == expected


def test_wider_items_go_first_only_where_one_would_be_misaligned() -> None:
    odd = [tensor(0, Dtype.U8, (3,)), tensor(1, Dtype.F32, (2,)), tensor(2, Dtype.BF16, (1,))]
    even = [tensor(0, Dtype.BF16, (2,)), tensor(1, Dtype.F32, (2,))]
    assert names(lay_out(odd, max_shard_bytes=99, layout="safetensors")) == [["t1", "t2", "t0"]]
    assert names(lay_out(even, max_shard_bytes=99, layout="safetensors")) == [["t0", "t1"]]


def test_no_tensor_no_shard() -> None:
    assert lay_out([], max_shard_bytes=None, layout="safetensors") == ()
    assert lay_out([], max_shard_bytes=1, layout="safetensors") == ()
