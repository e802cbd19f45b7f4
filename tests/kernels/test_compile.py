"""Kernels compiled for GPUs that are not there: what the machine code must and must not have."""

from __future__ import annotations

import random

import pytest
from aot import SHARED_MEMORY, TARGETS, MachineCode, compile_for
from compiled import BUILDS, Build

from streammerge_kernels.tile import TileConfig

pytestmark = pytest.mark.usefixtures("compile_cache")

ALL = [(target, build) for build in BUILDS for target in TARGETS if build.applies_to(target)]
BY_NAME = {build.name: build for build in BUILDS}
# a pair for every target, so that all of them are compiled for in an ordinary run
SAMPLE = [
    random.Random(target).choice([pair for pair in ALL if pair[0] == target]) for target in TARGETS
]


def identify(value: object) -> str:
    return value.name if isinstance(value, Build) else str(value)


def compile_build(target: str, build: Build) -> MachineCode:
    return compile_for(target, build.kernel, build.types, build.constants)


def check(target: str, build: Build) -> None:
    code = compile_build(target, build)
    assert code.spills == code.stack_bytes == 0, code
    assert code.shared_bytes <= SHARED_MEMORY[target], code
    lanes = build.config.num_warps * TARGETS[target].warp_size
    tile = build.config.block_n * build.config.block_k
    if "tma" in build.name:
        assert code.bulk_copies >= 4, code
        assert code.loads == code.stores == 0, code
    else:
        assert code.wide_loads >= tile * build.dense_bytes // (16 * lanes), code
        check_stores(target, code, tile // lanes, build.stored_bytes)
    if build.factor_dtype != "fp32":
        assert code.tensor_core, code
        assert bool(code.wgmma) == (target == "sm_90"), code
        assert bool(code.tcgen05) == (target == "sm_100"), code


def check_stores(target: str, code: MachineCode, per_lane: int, element_bytes: int) -> None:
    """Check that a tile is stored by 128 bits, but for a scale beside it."""
    if not element_bytes:
        return
    if target.startswith("sm_"):
        assert code.wide_stores == max(1, per_lane * element_bytes // 16), code
        assert code.stores - code.wide_stores <= 1, code
    else:
        # results keep the layout of the matrix cores, in which a lane has two neighbours or four
        assert code.stores <= per_lane // 2 + 1, code


@pytest.mark.parametrize(("target", "build"), SAMPLE, ids=identify)
def test_a_sample_compiles_to_what_it_should(target: str, build: Build) -> None:
    check(target, build)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("build", BUILDS, ids=identify)
def test_every_configuration_compiles_to_what_it_should(target: str, build: Build) -> None:
    if not build.applies_to(target):
        pytest.skip("this kernel is for newer GPUs")
    check(target, build)


def test_unaligned_pointers_cost_every_wide_access() -> None:
    build = BY_NAME["merge bf16-bf16-bf16 rank 16"]
    aligned = compile_build("sm_90", build)
    code = compile_for("sm_90", build.kernel, build.types, build.constants, is_aligned=False)
    assert aligned.wide_loads == aligned.loads
    assert code.wide_loads == code.wide_stores == 0
    assert code.loads > 4 * aligned.loads


def test_a_tile_that_is_too_large_spills_and_is_seen_to() -> None:
    build = BY_NAME["merge bf16-bf16-bf16 rank 16"]
    large = TileConfig(block_n=128, block_k=256, block_r=16, num_warps=4, num_stages=3)
    constants = {**build.constants, **large.options()}
    assert compile_for("sm_80", build.kernel, build.types, constants).spills
