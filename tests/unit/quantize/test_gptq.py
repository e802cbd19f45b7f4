"""GPTQ against its definition in float64, and what it refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from streammerge.errors import QuantizationError
from streammerge.quantize.gptq import (
    Factored,
    GptqOptions,
    Hessian,
    quantize_gptq,
    relative_error,
)
from streammerge.quantize.linear import SHRINKS, Grid, QuantizedLinear, find_grid
from streammerge.quantize.rtn import quantize_rtn

BASE = GptqOptions(Grid(4), 16, damp=0.05)


def solve(
    weight: torch.Tensor, hessian: torch.Tensor, options: GptqOptions, name: str = "weight"
) -> QuantizedLinear:
    return quantize_gptq(weight, Factored(hessian, options, name=name), options, name=name)


def inputs(features: int, tokens: int = 600, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(features, features, generator=generator) / features**0.5
    return torch.randn(tokens, features, generator=generator) @ (torch.eye(features) + mixed)


def hessian_of(values: torch.Tensor) -> torch.Tensor:
    hessian = Hessian(values.shape[1])
    hessian.add(values)
    return hessian.matrix


def weight_of(rows: int, features: int) -> torch.Tensor:
    return torch.randn(rows, features, generator=torch.Generator().manual_seed(9))


def cheapest_grid(
    values: torch.Tensor, worth: torch.Tensor, grid: Grid
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of all grids that are tried, the one whose rounding costs least, row by row."""
    tried = [find_grid((values.float() * shrink), grid) for shrink in SHRINKS]
    chosen = []
    for row, row_values in enumerate(values):
        costs = []
        for scales, zeros in tried:
            scale, zero = float(scales[row]), float(zeros[row])
            codes = (torch.round(row_values / scale) + zero).clamp(0, grid.highest)
            costs.append(float(((row_values - scale * (codes - zero)) ** 2 * worth).sum()))
        best = costs.index(min(costs))
        chosen.append((float(tried[best][0][row]), float(tried[best][1][row])))
    scales, zeros = torch.tensor(chosen).T
    return scales, zeros


def naive(weight: torch.Tensor, hessian: torch.Tensor, options: GptqOptions) -> torch.Tensor:
    """One input at a time, with the inverse brought up to date by elimination: no factor at all."""
    rows, features = weight.shape
    work, matrix = weight.double().clone(), hessian.double().clone()
    size = features if options.group_size == -1 else options.group_size
    mean = matrix.diagonal().mean()
    dead = hessian.diagonal() == 0
    work[:, dead] = 0
    matrix.diagonal().add_(options.damp * mean)
    matrix.diagonal()[dead] = 1
    order = list(range(features))
    if options.act_order or options.desc_act:
        order = torch.argsort(hessian.diagonal(), descending=True, stable=True).tolist()
    group = {k: (place if options.desc_act else k) // size for place, k in enumerate(order)}
    inverse = torch.linalg.inv(matrix)
    worth = torch.empty(features, dtype=torch.float64)
    eliminated = inverse.clone()
    for k in order:
        worth[k] = 1 / eliminated[k, k]
        eliminated -= torch.outer(eliminated[:, k], eliminated[k]) / eliminated[k, k]
    grids = {}
    for g in set(group.values()):
        own = [k for k in range(features) if group[k] == g]
        grids[g] = cheapest_grid(work[:, own], worth[own], options.grid)
    codes = torch.empty(rows, features, dtype=torch.uint8)
    left = order[:]
    for k in order:
        scale, zero = (part.double() for part in grids[group[k]])
        code = (torch.round(work[:, k] / scale) + zero).clamp(0, options.grid.highest)
        codes[:, k] = code.to(torch.uint8)
        error = (work[:, k] - scale * (code - zero)) / inverse[k, k]
        left.remove(k)
        work[:, left] -= error[:, None] * inverse[k, left]
        inverse = inverse - torch.outer(inverse[:, k], inverse[k]) / inverse[k, k]
    return codes


@pytest.mark.parametrize(
    "options",
    [
        BASE,
        replace(BASE, act_order=False),
        replace(BASE, act_order=False, desc_act=True),
        replace(BASE, grid=Grid(4, is_symmetric=False)),
        replace(BASE, grid=Grid(2), group_size=-1),
        replace(BASE, grid=Grid(3, is_symmetric=False), desc_act=True),
        replace(BASE, grid=Grid(8), group_size=32),
    ],
)
@pytest.mark.parametrize("features", [160, 37])
def test_codes_are_those_of_the_definition(options: GptqOptions, features: int) -> None:
    weight, hessian = weight_of(23, features), hessian_of(inputs(features))
    hessian[5] = hessian[:, 5] = 0
    got = solve(weight, hessian, options)
    expected = naive(weight, hessian, options)
    # float32 decides some ties otherwise, and what follows from them
    assert (got.codes != expected).float().mean() < 0.02
    reference = QuantizedLinear(
        expected, got.scales, got.zeros, got.g_idx, options.grid.bits, got.group_size
    )
    assert got.relative_error == pytest.approx(
        relative_error(weight, reference, hessian), rel=0.02, abs=1e-9
    )
    assert (got.codes[:, 5] == got.zeros[:, got.g_idx[5]]).all()


def test_error_is_that_of_the_outputs_and_less_than_by_rounding() -> None:
    values, weight = inputs(96), weight_of(40, 96)
    hessian = hessian_of(values)
    got = solve(weight, hessian, BASE)
    lost = values @ (weight - got.dequantize()).T
    expected = float(lost.square().sum() / (values @ weight.T).square().sum())
    assert got.relative_error == pytest.approx(expected, rel=1e-3)
    rounded = relative_error(weight, quantize_rtn(weight, BASE.grid, 16), hessian)
    assert got.relative_error < 0.95 * rounded


@pytest.mark.parametrize("is_symmetric", [True, False])
def test_scales_that_cut_extremes_off_lose_less(is_symmetric: bool) -> None:
    grid = Grid(3, is_symmetric)
    values, weight = inputs(128), weight_of(32, 128)
    hessian = hessian_of(values)
    got = solve(weight, hessian, replace(BASE, grid=grid, group_size=64))
    whole, _ = find_grid(weight.view(32, 2, 64), grid)
    assert (got.scales <= whole).all()
    # with scales that reach the extremes it is 0.52 of it
    rounded = relative_error(weight, quantize_rtn(weight, grid, 64), hessian)
    assert got.relative_error < 0.49 * rounded


def test_order_and_groups() -> None:
    weight, hessian = weight_of(8, 64), hessian_of(inputs(64))
    in_order = torch.arange(64, dtype=torch.int32) // 16
    assert torch.equal(solve(weight, hessian, BASE).g_idx, in_order)
    groups = solve(weight, hessian, replace(BASE, desc_act=True)).g_idx
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    assert torch.equal(groups[order], in_order)
    whole = solve(weight, hessian, replace(BASE, group_size=-1))
    assert whole.group_size == 64
    assert whole.scales.shape == (8, 1)


def test_nothing_given_is_changed() -> None:
    weight, hessian = weight_of(8, 64), hessian_of(inputs(64))
    hessian[3] = hessian[:, 3] = 0
    before = weight.clone(), hessian.clone()
    solve(weight, hessian, BASE)
    solve(weight.T.contiguous().T, hessian, BASE)
    assert torch.equal(weight, before[0])
    assert torch.equal(hessian, before[1])


def test_a_matrix_of_few_tokens_gets_more_damping() -> None:
    weight, hessian = weight_of(8, 64), hessian_of(inputs(64, tokens=3))
    got = solve(weight, hessian, replace(BASE, damp=1e-12))
    assert got.relative_error < 1


def test_a_matrix_that_no_damping_mends_is_refused() -> None:
    hessian = torch.eye(16)
    hessian[0, 1] = hessian[1, 0] = 100.0
    with pytest.raises(QuantizationError, match="inputs of 'proj' cannot be decorrelated"):
        solve(weight_of(4, 16), hessian, BASE, name="proj")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_inputs_and_weights_are_refused(value: float) -> None:
    values, weight = inputs(32), weight_of(4, 32)
    values[7, 3] = value
    with pytest.raises(QuantizationError, match="inputs of 'proj' that are NaN or Inf"):
        solve(weight, hessian_of(values), BASE, name="proj")
    weight[1, 2] = value
    with pytest.raises(QuantizationError, match="'proj' holds NaN, Inf"):
        solve(weight, hessian_of(inputs(32)), BASE, name="proj")


def test_accumulation_is_the_mean_over_all_tokens() -> None:
    values = inputs(24, tokens=5000)
    parts = Hessian(24)
    for part in values.split([1, 1999, 3000]):
        parts.add(part.to(torch.float32).unsqueeze(0))
    expected = 2 / 5000 * values.double().T @ values.double()
    torch.testing.assert_close(parts.matrix.double(), expected, rtol=1e-4, atol=1e-4)
    assert parts.tokens == 5000


@pytest.mark.parametrize("options", [BASE, replace(BASE, desc_act=True)], ids=["act", "desc"])
def test_linears_that_share_a_factor_get_the_codes_that_each_gets_alone(
    options: GptqOptions,
) -> None:
    hessian = hessian_of(inputs(64))
    kept = hessian.clone()
    factored = Factored(hessian, options)
    for seed in (1, 2):
        weight = torch.randn(24, 64, generator=torch.Generator().manual_seed(seed))
        together, alone = quantize_gptq(weight, factored, options), solve(weight, kept, options)
        assert torch.equal(together.codes, alone.codes)
        assert torch.equal(together.scales, alone.scales)
        assert together.relative_error == alone.relative_error
    assert torch.equal(hessian, kept)
