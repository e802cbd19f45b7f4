"""Buffers fit the ceiling."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import islice
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given

from streammerge.checkpoint.header import StoredTensor
from streammerge.config.tuning import KIB, MIB, ComputeTuning
from streammerge.dtypes import Dtype
from streammerge.errors import MemoryBudgetError
from streammerge.plan.layout import lay_out
from streammerge.plan.memory import (
    BASELINE_BYTES,
    FACTOR_BYTES,
    MARGIN_BYTES,
    MIN_SLAB_BYTES,
    MIN_SLAB_COUNT,
    SCRATCH_BUFFERS,
    SPARE_SLABS,
    TENSOR_RECORD_BYTES,
    RunShape,
    plan_memory,
)
from streammerge.plan.ops import ApplyTerms, BiasTerm, CopyBytes, LoraTerm, TensorPlan
from streammerge.plan.tiles import Block, cut_shard, factor_bytes

HUGE = 10**13
# the defaults are what was measured last
SHAPE = RunShape(compute=ComputeTuning(((1 << 30, KIB << 9),)))


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
SHAPES = st.builds(
    RunShape,
    workers=st.integers(1, 40),
    readers=st.integers(1, 16),
    writers=st.integers(1, 16),
    block_bytes=st.sampled_from([64 * KIB, MIB, 3 * MIB, 8 * MIB, 64 * MIB]),
    compute=st.sampled_from([ComputeTuning(), ComputeTuning(((1 << 30, 64 * KIB),))]),
)
PLANS = st.lists(st.one_of(TARGETS, st.builds(copied, st.integers(0, 10**9))), max_size=5)


def test_copies_alone_need_the_smallest_buffers() -> None:
    shape = RunShape(readers=3, writers=4, block_bytes=5 * MIB)
    plan = plan_memory([copied(10**6)] * 3, max_memory=HUGE, shape=shape)
    count = 1 + 3 + 4 + SPARE_SLABS
    assert (plan.slab_bytes, plan.slab_count, plan.workers) == (5 * MIB, count, 1)
    assert plan.scratch_bytes == plan.factor_bytes == 0
    fixed = BASELINE_BYTES + MARGIN_BYTES + 3 * TENSOR_RECORD_BYTES
    assert plan.predicted_peak_bytes == fixed + 5 * MIB * (count + 1)
    assert plan.least_bytes == fixed + MIN_SLAB_BYTES * (MIN_SLAB_COUNT + 1)


def test_a_target_is_counted_to_the_byte() -> None:
    shape = replace(SHAPE, workers=3)
    plan = plan_memory([merged(100, 50_000, 8)], max_memory=HUGE, baseline=1000, shape=shape)
    # as stored, and in the widest compute dtype
    factors = 8 * 50_000 * (4 + 8) + 8 * 100 * (2 + 8)
    slab = 8 * 50_000 * 2 + -(8 * 50_000 * 2) % 4096
    assert plan.factor_bytes == max(2 * factors, FACTOR_BYTES)
    assert plan.scratch_bytes == max(KIB << 9, 8 * 50_000 * 4)
    assert plan.workers == 3
    fixed = 1000 + MARGIN_BYTES + 3 * TENSOR_RECORD_BYTES
    assert plan.predicted_peak_bytes == (
        fixed
        + shape.block_bytes * (shape.slab_count + 1)
        + 3 * SCRATCH_BUFFERS * plan.scratch_bytes
        + plan.factor_bytes
    )
    assert plan.least_bytes == (
        fixed + slab * (MIN_SLAB_COUNT + 1) + SCRATCH_BUFFERS * 8 * 50_000 * 4 + 2 * factors
    )


def test_fp64_targets_compute_in_eight_bytes() -> None:
    wide = plan_memory([merged(100, 50_000, 8, work=Dtype.F64)], max_memory=HUGE, shape=SHAPE)
    assert wide.scratch_bytes == 8 * 50_000 * 8
    narrow = plan_memory([merged(100, 50_000, 8, work=Dtype.F32)], max_memory=HUGE, shape=SHAPE)
    assert narrow.scratch_bytes == 8 * 50_000 * 4


def test_scratch_is_what_the_tuning_says_for_the_highest_rank() -> None:
    compute = ComputeTuning(((8, 3 * MIB), (64, 5 * MIB), (1 << 30, 7 * MIB)))
    for rank, expected in ((1, 3), (8, 3), (9, 5), (64, 5), (65, 7), (1000, 7)):
        plan = plan_memory(
            [merged(100, 10, 1), merged(100, 10, rank)],
            max_memory=HUGE,
            shape=RunShape(compute=compute),
        )
        assert plan.scratch_bytes == expected * MIB


def test_a_scalar_and_a_bias_are_targets_too() -> None:
    scalar = TensorPlan("s", Dtype.BF16, stored("s", Dtype.F32), ApplyTerms(Dtype.F32, ()), "cast")
    bias = TensorPlan(
        "b",
        Dtype.BF16,
        stored("b", Dtype.BF16, 64),
        ApplyTerms(Dtype.BF16, (BiasTerm(stored("v", Dtype.F32, 64), 1.0),)),
        "merged",
    )
    plan = plan_memory([scalar, bias], max_memory=HUGE, shape=SHAPE)
    assert plan.scratch_bytes == KIB << 9
    assert plan.factor_bytes == FACTOR_BYTES
    least = plan_memory([scalar, bias], max_memory=plan.least_bytes)
    assert least.factor_bytes == 2 * 64 * (4 + 8)
    assert least.scratch_bytes == 8 * 4


def test_records_grow_with_the_number_of_tensors() -> None:
    few, many = (plan_memory([copied(1)] * n, max_memory=HUGE) for n in (10, 1010))
    assert many.least_bytes - few.least_bytes == 1000 * TENSOR_RECORD_BYTES


@given(PLANS, SHAPES, st.floats(0, 1))
def test_prediction_never_exceeds_a_possible_ceiling(
    tensors: list[TensorPlan], shape: RunShape, share: float
) -> None:
    most = plan_memory(tensors, max_memory=HUGE, shape=shape)
    budget = most.least_bytes + int(share * (most.predicted_peak_bytes - most.least_bytes))
    plan = plan_memory(tensors, max_memory=budget, shape=shape)
    assert plan.predicted_peak_bytes <= budget
    assert plan.least_bytes == most.least_bytes
    assert plan.slab_count >= MIN_SLAB_COUNT
    assert 1 <= plan.workers <= shape.workers
    assert plan.predicted_peak_bytes == (
        BASELINE_BYTES
        + MARGIN_BYTES
        + TENSOR_RECORD_BYTES * sum(1 + len(t.terms) * 2 for t in tensors)
        + plan.slab_bytes * (plan.slab_count + 1)
        + plan.workers * SCRATCH_BUFFERS * plan.scratch_bytes
        + plan.factor_bytes
    )


@given(PLANS, SHAPES, st.integers(0, 2 * 10**9), st.integers(0, 2 * 10**9))
def test_more_memory_never_gives_smaller_buffers(
    tensors: list[TensorPlan], shape: RunShape, one: int, other: int
) -> None:
    least = plan_memory(tensors, max_memory=HUGE, shape=shape).least_bytes
    low, high = (
        plan_memory(tensors, max_memory=least + n, shape=shape) for n in sorted((one, other))
    )
    assert low.predicted_peak_bytes <= high.predicted_peak_bytes
    assert low.slab_bytes <= high.slab_bytes
    assert low.slab_count <= high.slab_count
    assert low.scratch_bytes <= high.scratch_bytes
    assert low.factor_bytes <= high.factor_bytes
    assert low.workers <= high.workers


@given(PLANS, SHAPES)
def test_least_bytes_is_the_edge(tensors: list[TensorPlan], shape: RunShape) -> None:
    least = plan_memory(tensors, max_memory=HUGE, shape=shape).least_bytes
    plan = plan_memory(tensors, max_memory=least, shape=shape)
    assert plan.predicted_peak_bytes == least
    assert (plan.workers, plan.slab_count) == (1, MIN_SLAB_COUNT)
    with pytest.raises(MemoryBudgetError):
        plan_memory(tensors, max_memory=least - 1, shape=shape)


def test_what_a_run_would_like_does_not_raise_the_least() -> None:
    tensors = [merged(5000, 1000, 8), copied(10**6)]
    small, large = (
        plan_memory(tensors, max_memory=HUGE, shape=shape)
        for shape in (RunShape(), RunShape(64, 16, 16, 64 * MIB))
    )
    assert small.least_bytes == large.least_bytes
    assert small.predicted_peak_bytes < large.predicted_peak_bytes


def test_a_plan_that_the_baseline_holds_is_not_counted_twice() -> None:
    tensors = [copied(1)] * 1000
    with_plan = plan_memory(tensors, max_memory=HUGE, baseline_holds_plan=True)
    without = plan_memory(tensors, max_memory=HUGE)
    assert without.least_bytes - with_plan.least_bytes == 1000 * TENSOR_RECORD_BYTES


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
def test_every_block_fits_the_least_slab(tensors: list[TensorPlan]) -> None:
    least = plan_memory(tensors, max_memory=HUGE).least_bytes
    plan = plan_memory(tensors, max_memory=least)
    targets = [t for t in tensors if isinstance(t.op, ApplyTerms) and t.nbytes < 10**9]
    for shard in lay_out(targets, max_shard_bytes=1, layout="torch_bin"):
        blocks = cut_shard(
            shard, slab_bytes=plan.slab_bytes, max_factor_bytes=plan.factor_bytes // 2
        )
        for block in islice(blocks, 20):
            assert_fits(block, plan.slab_bytes)
            # no target needs more than its half
            assert all(2 * factor_bytes(t.target) <= plan.factor_bytes for t in block.tiles)


def assert_fits(block: Block, slab_bytes: int) -> None:
    assert block.nbytes <= slab_bytes
    assert all(segment.at + segment.nbytes <= slab_bytes for segment in block.segments)


def test_a_huge_embedding_fits_a_small_ceiling() -> None:
    embedding = merged(256_000, 16_384, 8, work=Dtype.F32)
    plan = plan_memory([embedding], max_memory=400 * 10**6)
    assert embedding.nbytes > 16 * 10**9
    assert plan.predicted_peak_bytes <= 400 * 10**6
    (shard,) = lay_out([embedding], max_shard_bytes=None, layout="safetensors")
    for block in cut_shard(
        shard, slab_bytes=plan.slab_bytes, max_factor_bytes=plan.factor_bytes // 2
    ):
        assert_fits(block, plan.slab_bytes)
