"""Merge LoRA terms into a dense weight, with one rounding.

    OUT = round( gain * (W + sum over terms of scaling * B @ A) )

W, OUT (N, K); A (R, K); B (N, R); gain (N,), by rows, fp32, 1 unless given. Everything up to the
rounding is fp32, so that for every element, with u the unit roundoff of OUT's dtype and no gain,

    |OUT - exact| <= u |exact| + (R + 3) 2^-24 (|W| + sum |scaling| |B| |A|)

to first order. An untouched weight has to be copied, not merged with zeros: -0.0 + 0.0 is +0.0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from streammerge_kernels.checks import (
    InputPrecision,
    check_no_partial_overlap,
    check_tensor,
    on_device_of,
    pack_factors,
    rank_of,
    widest_dtype,
)
from streammerge_kernels.tile import TileConfig, choose_config, delta, find_tile

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from streammerge_kernels.reference import Term

__all__ = ["FP32_CONFIGS", "HALF_CONFIGS", "config_for", "lora_merge_", "merge_kernel"]

# By the rank up to which an entry serves; the last serves all others. tests/kernels/test_compile.py
# holds them to: no spills, 128-bit accesses, tensor cores, and each target's shared memory.
HALF_CONFIGS = {
    16: TileConfig(block_n=64, block_k=128, block_r=16, num_warps=4, num_stages=3),
    32: TileConfig(block_n=64, block_k=128, block_r=32, num_warps=4, num_stages=3),
    64: TileConfig(block_n=64, block_k=128, block_r=64, num_warps=4, num_stages=3),
    256: TileConfig(block_n=64, block_k=128, block_r=64, num_warps=8, num_stages=2),
}
# fp32 products take no tensor cores on NVIDIA, and spill at 64 x 128 with four warps on sm_90, or
# at 64 x 64 with BLOCK_R 32 once there is more than one
FP32_CONFIGS = {
    16: TileConfig(block_n=64, block_k=64, block_r=16, num_warps=4, num_stages=2),
    256: TileConfig(block_n=64, block_k=64, block_r=16, num_warps=8, num_stages=2),
}


def config_for(
    terms: Sequence[Term],
    *,
    half: Mapping[int, TileConfig] = HALF_CONFIGS,
    fp32: Mapping[int, TileConfig] = FP32_CONFIGS,
) -> TileConfig:
    """Return the configuration that tables have for terms of this rank and dtype.

    Args:
        terms: The terms.
        half: By rank, for factors of 16 bits.
        fp32: By rank, where a factor is fp32.

    Raises:
        ValueError: There is no term, or one without a rank.
    """
    rank = rank_of(terms)
    return choose_config(fp32 if widest_dtype(terms) == torch.float32 else half, rank)


@triton.jit
def merge_kernel(
    weight: tl.tensor,
    a: tl.tensor,
    b: tl.tensor,
    scalings: tl.tensor,
    gain: tl.tensor,
    out: tl.tensor,
    n: tl.tensor,
    k: tl.tensor,
    scaling: tl.tensor,
    stride_w: tl.tensor,
    stride_a: tl.tensor,
    stride_b: tl.tensor,
    stride_out: tl.tensor,
    RANK: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_N: tl.constexpr,
) -> None:
    """Merge one tile; `scalings` and `gain` may be None."""
    tile_row, tile_column = find_tile(n, k, BLOCK_N, BLOCK_K, GROUP_N)
    first_row = (tile_row * BLOCK_N).to(tl.int64)
    first_column = tile_column * BLOCK_K
    rows = tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_K)
    row_mask = rows < n - tile_row * BLOCK_N
    column_mask = columns < k - first_column
    mask = row_mask[:, None] & column_mask[None, :]
    # ahead of the factors, as the one load that has to come from memory; it is not used again
    source = weight + first_row * stride_w + first_column
    tile_w = tl.load(
        source + rows[:, None] * stride_w + columns[None, :],
        mask=mask,
        other=0.0,
        eviction_policy="evict_first",
    )
    total = tile_w.to(tl.float32) + delta(
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
    if gain is not None:
        total *= tl.load(gain + first_row + rows, mask=row_mask, other=0.0)[:, None]
    target = out + first_row * stride_out + first_column
    tl.store(
        target + rows[:, None] * stride_out + columns[None, :],
        total.to(out.dtype.element_ty),
        mask=mask,
    )


def lora_merge_(
    weight: torch.Tensor,
    terms: Sequence[Term],
    *,
    row_gain: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    input_precision: InputPrecision = "ieee",
    config: TileConfig | None = None,
) -> torch.Tensor:
    """Merge LoRA terms into a weight, in place or into `out`.

    Pointers and rows that are aligned to 16 bytes are read and written 128 bits at a time. Others
    are as right, and slower.

    Args:
        weight: (N, K) in bf16, fp16 or fp32, on a GPU; rows may be apart.
        terms: One or more of A (R, K), B (N, R) and a scaling; bf16, fp16 or fp32.
        row_gain: (N,) in fp32, by which rows of the sum are multiplied before it is rounded.
        out: (N, K) in bf16, fp16 or fp32. The weight itself if None.
        input_precision: How fp32 factors are multiplied.
        config: Shape of the tiles; from the tables of this module if None.

    Returns:
        `out`, or `weight` if there is none.

    Raises:
        TypeError: A dtype is none of those above.
        ValueError: Shapes, devices or strides do not fit, there is no term, or `out` overlaps the
            weight without being it.
    """
    out = weight if out is None else out
    n, k = _check(weight, row_gain, out)
    config = config or config_for(terms)
    factors = pack_factors(terms, (n, k), config.block_r, weight.device)
    if weight.numel() == 0:
        return out
    with on_device_of(weight):
        merge_kernel[(config.tiles(n, k),)](
            weight,
            factors.a,
            factors.b,
            factors.scalings,
            row_gain,
            out,
            n,
            k,
            factors.scaling,
            weight.stride(0),
            factors.a.stride(0),
            factors.b.stride(0),
            out.stride(0),
            RANK=factors.rank,
            PRECISION=input_precision,
            **config.options(),
        )
    return out


def _check(
    weight: torch.Tensor, row_gain: torch.Tensor | None, out: torch.Tensor
) -> tuple[int, int]:
    """Check everything but the terms, and return N and K."""
    if weight.ndim != 2:
        msg = f"weight: expected shape (N, K), got {tuple(weight.shape)}"
        raise ValueError(msg)
    n, k = weight.shape
    check_tensor("weight", weight, (n, k))
    check_tensor("out", out, (n, k), device=weight.device)
    check_no_partial_overlap(out, weight)
    if row_gain is not None:
        check_tensor("row_gain", row_gain, (n,), dtypes=(torch.float32,), device=weight.device)
    return n, k
