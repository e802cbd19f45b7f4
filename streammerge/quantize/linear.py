"""A quantized linear layer: codes, scales, zeros, and what they stand for.

Shapes: N out_features, K in_features, G group size. Group g of row n has one scale and one zero:
`W[n, k] ~ scales[n, g] * (codes[n, k] - zeros[n, g])` with `g = g_idx[k]`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from streammerge.checkpoint.header import TensorSpec

if TYPE_CHECKING:
    from collections.abc import Iterable

    from streammerge.dtypes import Dtype

__all__ = [
    "Decoded",
    "Grid",
    "QuantizedLinear",
    "find_grid",
    "linear_specs",
    "search_grid",
]

# shares of a group's extremes that a scale is tried for, 5 % apart: four times as many gained 0.2 %
# of the loss in 3 bits
SHRINKS = tuple(1.0 - 0.05 * step for step in range(11))
# values that are compared with their codes at a time, so that they stay in the cache
CHUNK_VALUES = 1 << 17


class Decoded(Protocol):
    """A quantized weight of any kind."""

    relative_error: float
    """`||X (W - W_q)||^2 / ||X W||^2` on the calibration inputs X; 0 where none were used."""

    def dequantize(
        self, dtype: torch.dtype = torch.float32, *, rows: slice = slice(None)
    ) -> torch.Tensor:
        """Return (N, K), or some rows of it: what the codes stand for, as a loader computes it."""


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


def search_grid(
    values: torch.Tensor, grid: Grid, worth: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose scale and zero for groups so that rounding costs least, extremes cut off or not.

    Args:
        values: (N, G) float32: the values of each group.
        grid: What codes there are.
        worth: (G,) float32: the cost of a squared error of 1 of each of the values.

    Returns:
        Scales and zeros as of `find_grid`, both (N,).
    """
    scales = torch.empty(len(values))
    zeros = torch.empty_like(scales)
    count = max(1, CHUNK_VALUES // values.shape[1])
    for begin in range(0, len(values), count):
        rows = slice(begin, begin + count)
        part = values[rows].contiguous()
        least = torch.full((len(part),), torch.inf)
        scales[rows], zeros[rows] = find_grid(part, grid)
        for shrink in SHRINKS:
            scale, zero = find_grid(part, grid, shrink=shrink)
            steps = torch.round(part / scale[:, None]).add_(zero[:, None])
            lost = steps.clamp_(0, grid.highest).sub_(zero[:, None]).mul_(scale[:, None]).sub_(part)
            cost = lost.square_() @ worth
            is_less = cost < least
            least[is_less] = cost[is_less]
            scales[rows][is_less] = scale[is_less]
            zeros[rows][is_less] = zero[is_less]
    return scales, zeros


def find_grid(
    values: torch.Tensor, grid: Grid, *, shrink: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose scale and zero for groups by their extremes.

    Args:
        values: (..., G) float32: the values of each group.
        grid: What codes there are.
        shrink: The share of the extremes that codes have to reach.

    Returns:
        Scales, float32 of values that float16 can hold, and zeros, both (...). A group of zeros has
        scale 1.
    """
    low = values.amin(dim=-1).clamp(max=0.0) * shrink
    high = values.amax(dim=-1).clamp(min=0.0) * shrink
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


def linear_specs(
    name: str,
    shapes: Iterable[tuple[str, Dtype, tuple[int, ...]]],
    *,
    rows: int,
    bias: Dtype | None,
) -> tuple[TensorSpec, ...]:
    """Return what is stored for a linear of `rows` outputs: its codes' tensors, and its bias."""
    specs = [TensorSpec(f"{name}.{end}", dtype, shape) for end, dtype, shape in shapes]
    if bias is not None:
        specs.append(TensorSpec(f"{name}.bias", bias, (rows,)))
    return tuple(specs)
