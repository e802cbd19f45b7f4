"""Buffers fit the ceiling."""

from __future__ import annotations

import re
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given

from streammerge.checkpoint.header import StoredTensor
from streammerge.dtypes import Dtype
from streammerge.errors import MemoryBudgetError
from streammerge.plan.layout import lay_out
from streammerge.plan.memory import (
    BASELINE_BYTES,
    FACTOR_SLOTS,
    MARGIN_BYTES,
    MIN_SLAB_BYTES,
    MIN_SLAB_COUNT,
    SCRATCH_BUFFERS,
    SCRATCH_BYTES,
    SLAB_BYTES,
    SLAB_COUNT,
    TENSOR_RECORD_BYTES,
    plan_memory,
)
from streammerge.plan.ops import ApplyTerms, BiasTerm, CopyBytes, LoraTerm, TensorPlan
from streammerge.plan.tiles import cut_shard

HUGE = 10**13


def stored(name: str, dtype: Dtype, *shape: int) -> StoredTensor:
    return StoredTensor(name, dtype, shape, Path("x"), 0)


def copied(*shape: int, dtype: Dtype = Dtype.BF16) -> TensorPlan:
    return TensorPlan("copy", dtype, stored("copy", dtype, *shape), CopyBytes(), "copied")


def merged(
    rows: int, columns: int, rank: int, *, work: Dtype = Dtype.BF16, out: Dtype | None = None
) -> TensorPlan:
    term = LoraTerm(
        stored("a", Dtype.F32, rank, columns),
        stored("b", Dtype.F16, rows, rank),
        1.0,
        is_transposed=False,
        rounds_delta=False,
    )
    source = stored("w", work, rows, columns)
    return TensorPlan("w", out or work, source, ApplyTerms(work, (term,)), "merged")


TARGETS = st.builds(
    merged,
    st.integers(1, 300_000),
    st.integers(1, 20_000),
    st.integers(1, 512),
    work=st.sampled_from([Dtype.BF16, Dtype.F16, Dtype.F32, Dtype.F64]),
    out=st.sampled_from([None, Dtype.BF16, Dtype.F32]),
)
PLANS = st.lists(st.one_of(TARGETS, st.builds(copied, st.integers(0, 10**9))), max_size=5)


def test_copies_alone_need_the_smallest_buffers() -> None:
    plan = plan_memory([copied(10**6)] * 3, max_memory=HUGE)
    assert (plan.slab_bytes, plan.slab_count) == (SLAB_BYTES, SLAB_COUNT)
    assert plan.scratch_bytes == plan.factor_bytes == 0
    fixed = BASELINE_BYTES + MARGIN_BYTES + 3 * TENSOR_RECORD_BYTES
    assert plan.predicted_peak_bytes == fixed + SLAB_BYTES * (SLAB_COUNT + 1)
    assert plan.least_bytes == fixed + MIN_SLAB_BYTES * (MIN_SLAB_COUNT + 1)


def test_a_target_is_counted_to_the_byte() -> None:
    plan = plan_memory([merged(100, 50_000, 8)], max_memory=HUGE, baseline=1000)
    factors = 8 * 50_000 * (4 + 4) + 8 * 100 * (2 + 4)
    slab = 8 * 50_000 * 2 + -(8 * 50_000 * 2) % 4096
    assert plan.factor_bytes == factors
    assert plan.scratch_bytes == max(SCRATCH_BYTES, 8 * 50_000 * 4)
    assert plan.least_bytes == (
        1000
        + MARGIN_BYTES
        + 3 * TENSOR_RECORD_BYTES
        + slab * (MIN_SLAB_COUNT + 1)
        + SCRATCH_BUFFERS * plan.scratch_bytes
        + FACTOR_SLOTS * factors
    )


def test_fp64_targets_compute_in_eight_bytes() -> None:
    wide = plan_memory([merged(100, 50_000, 8, work=Dtype.F64)], max_memory=HUGE)
    assert wide.scratch_bytes == 8 * 50_000 * 8
    assert wide.factor_bytes == 8 * 50_000 * (4 + 8) + 8 * 100 * (2 + 8)


def test_a_scalar_and_a_bias_are_targets_too() -> None:
    scalar = TensorPlan("s", Dtype.BF16, stored("s", Dtype.F32), ApplyTerms(Dtype.F32, ()), "cast")
    bias = TensorPlan(
        "b",
        Dtype.BF16,
        stored("b", Dtype.BF16, 64),
        ApplyTerms(Dtype.BF16, (BiasTerm(stored("v", Dtype.F32, 64), 1.0),)),
        "merged",
    )
    plan = plan_memory([scalar, bias], max_memory=HUGE)
    assert plan.scratch_bytes == SCRATCH_BYTES
    assert plan.factor_bytes == 64 * (4 + 4)


def test_records_grow_with_the_number_of_tensors() -> None:
    few, many = (plan_memory([copied(1)] * n, max_memory=HUGE) for n in (10, 1010))
    assert many.least_bytes - few.least_bytes == 1000 * TENSOR_RECORD_BYTES


@given(PLANS, st.floats(0, 1))
def test_prediction_never_exceeds_a_possible_ceiling(
    tensors: list[TensorPlan], share: float
) -> None:
    most = plan_memory(tensors, max_memory=HUGE)
    budget = most.least_bytes + int(share * (most.predicted_peak_bytes - most.least_bytes))
    plan = plan_memory(tensors, max_memory=budget)
    assert plan.predicted_peak_bytes <= budget
    assert plan.least_bytes == most.least_bytes
    assert plan.slab_count >= MIN_SLAB_COUNT


@given(PLANS, st.integers(0, 2 * 10**9), st.integers(0, 2 * 10**9))
def test_more_memory_never_gives_smaller_buffers(
    tensors: list[TensorPlan], one: int, other: int
) -> None:
    least = plan_memory(tensors, max_memory=HUGE).least_bytes
    low, high = (plan_memory(tensors, max_memory=least + n) for n in sorted((one, other)))
    assert low.predicted_peak_bytes <= high.predicted_peak_bytes
    assert low.slab_bytes <= high.slab_bytes
    assert low.slab_count <= high.slab_count
    assert low.scratch_bytes == high.scratch_bytes


@given(PLANS)
def test_least_bytes_is_the_edge(tensors: list[TensorPlan]) -> None:
    least = plan_memory(tensors, max_memory=HUGE).least_bytes
    assert plan_memory(tensors, max_memory=least).predicted_peak_bytes == least
    with pytest.raises(MemoryBudgetError):
        plan_memory(tensors, max_memory=least - 1)


@given(PLANS, st.integers(1, 10**8))
def test_the_error_names_a_ceiling_that_works(tensors: list[TensorPlan], budget: int) -> None:
    with pytest.raises(MemoryBudgetError) as caught:
        plan_memory(tensors, max_memory=budget)
    number = re.fullmatch(r"at least (\d+)MB", str(caught.value.expected))
    assert number is not None
    named = int(number[1]) * 10**6
    assert plan_memory(tensors, max_memory=named).predicted_peak_bytes <= named
    assert caught.value.hint == f"set max_memory: {number[1]}MB or more"
    with pytest.raises(MemoryBudgetError):
        plan_memory(tensors, max_memory=named - 10**6)


@given(PLANS)
def test_every_tile_fits_the_least_slab(tensors: list[TensorPlan]) -> None:
    least = plan_memory(tensors, max_memory=HUGE).least_bytes
    plan = plan_memory(tensors, max_memory=least)
    targets = [t for t in tensors if isinstance(t.op, ApplyTerms) and t.nbytes < 10**9]
    for shard in lay_out(targets, max_shard_bytes=1, layout="torch_bin"):
        for number, tile in enumerate(cut_shard(shard, slab_bytes=plan.slab_bytes)):
            if number > 20:
                break
            assert tile.nbytes <= plan.slab_bytes


def test_a_huge_embedding_fits_a_small_ceiling() -> None:
    embedding = merged(256_000, 16_384, 8, work=Dtype.F32)
    plan = plan_memory([embedding], max_memory=400 * 10**6)
    assert embedding.nbytes > 16 * 10**9
    assert plan.predicted_peak_bytes <= 400 * 10**6
    (shard,) = lay_out([embedding], max_shard_bytes=None, layout="safetensors")
    assert max(tile.nbytes for tile in cut_shard(shard, slab_bytes=plan.slab_bytes)) <= (
        plan.slab_bytes
    )
