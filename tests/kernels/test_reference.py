"""The reference against exact arithmetic."""

from __future__ import annotations

import math
import subprocess
import sys
from fractions import Fraction
from statistics import NormalDist

import numpy as np
import pytest
import torch

import streammerge_kernels
from streammerge_kernels.reference import (
    NF4_VALUES,
    dora_merge,
    dora_row_norm,
    fp8_decode,
    lora_merge,
    mxfp4_decode,
    nf4_decode,
    round_once,
)

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
BITS = {torch.bfloat16: 8, torch.float16: 11}
LEAST = {torch.bfloat16: -133, torch.float16: -24}


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def nearest(value: float, dtype: torch.dtype) -> float:
    """Round to nearest, ties to even, in whole-number arithmetic."""
    if value == 0:
        return value
    exponent = max(math.frexp(value)[1] - BITS[dtype], LEAST[dtype])
    rounded = round(Fraction(value) / Fraction(2) ** exponent)
    return float(rounded * Fraction(2) ** exponent)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_round_once_is_exact(dtype: torch.dtype) -> None:
    step = 2.0 ** -(BITS[dtype] - 1)
    ties = [1 + step * (n + 0.5) for n in range(4)]
    near = [tie * (1 + sign * 2.0**-e) for tie in ties for sign in (1, -1) for e in (25, 30, 50)]
    tiny = 2.0 ** LEAST[dtype]
    small = [tiny * (n + 0.5) * (1 + sign * 2.0**-40) for n in range(3) for sign in (0, 1, -1)]
    values = [*ties, *near, *small, *randn(500).tolist()]
    values += [-value for value in values]
    got = round_once(torch.tensor(values, dtype=torch.float64), dtype)
    assert got.dtype == dtype
    assert got.double().tolist() == [nearest(value, dtype) for value in values]


def test_round_once_differs_from_two_roundings_just_above_a_tie() -> None:
    value = torch.tensor([1 + 2.0**-8 + 2.0**-40], dtype=torch.float64)
    assert value.float().bfloat16().item() == 1.0
    assert round_once(value, torch.bfloat16).item() == 1 + 2.0**-7


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_round_once_keeps_special_values(dtype: torch.dtype) -> None:
    values = torch.tensor([math.inf, -math.inf, math.nan, 0.0, -0.0], dtype=torch.float64)
    got = round_once(values, dtype).double()
    assert got[:2].tolist() == [math.inf, -math.inf]
    assert math.isnan(got[2])
    assert [math.copysign(1, value) for value in got[3:].tolist()] == [1, -1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_round_once_of_wide_dtypes_is_one_cast(dtype: torch.dtype) -> None:
    assert torch.equal(round_once(randn(99), dtype), randn(99).to(dtype))


def test_overflow_becomes_inf() -> None:
    values = torch.tensor([65519.99, 65520.0, -1e300, 1e300], dtype=torch.float64)
    assert round_once(values, torch.float16).tolist() == [65504.0, math.inf, -math.inf, math.inf]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 3, 2), (8, 16, 4)])
def test_lora_merge_is_the_sum(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    n, k, r = shape
    weight = randn(n, k).to(dtype)
    terms = [(randn(r, k, seed=s), randn(n, r, seed=s + 9), 0.5 * s) for s in (1, 2)]
    total = weight.double().numpy()
    size = np.abs(total)
    for a, b, scaling in terms:
        total = total + scaling * np.einsum("nr,rk->nk", b.numpy(), a.numpy())
        size = size + scaling * (np.abs(b.numpy()) @ np.abs(a.numpy()))
    got = lora_merge(weight, terms, torch.float64).numpy()
    assert np.all(np.abs(got - total) <= (r + 3) * 2 * 2.0**-52 * size)
    again = lora_merge(weight, terms, dtype)
    assert again.dtype == dtype
    assert torch.equal(again, round_once(torch.from_numpy(got), dtype))


def test_small_whole_numbers_merge_exactly() -> None:
    weight = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).bfloat16()
    a, b = torch.tensor([[1.0, -1.0]]), torch.tensor([[2.0], [3.0]])
    assert lora_merge(weight, [(a, b, 0.5)], torch.bfloat16).tolist() == [[2, 1], [4.5, 2.5]]
    assert weight.tolist() == [[1, 2], [3, 4]]


def test_no_term_is_a_cast() -> None:
    assert torch.equal(lora_merge(randn(3, 3), [], torch.float32), randn(3, 3).float())


def test_row_norms() -> None:
    weight = torch.tensor([[3.0, 0.0], [0.0, 0.0]])
    a, b = torch.tensor([[0.0, 2.0]]), torch.tensor([[1.0], [0.0]])
    assert dora_row_norm(weight, a, b, 2.0).tolist() == [5.0, 0.0]


def test_dora_gives_rows_their_magnitudes() -> None:
    weight, a, b = randn(6, 9).float(), randn(2, 9, seed=1), randn(6, 2, seed=2)
    magnitude = randn(6, seed=3).abs()
    adapted = weight.double().numpy() + 0.7 * (b.numpy() @ a.numpy())
    norms = np.array([math.sqrt(math.fsum(v * v for v in row)) for row in adapted])
    got = dora_merge(weight, a, b, magnitude, 0.7, torch.float64).numpy()
    expected = (magnitude.numpy() / norms)[:, None] * adapted
    np.testing.assert_allclose(got, expected, rtol=1e-13, atol=1e-14)
    np.testing.assert_allclose(dora_row_norm(weight, a, b, 0.7).numpy(), norms, rtol=1e-14, atol=0)
    narrow = dora_merge(weight, a, b, magnitude, 0.7, torch.bfloat16)
    assert torch.equal(narrow, round_once(torch.from_numpy(got), torch.bfloat16))


def test_a_zero_row_of_dora_is_nan() -> None:
    a, b = torch.zeros(1, 3), torch.zeros(2, 1)
    got = dora_merge(torch.zeros(2, 3), a, b, torch.ones(2), 1.0, torch.float32)
    assert bool(got.isnan().all())


@pytest.mark.parametrize(
    ("weight", "a", "b"),
    [((4, 3), (2, 4), (4, 2)), ((4, 3), (2, 3), (3, 2)), ((4, 3), (1, 3), (4, 2)),
     ((4,), (2, 3), (4, 2)), ((4, 3), (3,), (4, 2))],
)  # fmt: skip
def test_shapes_that_do_not_fit_are_refused(
    weight: tuple[int, ...], a: tuple[int, ...], b: tuple[int, ...]
) -> None:
    tensors = torch.zeros(weight), torch.zeros(a), torch.zeros(b)
    with pytest.raises(ValueError, match="expected"):
        lora_merge(tensors[0], [(tensors[1], tensors[2], 1.0)], torch.float32)
    with pytest.raises(ValueError, match="expected"):
        dora_row_norm(*tensors, 1.0)


def test_magnitude_of_another_length_is_refused() -> None:
    tensors = torch.zeros(4, 3), torch.zeros(2, 3), torch.zeros(4, 2), torch.zeros(3)
    with pytest.raises(ValueError, match="magnitude is"):
        dora_merge(*tensors, 1.0, torch.float32)


def test_nf4_decodes_the_first_code_of_a_pair_from_the_upper_bits() -> None:
    packed = torch.tensor([0x0F, 0x87], dtype=torch.uint8)
    got = nf4_decode(packed, torch.tensor([2.0, 10.0]), (1, 4), block_size=2)
    assert got.tolist() == [[-2.0, 2.0, 10 * NF4_VALUES[8], 0.0]]


def test_nf4_values_divide_the_normal_distribution_as_their_source_says() -> None:
    # appendix E of the QLoRA paper, with the offset that bitsandbytes computed the table with
    normal, offset = NormalDist(), 0.9677083
    up = [normal.inv_cdf(offset + (0.5 - offset) * i / 8) for i in range(8)]
    down = [-normal.inv_cdf(offset + (0.5 - offset) * i / 7) for i in range(7)]
    values = sorted([*up, *down, 0.0])
    assert pytest.approx([value / values[-1] for value in values], abs=1e-6) == NF4_VALUES


def test_mxfp4_decodes_the_first_code_of_a_pair_from_the_lower_bits() -> None:
    packed = torch.zeros(2, 32, dtype=torch.uint8)
    packed[0, :2] = torch.tensor([0x21, 0xF7])
    exponents = torch.tensor([[128, 0], [255, 127]], dtype=torch.uint8)
    got = mxfp4_decode(packed, exponents)
    assert got.shape == (2, 64)
    assert got[0, :4].tolist() == [1.0, 2.0, 12.0, -12.0]
    assert got[1, :32].isnan().all()
    assert not got[1, 32:].any()


@pytest.mark.parametrize(
    ("scale", "expected"),
    [(torch.tensor([3.0]), (3.0, 3.0)), (torch.arange(1.0, 131.0).view(130, 1), (1.0, 130.0)),
     (torch.tensor([[1.0, 2.0], [3.0, 4.0]]), (1.0, 4.0))],
)  # fmt: skip
def test_fp8_scales_are_for_the_tensor_a_row_or_a_block(
    scale: torch.Tensor, expected: tuple[float, float]
) -> None:
    got = fp8_decode(torch.ones(130, 200).to(torch.float8_e4m3fn), scale)
    assert (got[0, 0].item(), got[129, 199].item()) == expected


def test_the_package_gives_operations_and_nothing_else() -> None:
    assert streammerge_kernels.lora_merge_.__module__ == "streammerge_kernels.merge"
    for name in streammerge_kernels.__all__:
        assert callable(getattr(streammerge_kernels, name))
    with pytest.raises(AttributeError, match="no attribute 'other'"):
        _ = streammerge_kernels.other  # type: ignore[attr-defined]


def test_the_package_and_its_reference_load_without_triton() -> None:
    program = (
        "import sys\n"
        "sys.modules['triton'] = None\n"
        "import streammerge_kernels, streammerge_kernels.reference\n"
        "try:\n"
        "    streammerge_kernels.lora_merge_\n"
        "except ModuleNotFoundError as error:\n"
        "    assert error.name == 'triton', error\n"
        "else:\n"
        "    raise SystemExit('loaded')\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
