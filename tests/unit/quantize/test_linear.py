"""Grids of codes, and what codes stand for."""

from __future__ import annotations

import pytest
import torch

from streammerge.quantize.linear import SHRINKS, Grid, QuantizedLinear, find_grid, search_grid


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


def cost_of(
    values: torch.Tensor, worth: torch.Tensor, grid: Grid, found: tuple[torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    """Return (N,) float64: the cost of rounding each group."""
    wide = values.double()
    scales, zeros = (part.double()[:, None] for part in found)
    codes = (torch.round(wide / scales) + zeros).clamp(0, grid.highest)
    return ((scales * (codes - zeros) - wide) ** 2 * worth.double()).sum(dim=1)


@pytest.mark.parametrize("is_symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_cheapest_of_all_scales_is_found(bits: int, is_symmetric: bool) -> None:
    grid = Grid(bits, is_symmetric)
    generator = torch.Generator().manual_seed(bits)
    # more groups than are looked at in one go
    values = torch.randn(5000, 64, generator=generator)
    worth = torch.rand(64, generator=generator)
    found = search_grid(values, grid, worth)
    tried = [find_grid(values * shrink, grid) for shrink in SHRINKS]
    costs = torch.stack([cost_of(values, worth, grid, one) for one in tried])
    # the sum of 64 squares is a share of 64 * 2^-24 off in float32
    assert (cost_of(values, worth, grid, found) <= costs.amin(dim=0) * (1 + 1e-5)).all()
    assert torch.stack([found[0] == one[0] for one in tried]).any(dim=0).all()


def test_what_an_error_costs_decides_whether_an_extreme_is_cut_off() -> None:
    values = torch.full((1, 16), 0.3)
    values[0, 0] = 1.0
    grid = Grid(2)
    dear, cheap = torch.ones(16), torch.ones(16)
    dear[0], cheap[0] = 1e6, 1e-6
    whole = find_grid(values, grid)[0]
    assert search_grid(values, grid, cheap)[0] < whole
    cut = cost_of(values, dear, grid, search_grid(values, grid, cheap))
    assert cost_of(values, dear, grid, search_grid(values, grid, dear)) < cut


def test_groups_of_zeros_and_broken_ones_are_as_by_their_extremes() -> None:
    values = torch.zeros(3, 4)
    values[1, 2], values[2, 1] = float("nan"), float("inf")
    scales, _ = search_grid(values, Grid(4), torch.ones(4))
    assert scales[0] == 1
    assert not torch.isfinite(scales[1:]).any()


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
