"""Rounding to the nearest code."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from streammerge.errors import QuantizationError
from streammerge.quantize import rtn
from streammerge.quantize.linear import Grid
from streammerge.quantize.rtn import quantize_rtn


def normal(rows: int, features: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, features, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=40, deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    is_symmetric=st.booleans(),
    rows=st.integers(1, 9),
    features=st.integers(1, 40),
    group_size=st.sampled_from([-1, 1, 8, 32]),
    seed=st.integers(0, 1000),
)
def test_each_value_gets_its_nearest_code(
    bits: int, is_symmetric: bool, rows: int, features: int, group_size: int, seed: int
) -> None:
    weight = normal(rows, features, seed)
    found = quantize_rtn(weight, Grid(bits, is_symmetric), group_size)
    index = found.g_idx.long()
    scales, zeros = found.scales[:, index].double(), found.zeros[:, index].double()
    all_codes = torch.arange(2**bits, dtype=torch.float64)
    values = scales[..., None] * (all_codes - zeros[..., None])
    best = (values - weight.double()[..., None]).abs().amin(dim=-1)
    lost = (found.dequantize().double() - weight.double()).abs()
    # a tie, or a quotient that float32 rounds onto one, may go either way
    assert bool((lost <= best + 2.0**-22 * weight.abs().max()).all())


def test_groups_are_those_of_neighbouring_inputs_and_the_last_may_be_short() -> None:
    weight = normal(3, 20)
    found = quantize_rtn(weight, Grid(4), 8)
    assert found.g_idx.tolist() == [0] * 8 + [1] * 8 + [2] * 4
    assert found.scales.shape == found.zeros.shape == (3, 3)
    last = quantize_rtn(weight[:, 16:], Grid(4), -1)
    assert torch.equal(found.codes[:, 16:], last.codes)
    assert torch.equal(found.scales[:, 2:], last.scales)
    assert (found.group_size, last.group_size) == (8, 4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_and_views(dtype: torch.dtype) -> None:
    weight = normal(12, 6).to(dtype)
    before = weight.clone()
    found = quantize_rtn(weight.T, Grid(4), 4)
    assert torch.equal(weight, before)
    again = quantize_rtn(weight.T.contiguous().float(), Grid(4), 4)
    assert torch.equal(found.codes, again.codes)
    assert torch.equal(found.scales, again.scales)


def test_rows_do_not_depend_on_how_many_are_taken_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight = normal(7, 20)
    whole = quantize_rtn(weight, Grid(4, is_symmetric=False), 8)
    for values in (1, 50):
        monkeypatch.setattr(rtn, "CHUNK_VALUES", values)
        found = quantize_rtn(weight, Grid(4, is_symmetric=False), 8)
        assert torch.equal(found.codes, whole.codes)
        assert torch.equal(found.scales, whole.scales)
        assert torch.equal(found.zeros, whole.zeros)


def test_symmetric_codes_have_their_zero_in_the_middle() -> None:
    assert quantize_rtn(normal(4, 32), Grid(4), 16).zeros.unique().tolist() == [8]


def test_a_group_of_zeros_stays_zero() -> None:
    weight = normal(2, 16)
    weight[:, :8] = 0
    for is_symmetric in (True, False):
        found = quantize_rtn(weight, Grid(4, is_symmetric), 8)
        assert not found.dequantize()[:, :8].any()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e6])
def test_values_without_a_scale_are_refused(value: float) -> None:
    weight = normal(4, 16)
    weight[2, 5] = value
    with pytest.raises(QuantizationError, match=r"'layers\.3\.down' holds NaN, Inf"):
        quantize_rtn(weight, Grid(4), 8, name="layers.3.down")
