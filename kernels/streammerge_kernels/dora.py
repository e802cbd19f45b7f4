"""Measure the rows of an adapted weight, and merge DoRA.

    V = W + scaling * B @ A
    norm = ||V||_2 by rows,   OUT = round( (m / norm) * V )

W, V, OUT (N, K); A (R, K); B (N, R); m, norm (N,). V is never stored: the first pass sums its
squares over SPLITS ranges of columns, the second adds up the ranges in their order, and
`merge_kernel` computes V again. There are no atomics, and SPLITS depends on K alone, so that bits
are the same on every run. All sums are fp32, in which squares overflow where |V| is above 1.8e19.

Source of the formula: Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", 2024, equation 5.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from streammerge_kernels.checks import (
    WIDE,
    Factors,
    InputPrecision,
    check_tensor,
    on_device_of,
    pack_factors,
)
from streammerge_kernels.merge import config_for, lora_merge_
from streammerge_kernels.tile import TileConfig, delta

if TYPE_CHECKING:
    from collections.abc import Sequence

    from streammerge_kernels.reference import Term

__all__ = ["FP32_CONFIGS", "HALF_CONFIGS", "dora_merge_", "dora_row_norm", "square_sum_kernel"]

# Held to the same as those of `merge`. Two tiles in flight, so with fewer stages at rank 256.
HALF_CONFIGS = {
    16: TileConfig(block_n=64, block_k=128, block_r=16, num_warps=4, num_stages=3),
    32: TileConfig(block_n=64, block_k=128, block_r=32, num_warps=4, num_stages=3),
    64: TileConfig(block_n=64, block_k=128, block_r=64, num_warps=8, num_stages=2),
    256: TileConfig(block_n=64, block_k=128, block_r=64, num_warps=8, num_stages=2),
}
FP32_CONFIGS = {
    16: TileConfig(block_n=64, block_k=64, block_r=16, num_warps=4, num_stages=2),
    256: TileConfig(block_n=64, block_k=64, block_r=16, num_warps=8, num_stages=2),
}

COLUMNS_PER_SPLIT = 4096
BLOCK_FINISH = 256


@triton.jit
def square_sum_kernel(
    weight: tl.tensor,
    a: tl.tensor,
    b: tl.tensor,
    scalings: tl.tensor,
    partial: tl.tensor,
    n: tl.tensor,
    k: tl.tensor,
    scaling: tl.tensor,
    stride_w: tl.tensor,
    stride_a: tl.tensor,
    stride_b: tl.tensor,
    RANK: tl.constexpr,
    PRECISION: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
) -> None:
    """Sum the squares of BLOCK_N rows over COLUMNS columns; `partial` is (SPLITS, N)."""
    tile_row = tl.program_id(0)
    split = tl.program_id(1)
    first_row = (tile_row * BLOCK_N).to(tl.int64)
    rows = tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_K)
    row_mask = rows < n - tile_row * BLOCK_N
    source = weight + first_row * stride_w
    squares = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for first_column in range(split * COLUMNS, min(split * COLUMNS + COLUMNS, k), BLOCK_K):
        column_mask = columns < k - first_column
        tile_w = tl.load(
            source + first_column + rows[:, None] * stride_w + columns[None, :],
            mask=row_mask[:, None] & column_mask[None, :],
            other=0.0,
        )
        adapted = tile_w.to(tl.float32) + delta(
            b + first_row * stride_b,
            a + first_column,
            scaling,
            scalings,
            stride_b,
            stride_a,
            row_mask,
            column_mask,
            RANK,
            BLOCK_N,
            BLOCK_K,
            BLOCK_R,
            PRECISION,
        )
        squares += tl.sum(adapted * adapted, axis=1)
    tl.store(partial + split.to(tl.int64) * n + first_row + rows, squares, mask=row_mask)


@triton.jit
def finish_kernel(
    partial: tl.tensor,
    magnitude: tl.tensor,
    out: tl.tensor,
    n: tl.tensor,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Turn sums of squares into norms, or into gains if `magnitude` is not None."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = rows < n
    squares = tl.zeros((BLOCK,), dtype=tl.float32)
    for split in range(SPLITS):
        squares += tl.load(partial + split * n.to(tl.int64) + rows, mask=mask, other=1.0)
    value = tl.sqrt_rn(squares)
    if magnitude is not None:
        wanted = tl.load(magnitude + rows, mask=mask, other=0.0).to(tl.float32)
        value = tl.div_rn(wanted, value)
    tl.store(out + rows, value, mask=mask)


def dora_row_norm(
    weight: torch.Tensor,
    terms: Sequence[Term],
    *,
    input_precision: InputPrecision = "ieee",
    config: TileConfig | None = None,
) -> torch.Tensor:
    """Measure the rows of an adapted weight: `||W + sum(scaling * B @ A)||_2` over K.

    Args:
        weight: (N, K) in bf16, fp16 or fp32, on a GPU; rows may be apart.
        terms: One or more of A (R, K), B (N, R) and a scaling; bf16, fp16 or fp32.
        input_precision: How fp32 factors are multiplied.
        config: Shape of the tiles; from the tables of this module if None.

    Returns:
        (N,) in fp32.

    Raises:
        TypeError: A dtype is none of those above.
        ValueError: Shapes, devices or strides do not fit, or there is no term.
    """
    return _measure(weight, terms, None, input_precision, config)


def dora_merge_(
    weight: torch.Tensor,
    terms: Sequence[Term],
    magnitude: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
    input_precision: InputPrecision = "ieee",
    config: TileConfig | None = None,
) -> torch.Tensor:
    """Merge a DoRA adapter into a weight, in place or into `out`.

    No term is added to the norm, as in PEFT: a row of zeros gives NaN.

    Args:
        weight: (N, K) in bf16, fp16 or fp32, on a GPU; rows may be apart.
        terms: One or more of A (R, K), B (N, R) and a scaling; bf16, fp16 or fp32.
        magnitude: m, (N,) in bf16, fp16 or fp32.
        out: (N, K) in bf16, fp16 or fp32. The weight itself if None.
        input_precision: How fp32 factors are multiplied.
        config: Shape of the tiles in both passes; from the tables of each if None.

    Returns:
        `out`, or `weight` if there is none.

    Raises:
        TypeError: A dtype is none of those above.
        ValueError: Shapes, devices or strides do not fit, there is no term, or `out` overlaps the
            weight without being it.
    """
    check_tensor("magnitude", magnitude, tuple(weight.shape[:1]), device=weight.device)
    gain = _measure(weight, terms, magnitude, input_precision, config)
    return lora_merge_(
        weight, terms, row_gain=gain, out=out, input_precision=input_precision, config=config
    )


def _measure(
    weight: torch.Tensor,
    terms: Sequence[Term],
    magnitude: torch.Tensor | None,
    input_precision: InputPrecision,
    config: TileConfig | None,
) -> torch.Tensor:
    """Return norms, or `magnitude` divided by them."""
    if weight.ndim != 2:
        msg = f"weight: expected shape (N, K), got {tuple(weight.shape)}"
        raise ValueError(msg)
    n, k = weight.shape
    check_tensor("weight", weight, (n, k), dtypes=WIDE)
    config = config or config_for(terms, half=HALF_CONFIGS, fp32=FP32_CONFIGS)
    factors = pack_factors(terms, (n, k), config.block_r, weight.device)
    splits = max(1, -(-k // COLUMNS_PER_SPLIT))
    partial = torch.empty((splits, n), dtype=torch.float32, device=weight.device)
    result = torch.empty((n,), dtype=torch.float32, device=weight.device)
    if n == 0:
        return result
    with on_device_of(weight):
        _sum_squares(weight, factors, partial, input_precision, config)
        finish_kernel[(-(-n // BLOCK_FINISH),)](
            partial,
            magnitude,
            result,
            n,
            SPLITS=splits,
            BLOCK=BLOCK_FINISH,
            enable_fp_fusion=True,
        )
    return result


def _sum_squares(
    weight: torch.Tensor,
    factors: Factors,
    partial: torch.Tensor,
    input_precision: InputPrecision,
    config: TileConfig,
) -> None:
    n, k = weight.shape
    options = {key: value for key, value in config.options().items() if key != "GROUP_N"}
    square_sum_kernel[(-(-n // config.block_n), partial.shape[0])](
        weight,
        factors.a,
        factors.b,
        factors.scalings,
        partial,
        n,
        k,
        factors.scaling,
        weight.stride(0),
        factors.a.stride(0),
        factors.b.stride(0),
        RANK=factors.rank,
        PRECISION=input_precision,
        COLUMNS=COLUMNS_PER_SPLIT,
        **options,
    )
