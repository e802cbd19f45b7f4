"""The launchers, on tensors without memory and a GPU that only notes what it is asked to do."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
from fake_driver import fake_gpu

from streammerge_kernels import (
    Nf4Weight,
    dora_merge_,
    dora_row_norm,
    fp8_lora_merge,
    fp8_lora_requantize,
    grouped_lora_merge_,
    lora_merge_,
    lora_merge_tma_,
    mxfp4_lora_merge,
    nf4_lora_merge,
)
from streammerge_kernels.checks import check_no_partial_overlap, pack_factors
from streammerge_kernels.merge import config_for
from streammerge_kernels.tile import TileConfig, choose_config

if TYPE_CHECKING:
    from collections.abc import Callable

BF16, FP32, U8, E4M3 = torch.bfloat16, torch.float32, torch.uint8, torch.float8_e4m3fn
pytestmark = pytest.mark.usefixtures("compile_cache")


def meta(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def terms(n: int, k: int, *ranks: int, dtype: torch.dtype = BF16) -> list[Any]:
    return [(meta(rank, k, dtype=dtype), meta(n, rank, dtype=dtype), 2.0) for rank in ranks]


def test_a_large_weight_is_one_launch_of_aligned_accesses() -> None:
    with fake_gpu("cuda", 90) as launches:
        weight = meta(8192, 28672)
        assert lora_merge_(weight, terms(8192, 28672, 16)) is weight
    (launch,) = launches
    assert launch.kernel == "merge_kernel"
    assert launch.grid == (8192 // 64 * 28672 // 128, 1, 1)
    strides = {"stride_w", "stride_a", "stride_b", "stride_out"}
    assert launch.divisible == {"weight", "a", "b", "out", "n", "k"} | strides
    assert launch.constants["scalings"] is None
    assert launch.constants["gain"] is None
    assert launch.constants["PRECISION"] == "ieee"


def test_rows_of_odd_length_are_not_taken_to_be_aligned() -> None:
    with fake_gpu("cuda", 90) as launches:
        lora_merge_(meta(64, 127), terms(64, 127, 16))
    assert launches[0].divisible == {"weight", "a", "b", "out", "n", "stride_b"}


def test_several_terms_become_one_with_a_scaling_for_every_block_of_ranks() -> None:
    config = TileConfig(block_n=64, block_k=64, block_r=16, num_warps=4, num_stages=2)
    a, b = torch.ones(20, 3), torch.ones(2, 20)
    factors = pack_factors([(a, b, 2.0), (a[:5], b[:, :5], -1.0)], (2, 3), 16, a.device)
    assert factors.rank == 48
    assert factors.scalings is not None
    assert factors.scalings.tolist() == [2.0, 2.0, -1.0]
    assert factors.a.sum(1).tolist() == [3.0] * 20 + [0.0] * 12 + [3.0] * 5 + [0.0] * 11
    assert factors.b.sum(0).tolist() == [2.0] * 20 + [0.0] * 12 + [2.0] * 5 + [0.0] * 11
    with fake_gpu("cuda", 90) as launches:
        lora_merge_(meta(64, 64), terms(64, 64, 20, 5), config=config)
    assert launches[0].constants["RANK"] == 48
    assert "scalings" in launches[0].divisible


def test_factors_of_two_dtypes_are_widened_to_one_that_holds_both() -> None:
    a, b = torch.ones(4, 3, dtype=torch.float16), torch.ones(2, 4, dtype=BF16)
    factors = pack_factors([(a, b, 1.0)], (2, 3), 16, a.device)
    assert factors.a.dtype == factors.b.dtype == FP32


@pytest.mark.parametrize(("rank", "block_r"), [(1, 16), (16, 16), (17, 32), (64, 64), (999, 64)])
def test_the_rank_chooses_the_configuration(rank: int, block_r: int) -> None:
    assert config_for(terms(8, 8, rank)).block_r == block_r


def test_a_table_serves_ranks_beyond_it_by_its_last_entry() -> None:
    small = TileConfig(block_n=16, block_k=16, block_r=16, num_warps=1, num_stages=1)
    large = TileConfig(block_n=32, block_k=32, block_r=32, num_warps=1, num_stages=1)
    assert choose_config({8: small, 32: large}, 8) is small
    assert choose_config({8: small, 32: large}, 9) is large
    assert choose_config({8: small, 32: large}, 33) is large


def dora() -> None:
    dora_merge_(meta(96, 9000), terms(96, 9000, 8), meta(96, dtype=FP32))


def grouped() -> None:
    shapes = [(96, 64)] * 5 + [(32, 128)] * 2
    grouped_lora_merge_([meta(*shape) for shape in shapes], [terms(*s, 8)[0] for s in shapes])


def nf4() -> None:
    weight = Nf4Weight(meta(96 * 32, 1, dtype=U8), meta(96, dtype=FP32))
    nf4_lora_merge(weight, terms(96, 64, 8), out=meta(96, 64))


def mxfp4() -> None:
    codes, exponents = meta(96, 32, dtype=U8), meta(96, 2, dtype=U8)
    mxfp4_lora_merge(codes, exponents, terms(96, 64, 8), out=meta(96, 64))


def fp8(*shape: int) -> Callable[[], object]:
    quantized, scale = meta(300, 256, dtype=E4M3), meta(*shape, dtype=FP32)
    return lambda: fp8_lora_merge(quantized, scale, terms(300, 256, 8), out=meta(300, 256))


def requantize(*shape: int) -> Callable[[], object]:
    quantized, scale = meta(300, 256, dtype=E4M3), meta(*shape, dtype=FP32)
    return lambda: fp8_lora_requantize(quantized, scale, terms(300, 256, 8))


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (dora, [("square_sum_kernel", (2, 3)), ("finish_kernel", (1, 1)),
                ("merge_kernel", (142, 1))]),
        (lambda: dora_row_norm(meta(96, 64), terms(96, 64, 8)),
         [("square_sum_kernel", (2, 1)), ("finish_kernel", (1, 1))]),
        (grouped, [("grouped_merge_kernel", (12, 1))]),
        (nf4, [("nf4_merge_kernel", (2, 1))]),
        (mxfp4, [("mxfp4_merge_kernel", (2, 1))]),
        (fp8(1), [("fp8_merge_kernel", (10, 1))]),
        (fp8(300, 1), [("fp8_merge_kernel", (10, 1))]),
        (fp8(3, 2), [("fp8_merge_kernel", (10, 1))]),
        (requantize(300, 1), [("fp8_maximum_kernel", (10, 1)), ("fp8_merge_kernel", (10, 1))]),
        (requantize(3, 2), [("fp8_merge_kernel", (6, 1))]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("gpu", [("cuda", 90), ("hip", "gfx942")], ids=str)
def test_every_operation_compiles_and_covers_its_tiles(
    gpu: tuple[str, Any], call: Callable[[], object], expected: list[tuple[str, tuple[int, int]]]
) -> None:
    with fake_gpu(*gpu) as launches:
        call()
    assert [(launch.kernel, launch.grid[:2]) for launch in launches] == expected


def test_tma_is_launched_with_descriptors() -> None:
    with fake_gpu("cuda", 90) as launches:
        lora_merge_tma_(meta(96, 256), terms(96, 256, 8))
    assert [(launch.kernel, launch.grid) for launch in launches] == [
        ("merge_tma_kernel", (4, 1, 1))
    ]


def test_nothing_is_launched_for_a_weight_without_elements() -> None:
    with fake_gpu("cuda", 90) as launches:
        lora_merge_(meta(0, 64), terms(0, 64, 8))
        lora_merge_(meta(64, 0), terms(64, 0, 8))
        lora_merge_tma_(meta(64, 0), terms(64, 0, 8))
        grouped_lora_merge_([], [])
        grouped_lora_merge_([meta(0, 64)], terms(0, 64, 8))
        nf4_lora_merge(
            Nf4Weight(meta(0, dtype=U8), meta(0, dtype=FP32)), terms(0, 8, 8), out=meta(0, 8)
        )
        fp8_lora_requantize(meta(0, 8, dtype=E4M3), meta(1, dtype=FP32), terms(0, 8, 8))
    assert launches == []


def merge_with(**changed: Any) -> Callable[[], object]:
    arguments = {"weight": meta(32, 64), "terms": terms(32, 64, 8), **changed}
    return lambda: lora_merge_(arguments.pop("weight"), arguments.pop("terms"), **arguments)


def one_term(a: torch.Tensor, b: torch.Tensor) -> Callable[[], object]:
    return merge_with(terms=[(a, b, 1.0)])


GOOD = meta(8, 64), meta(32, 8)
REFUSED: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "no term": (merge_with(terms=[]), ValueError, "terms: expected at least one"),
    "no rank": (one_term(meta(0, 64), meta(32, 0)), ValueError, r"terms\[0\]: expected A"),
    "a weight of one dimension": (
        merge_with(weight=meta(32)), ValueError, r"expected shape \(N, K\)"),
    "a weight of another dtype": (
        merge_with(weight=meta(32, 64, dtype=torch.float64)), TypeError, "weight: expected one of"),
    "columns apart": (
        merge_with(weight=meta(64, 32).t()), ValueError, "expected stride 1 in the last"),
    "rows on each other": (
        merge_with(weight=meta(64).expand(32, 64)), ValueError, "rows that do not overlap"),
    "A of another K": (one_term(meta(8, 63), GOOD[1]), ValueError, r"A: expected shape \(8, 64\)"),
    "B of another R": (one_term(GOOD[0], meta(32, 9)), ValueError, r"B: expected shape \(32, 8\)"),
    "B transposed": (one_term(GOOD[0], meta(8, 32).t()), ValueError, "B: expected stride 1"),
    "a factor of whole numbers": (
        one_term(GOOD[0], meta(32, 8, dtype=torch.int32)), TypeError, "B: expected one of"),
    "a factor elsewhere": (
        one_term(torch.empty(8, 64, dtype=BF16), GOOD[1]), ValueError, "A: expected device meta"),
    "out of another shape": (
        merge_with(out=meta(32, 63)), ValueError, r"out: expected shape \(32, 64\)"),
    "a gain of another dtype": (
        merge_with(row_gain=meta(32)), TypeError, "row_gain: expected one of"),
    "a gain of another length": (
        merge_with(row_gain=meta(31, dtype=FP32)), ValueError, r"row_gain: expected shape \(32,\)"),
    "tensors on the CPU": (
        lambda: lora_merge_(torch.zeros(2, 2), [(torch.zeros(1, 2), torch.zeros(2, 1), 1.0)]),
        ValueError, "expected a tensor on a GPU"),
    "a magnitude of another length": (
        lambda: dora_merge_(meta(32, 64), terms(32, 64, 8), meta(31)),
        ValueError, "magnitude: expected shape"),
    "fewer terms than weights": (
        lambda: grouped_lora_merge_([meta(4, 4)] * 2, terms(4, 4, 8)),
        ValueError, "got 2, 1 and 2"),
    "ranks that differ in a group": (
        lambda: grouped_lora_merge_([meta(4, 4)] * 2, terms(4, 4, 8, 9)), ValueError,
        r"terms\[1\]: A: expected shape \(8, 4\)"),
    "dtypes that differ in a group": (
        lambda: grouped_lora_merge_([meta(4, 4), meta(4, 4, dtype=FP32)], terms(4, 4, 8, 8)),
        TypeError, r"weights\[1\]: expected one of torch.bfloat16"),
    "rows apart in a group": (
        lambda: grouped_lora_merge_([meta(4, 8)[:, :4]], terms(4, 4, 8)), ValueError, "contiguous"),
    "an odd K in NF4": (
        lambda: nf4_lora_merge(
            Nf4Weight(meta(6, dtype=U8), meta(1, dtype=FP32)), terms(4, 3, 8), out=meta(4, 3)),
        ValueError, "an even K"),
    "too few codes of NF4": (
        lambda: nf4_lora_merge(
            Nf4Weight(meta(7, dtype=U8), meta(1, dtype=FP32)), terms(4, 4, 8), out=meta(4, 4)),
        ValueError, "expected 8 contiguous bytes"),
    "too few blocks of NF4": (
        lambda: nf4_lora_merge(
            Nf4Weight(meta(128, dtype=U8), meta(3, dtype=FP32)), terms(4, 64, 8), out=meta(4, 64)),
        ValueError, r"absmax: expected shape \(4,\)"),
    "a block size that is no power of two": (
        lambda: nf4_lora_merge(
            Nf4Weight(meta(8, dtype=U8), meta(1, dtype=FP32), 48), terms(4, 4, 8), out=meta(4, 4)),
        ValueError, "a power of two from 32"),
    "a K of MXFP4 with half a block": (
        lambda: mxfp4_lora_merge(
            meta(4, 24, dtype=U8), meta(4, 2, dtype=U8), terms(4, 48, 8), out=meta(4, 48)),
        ValueError, "K a multiple of 32"),
    "too few exponents of MXFP4": (
        lambda: mxfp4_lora_merge(
            meta(4, 32, dtype=U8), meta(4, 1, dtype=U8), terms(4, 64, 8), out=meta(4, 64)),
        ValueError, r"exponents: expected shape \(4, 2\)"),
    "FP8 scales of another shape": (fp8(3, 3), ValueError, r"scale: expected .* got \(3, 3\)"),
    "FP8 tiles larger than a block": (
        lambda: fp8_lora_merge(
            meta(4, 4, dtype=E4M3), meta(1, dtype=FP32), terms(4, 4, 8), out=meta(4, 4),
            config=TileConfig(block_n=256, block_k=64, block_r=16, num_warps=4, num_stages=2)),
        ValueError, "tiles of at most 128 x 128"),
    "e5m2": (
        lambda: fp8_lora_requantize(
            meta(4, 4, dtype=torch.float8_e5m2), meta(1, dtype=FP32), terms(4, 4, 8)),
        TypeError, "quantized: expected one of torch.float8_e4m3fn"),
    "rows that TMA cannot address": (
        lambda: lora_merge_tma_(meta(32, 60), terms(32, 60, 8)), ValueError, "120 bytes from row"),
    "a rank that TMA cannot address": (
        lambda: lora_merge_tma_(meta(32, 64), terms(32, 64, 12)), ValueError, "B: expected poi"),
}  # fmt: skip


@pytest.mark.parametrize("fault", REFUSED)
def test_what_does_not_fit_is_refused_before_a_launch(fault: str) -> None:
    call, error, message = REFUSED[fault]
    with fake_gpu("cuda", 90) as launches, pytest.raises(error, match=message):
        call()
    assert launches == []


def test_an_out_that_is_partly_the_weight_is_refused() -> None:
    whole = torch.zeros(40, 64)
    check_no_partial_overlap(whole[:32], whole[:32])
    check_no_partial_overlap(whole[:20], whole[20:])
    for out in (whole[4:36], whole[:32].view(torch.int32), whole.view(-1)[1 : 32 * 64 + 1]):
        with pytest.raises(ValueError, match="memory that both share"):
            check_no_partial_overlap(out, whole[:32])


def test_importing_every_operation_asks_for_no_device() -> None:
    program = (
        "import streammerge_kernels as kernels, triton\n"
        "for name in kernels.__all__:\n"
        "    getattr(kernels, name)\n"
        "assert triton.runtime.driver._active is None\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True)
