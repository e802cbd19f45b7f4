"""Grids of codes, and what codes stand for."""

from __future__ import annotations

import pytest
import torch

from streammerge.quantize.linear import Grid, QuantizedLinear, find_grid


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_scales_reach_the_extremes(bits: int) -> None:
    values = torch.tensor([[-1.0, 0.5, 0.25], [0.0, 2.0, 1.0]])
    scales, zeros = find_grid(values, Grid(bits))
    highest = 2**bits - 1
    assert torch.equal(scales, (torch.tensor([2.0, 4.0]) / highest).half().float())
    assert (zeros == 2 ** (bits - 1)).all()
    scales, zeros = find_grid(values, Grid(bits, is_symmetric=False))
    assert torch.equal(scales, (torch.tensor([1.5, 2.0]) / highest).half().float())
    assert zeros.tolist() == [round(1 / float(scales[0])), 0]


def test_zero_is_always_among_the_values() -> None:
    scales, zeros = find_grid(torch.tensor([[2.0, 3.0], [-3.0, -2.0]]), Grid(4, is_symmetric=False))
    assert torch.equal(scales, torch.tensor([3.0, 3.0]).div(15).half().float())
    assert zeros.tolist() == [0, 15]


def test_a_group_of_zeros_has_a_scale() -> None:
    for is_symmetric in (True, False):
        scales, zeros = find_grid(torch.zeros(2, 4), Grid(4, is_symmetric))
        assert (scales == 1).all()
        assert zeros.tolist() == ([8, 8] if is_symmetric else [0, 0])


def test_dequantize_follows_the_groups() -> None:
    linear = QuantizedLinear(
        codes=torch.tensor([[1, 2, 3], [4, 5, 6]], dtype=torch.uint8),
        scales=torch.tensor([[0.5, 2.0], [1.0, 4.0]]),
        zeros=torch.tensor([[1, 2], [3, 4]], dtype=torch.int32),
        g_idx=torch.tensor([1, 0, 1], dtype=torch.int32),
        bits=4,
        group_size=2,
    )
    expected = torch.tensor([[-2.0, 0.5, 2.0], [0.0, 2.0, 8.0]])
    assert torch.equal(linear.dequantize(), expected)
    assert torch.equal(linear.dequantize(rows=slice(1, 2)), expected[1:])
    assert linear.dequantize(torch.bfloat16).dtype == torch.bfloat16
