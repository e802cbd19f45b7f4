"""Decode an MXFP4 weight, merge LoRA terms into it, and round once to a dense dtype.

    W = e2m1(code) * 2^(exponent - 127)       OUT = round( W + sum over terms of scaling * B @ A )

OUT (N, K); A (R, K); B (N, R). Two codes to a byte, the first in the lower bits; one exponent in
uint8 for 32 elements of a row, 255 for NaN. Decoding is exact, unless a GPU takes numbers below
2^-126 as zero. The bound of `merge` holds.

Source of the format: OCP Microscaling Formats (MX) Specification 1.0, 2023, 5.3.3 and 5.4.1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from streammerge_kernels.checks import (
    InputPrecision,
    check_tensor,
    on_device_of,
    pack_factors,
)
from streammerge_kernels.merge import config_for
from streammerge_kernels.tile import TileConfig, delta, find_tile

if TYPE_CHECKING:
    from collections.abc import Sequence

    from streammerge_kernels.reference import Term

__all__ = ["e2m1_to_fp32", "mxfp4_lora_merge", "mxfp4_merge_kernel"]

# The configurations are those of `merge`: `config_for`.


@triton.jit
def e2m1_to_fp32(codes: tl.tensor) -> tl.tensor:
    """Decode four-bit codes: their bits in the places of fp16's, whose bias is greater by 14.

    1 is then a subnormal of fp16, which its conversion to fp32 gets right.
    """
    bits = codes.to(tl.uint16)
    half = (((bits & 8) << 12) | ((bits & 7) << 9)).to(tl.float16, bitcast=True)
    return half.to(tl.float32) * 16384.0


@triton.jit
def e8m0_to_fp32(exponents: tl.tensor) -> tl.tensor:
    """Decode shared exponents; 2^-127 is a subnormal of fp32."""
    bits = exponents.to(tl.uint32)
    scale = tl.where(bits == 0, 0x00400000, bits << 23)
    return tl.where(bits == 255, 0x7FC00000, scale).to(tl.float32, bitcast=True)


@triton.jit
def mxfp4_merge_kernel(
    packed: tl.tensor,
    exponents: tl.tensor,
    a: tl.tensor,
    b: tl.tensor,
    scalings: tl.tensor,
    out: tl.tensor,
    n: tl.tensor,
    k: tl.tensor,
    scaling: tl.tensor,
    stride_packed: tl.tensor,
    stride_exponents: tl.tensor,
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
    """Merge one tile; K is a multiple of 32."""
    tile_row, tile_column = find_tile(n, k, BLOCK_N, BLOCK_K, GROUP_N)
    first_row = (tile_row * BLOCK_N).to(tl.int64)
    first_column = tile_column * BLOCK_K
    PAIRS: tl.constexpr = BLOCK_K // 2
    BLOCKS: tl.constexpr = BLOCK_K // 32
    rows = tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_K)
    pairs = tl.arange(0, PAIRS)
    blocks = tl.arange(0, BLOCKS)
    row_mask = rows < n - tile_row * BLOCK_N
    column_mask = columns < k - first_column
    codes = tl.load(
        packed
        + first_row * stride_packed
        + first_column // 2
        + rows[:, None] * stride_packed
        + pairs[None, :],
        mask=row_mask[:, None] & (pairs < (k - first_column) // 2)[None, :],
        other=0,
    )
    exponent = tl.load(
        exponents
        + first_row * stride_exponents
        + first_column // 32
        + rows[:, None] * stride_exponents
        + blocks[None, :],
        mask=row_mask[:, None] & (blocks < (k - first_column) // 32)[None, :],
        other=127,
    )
    scale = e8m0_to_fp32(exponent)
    spread = tl.broadcast_to(scale[:, :, None], (BLOCK_N, BLOCKS, 16))
    scale = tl.reshape(spread, (BLOCK_N, PAIRS))
    first = e2m1_to_fp32(codes & 15) * scale
    second = e2m1_to_fp32(codes >> 4) * scale
    total = tl.interleave(first, second) + delta(
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
    target = out + first_row * stride_out + first_column
    tl.store(
        target + rows[:, None] * stride_out + columns[None, :],
        total.to(out.dtype.element_ty),
        mask=row_mask[:, None] & column_mask[None, :],
    )


def mxfp4_lora_merge(
    packed: torch.Tensor,
    exponents: torch.Tensor,
    terms: Sequence[Term],
    *,
    out: torch.Tensor,
    input_precision: InputPrecision = "ieee",
    config: TileConfig | None = None,
) -> torch.Tensor:
    """Merge LoRA terms into an MXFP4 weight.

    Args:
        packed: (N, K / 2) in uint8, K a multiple of 32; on a GPU.
        exponents: (N, K / 32) in uint8.
        terms: One or more of A (R, K), B (N, R) and a scaling; bf16, fp16 or fp32.
        out: (N, K) in bf16, fp16 or fp32; rows of all of these may be apart.
        input_precision: How fp32 factors are multiplied.
        config: Shape of the tiles; from the tables of `merge` if None.

    Returns:
        `out`.

    Raises:
        TypeError: A dtype is none of those above.
        ValueError: Shapes, devices or strides do not fit, or there is no term.
    """
    if out.ndim != 2 or out.shape[1] % 32:
        msg = f"out: expected shape (N, K), K a multiple of 32, got {tuple(out.shape)}"
        raise ValueError(msg)
    n, k = out.shape
    check_tensor("out", out, (n, k))
    byte = (torch.uint8,)
    check_tensor("packed", packed, (n, k // 2), dtypes=byte, device=out.device)
    check_tensor("exponents", exponents, (n, k // 32), dtypes=byte, device=out.device)
    config = config or config_for(terms)
    factors = pack_factors(terms, (n, k), config.block_r, out.device)
    if out.numel() == 0:
        return out
    with on_device_of(out):
        mxfp4_merge_kernel[(config.tiles(n, k),)](
            packed,
            exponents,
            factors.a,
            factors.b,
            factors.scalings,
            out,
            n,
            k,
            factors.scaling,
            packed.stride(0),
            exponents.stride(0),
            factors.a.stride(0),
            factors.b.stride(0),
            out.stride(0),
            RANK=factors.rank,
            PRECISION=input_precision,
            **config.options(),
        )
    return out
