"""A quantized linear layer: codes, scales, zeros, and what they stand for.

Shapes: N out_features, K in_features, G group size. Group g of row n has one scale and one zero:
`W[n, k] ~ scales[n, g] * (codes[n, k] - zeros[n, g])` with `g = g_idx[k]`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["Grid", "QuantizedLinear", "find_grid"]


@dataclass(frozen=True, slots=True)
class Grid:
    """What codes of a number of bits can stand for."""

    bits: int
    is_symmetric: bool = True
    """Whether zero is the middle code."""

    @property
    def highest(self) -> int:
        """The greatest code."""
        return (1 << self.bits) - 1


@dataclass(slots=True)
class QuantizedLinear:
    """One layer's weight."""

    codes: torch.Tensor
    """(N, K) uint8."""
    scales: torch.Tensor
    """(N, groups) float32, of values that float16 can hold."""
    zeros: torch.Tensor
    """(N, groups) int32, each a code."""
    g_idx: torch.Tensor
    """(K,) int32: the group of each input."""
    bits: int
    group_size: int
    """Inputs per group; K for one group per row."""
    relative_error: float = 0.0
    """`||X (W - W_q)||^2 / ||X W||^2` on the calibration inputs X; 0 where none were used."""

    def dequantize(
        self, dtype: torch.dtype = torch.float32, *, rows: slice = slice(None)
    ) -> torch.Tensor:
        """Return (N, K), or some rows of it: what the codes stand for, as a loader computes it."""
        index = self.g_idx.long()
        steps = self.codes[rows].to(torch.float32)
        steps -= self.zeros[rows].to(torch.float32)[:, index]
        return steps.mul_(self.scales[rows][:, index]).to(dtype)


def find_grid(values: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose scale and zero for groups by their extremes.

    Args:
        values: (..., G) float32: the values of each group.
        grid: What codes there are.

    Returns:
        Scales, float32 of values that float16 can hold, and zeros, both (...). A group of zeros has
        scale 1.
    """
    low = values.amin(dim=-1).clamp(max=0.0)
    high = values.amax(dim=-1).clamp(min=0.0)
    if grid.is_symmetric:
        scales = 2 * torch.maximum(low.abs(), high) / grid.highest
    else:
        scales = (high - low) / grid.highest
    # what is stored is float16: the codes are chosen for the scale that a loader will read
    scales = scales.half().float()
    scales[scales == 0] = 1.0
    if grid.is_symmetric:
        return scales, torch.full_like(scales, 2 ** (grid.bits - 1))
    return scales, torch.round(-low / scales).clamp_(0, grid.highest)
