"""Rounding to the nearest code: what can be had without calibration, and what others are held to.

`q = clamp(round(w / scale) + zero, 0, 2^bits - 1)`
"""

from __future__ import annotations

import torch

from streammerge.errors import QuantizationError
from streammerge.quantize.linear import Grid, QuantizedLinear, find_grid

__all__ = ["quantize_rtn"]

# values in float32 at a time: beside the weight and its codes hardly anything is in memory
CHUNK_VALUES = 1 << 22


def quantize_rtn(
    weight: torch.Tensor, grid: Grid, group_size: int, *, name: str = "weight"
) -> QuantizedLinear:
    """Quantize a weight, each value by itself.

    Args:
        weight: (N, K), any float dtype; is not changed.
        grid: What codes there are.
        group_size: Inputs per group, of which the last may have fewer; -1 for one group per row.
        name: Of the layer, for messages.

    Raises:
        QuantizationError: The weight holds NaN, Inf, or values for which float16 has no scale.
    """
    features = weight.shape[1]
    group_size = features if group_size == -1 else group_size
    done = [
        _quantize_rows(rows.to(torch.float32), grid, group_size)
        for rows in torch.split(weight, max(1, CHUNK_VALUES // features))
    ]
    codes, scales, zeros = (torch.cat(parts) for parts in zip(*done, strict=True))
    if not bool(torch.isfinite(scales).all()):
        raise QuantizationError(
            f"'{name}' holds NaN, Inf, or values too large for a scale in float16",
            hint="is the base broken? it cannot be quantized as it is",
        )
    return QuantizedLinear(
        codes=codes,
        scales=scales,
        zeros=zeros.to(torch.int32),
        g_idx=(torch.arange(features) // group_size).to(torch.int32),
        bits=grid.bits,
        group_size=group_size,
    )


def _quantize_rows(
    weight: torch.Tensor, grid: Grid, group_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return codes, scales and zeros of (n, K) float32."""
    features = weight.shape[1]
    whole = features - features % group_size
    parts = []
    if whole:
        parts.append(weight[:, :whole].reshape(len(weight), -1, group_size))
    if whole < features:
        parts.append(weight[:, whole:].unsqueeze(1))
    codes, scales, zeros = [], [], []
    for values in parts:
        part_scales, part_zeros = find_grid(values, grid)
        steps = (values / part_scales[..., None]).round_().add_(part_zeros[..., None])
        codes.append(steps.clamp_(0, grid.highest).to(torch.uint8).flatten(1))
        scales.append(part_scales)
        zeros.append(part_zeros)
    return torch.cat(codes, dim=1), torch.cat(scales, dim=1), torch.cat(zeros, dim=1)
