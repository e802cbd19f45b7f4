"""AWQ: scale the inputs that matter most up before rounding, and clip what stretches the steps.

For linears that share the inputs X (tokens, K), with m the mean of |X| and `H = 2 / tokens X^T X`,

    s = m^a / sqrt(max m^a * min m^a)          for a = 0, 1/20, ... 19/20
    D = W - Q(W s) / s                         (N, K), summed over the linears
    s is the one with the least `tr(D H D^T)`

and then, for each group of a row by itself, the range of codes is shrunk by the factor that loses
least on the group's own block of H. Errors come from H, so that no inputs are kept.

Source: Lin et al., "AWQ: Activation-aware Weight Quantization for LLM Compression and
Acceleration", 2023, sections 3.2 (scales) and 4 (clipping).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from streammerge.errors import QuantizationError
from streammerge.quantize.gptq import Hessian
from streammerge.quantize.linear import Grid, QuantizedLinear, find_grid

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Moments", "find_scales", "quantize_awq"]

EXPONENTS = tuple(step / 20 for step in range(20))
# of the range of codes; 1 is tried first and kept unless another loses less
SHRINKS = tuple(1 - step / 20 for step in range(1, 11))
# of each linear, evenly spaced: enough to tell exponents apart
SEARCH_ROWS = 1024
# values in float32 at a time
CHUNK_VALUES = 1 << 20
# a mean magnitude below this share of the average does not count as smaller still
LEAST_MAGNITUDE = 1e-4


class Moments:
    """Accumulates what the searches need of inputs (..., K)."""

    def __init__(self, features: int) -> None:
        """Begin with no token.

        Args:
            features: K.
        """
        self._hessian = Hessian(features)
        self._sums = torch.zeros(features, dtype=torch.float64)

    def add(self, inputs: torch.Tensor) -> None:
        """Count inputs in."""
        self._hessian.add(inputs)
        flat = inputs.reshape(-1, inputs.shape[-1])
        self._sums += flat.abs().sum(dim=0, dtype=torch.float32)

    @property
    def hessian(self) -> torch.Tensor:
        """Return H, (K, K) float32."""
        return self._hessian.matrix

    @property
    def magnitude(self) -> torch.Tensor:
        """Return the mean of |X|, (K,) float32."""
        return (self._sums / max(self._hessian.tokens, 1)).to(torch.float32)


def find_scales(
    weights: Sequence[torch.Tensor],
    moments: Moments,
    grid: Grid,
    group_size: int,
    *,
    name: str = "weight",
) -> torch.Tensor:
    """Search the scales of the inputs that linears share.

    Args:
        weights: (N, K) each, any float dtype; are not changed.
        moments: Of the inputs.
        grid: What codes there are.
        group_size: Inputs per group; -1 for one group per row.
        name: Of the first linear, for messages.

    Returns:
        (K,) float32, positive; all 1 if no scales lose less than none.

    Raises:
        QuantizationError: The inputs hold NaN or Inf.
    """
    magnitude, hessian = moments.magnitude, moments.hessian
    if not bool(torch.isfinite(hessian.diagonal()).all() & torch.isfinite(magnitude).all()):
        raise QuantizationError(
            f"calibration gave inputs of '{name}' that are NaN or Inf",
            hint="the model overflows before this layer: is the base broken?",
        )
    best = torch.ones_like(magnitude)
    if not bool(magnitude.any()):
        return best
    magnitude = (magnitude / magnitude.mean()).clamp_(min=LEAST_MAGNITUDE)
    parts = [
        weight[:: -(-len(weight) // SEARCH_ROWS)].to(torch.float32, copy=True) for weight in weights
    ]
    least = float("inf")
    for exponent in EXPONENTS:
        scales = magnitude**exponent
        scales /= (scales.max() * scales.min()).sqrt()
        lost = 0.0
        for part in parts:
            difference = _rounded(part * scales, grid, group_size).div_(scales).sub_(part)
            lost += float(_row_errors(difference, hessian).sum(dtype=torch.float64))
        if lost < least:
            best, least = scales, lost
    return best


def quantize_awq(
    weight: torch.Tensor,
    scales: torch.Tensor,
    hessian: torch.Tensor,
    grid: Grid,
    group_size: int,
    *,
    name: str = "weight",
) -> QuantizedLinear:
    """Quantize a weight times its inputs' scales.

    Args:
        weight: (N, K) without the scales, any float dtype; is not changed.
        scales: (K,) float32, by which the inputs will have been divided.
        hessian: (K, K) float32, of the inputs as they were; is not changed.
        grid: What codes there are.
        group_size: Inputs per group, a divisor of K; -1 for one group per row.
        name: Of the layer, for messages.

    Raises:
        QuantizationError: The weight holds NaN, Inf, or values for which float16 has no scale.
    """
    features = weight.shape[1]
    group_size = features if group_size == -1 else group_size
    blocks = _blocks(hessian, scales, group_size)
    codes, steps, zeros = [], [], []
    before = after = 0.0
    for part in torch.split(weight, max(1, CHUNK_VALUES // features)):
        wide = part.to(torch.float32)
        values = (wide * scales).view(len(wide), -1, group_size)
        whole, zero = find_grid(values, grid)
        if not bool(torch.isfinite(whole).all()):
            raise QuantizationError(
                f"'{name}' holds NaN, Inf, or values too large for a scale in float16",
                hint="is the base broken? it cannot be quantized as it is",
            )
        shrunk = _clip(values, whole, zero, blocks, grid)
        lost = []
        for step in (whole, shrunk):
            back = _decode(_encode(values, step, zero, grid), step, zero).flatten(1)
            lost.append(_row_errors(back.div_(scales).sub_(wide), hessian))
        # groups were judged one by one; together they may have lost more
        step = torch.where((lost[1] < lost[0])[:, None], shrunk, whole)
        codes.append(_encode(values, step, zero, grid).to(torch.uint8).flatten(1))
        steps.append(step)
        zeros.append(zero.to(torch.int32))
        before += float(_row_errors(wide, hessian).sum(dtype=torch.float64))
        after += float(torch.minimum(*lost).sum(dtype=torch.float64))
    return QuantizedLinear(
        codes=torch.cat(codes),
        scales=torch.cat(steps),
        zeros=torch.cat(zeros),
        g_idx=(torch.arange(features) // group_size).to(torch.int32),
        bits=grid.bits,
        group_size=group_size,
        relative_error=after / before if before > 0 else 0.0,
    )


def _blocks(hessian: torch.Tensor, scales: torch.Tensor, group_size: int) -> torch.Tensor:
    """Return the blocks of H of the divided inputs on its diagonal, (groups, G, G)."""
    count = len(hessian) // group_size
    blocks = torch.stack(
        [
            hessian[begin : begin + group_size, begin : begin + group_size]
            for begin in range(0, count * group_size, group_size)
        ]
    )
    inverse = (1 / scales).view(count, group_size)
    return blocks * inverse[:, :, None] * inverse[:, None, :]


def _clip(
    values: torch.Tensor,
    whole: torch.Tensor,
    zeros: torch.Tensor,
    blocks: torch.Tensor,
    grid: Grid,
) -> torch.Tensor:
    """Return the scales (n, groups) of ranges that lose least of values (n, groups, G)."""
    best, least = whole.clone(), _group_errors(values, whole, zeros, blocks, grid)
    for shrink in SHRINKS:
        scales = (whole * shrink).half().float()
        scales[scales == 0] = 1.0
        lost = _group_errors(values, scales, zeros, blocks, grid)
        is_less = lost < least
        best[is_less], least[is_less] = scales[is_less], lost[is_less]
    return best


def _group_errors(
    values: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    blocks: torch.Tensor,
    grid: Grid,
) -> torch.Tensor:
    """Return what each group loses by itself, (n, groups)."""
    lost = _decode(_encode(values, scales, zeros, grid), scales, zeros).sub_(values)
    of_group = lost.transpose(0, 1)
    return (of_group @ blocks).mul_(of_group).sum(dim=-1).T


def _row_errors(difference: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """Return the diagonal of `D H D^T`, (n,)."""
    return (difference @ hessian).mul_(difference).sum(dim=-1)


def _rounded(weight: torch.Tensor, grid: Grid, group_size: int) -> torch.Tensor:
    """Return what the codes of (n, K) float32 stand for."""
    size = weight.shape[1] if group_size == -1 else group_size
    values = weight.view(len(weight), -1, size)
    scales, zeros = find_grid(values, grid)
    return _decode(_encode(values, scales, zeros, grid), scales, zeros).flatten(1)


def _encode(
    values: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, grid: Grid
) -> torch.Tensor:
    codes = (values / scales[..., None]).round_().add_(zeros[..., None])
    return codes.clamp_(0, grid.highest)


def _decode(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
    """Return values; codes are used up."""
    return codes.sub_(zeros[..., None]).mul_(scales[..., None])
