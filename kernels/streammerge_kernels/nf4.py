"""Decode an NF4 weight, merge LoRA terms into it, and round once to a dense dtype.

    W = NF4_VALUES[code] * absmax[block]      OUT = round( W + sum over terms of scaling * B @ A )

OUT (N, K); A (R, K); B (N, R). Codes and blocks run along the flattened weight, as bitsandbytes has
them: two codes to a byte, the first in the upper bits, one fp32 absmax for every `block_size`
elements. An absmax that is quantized itself has to be decoded before. The product with the absmax
is fp32, and is not rounded to a 16-bit dtype before the sum. The bound of `merge` holds.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
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
from streammerge_kernels.reference import NF4_VALUES
from streammerge_kernels.tile import TileConfig, delta, find_tile

if TYPE_CHECKING:
    from collections.abc import Sequence

    from streammerge_kernels.reference import Term

__all__ = ["Nf4Weight", "nf4_lora_merge", "nf4_merge_kernel"]

# The configurations are those of `merge`: `config_for`.


@dataclass(frozen=True, slots=True)
class Nf4Weight:
    """An NF4 weight as bitsandbytes stores it."""

    packed: torch.Tensor
    """N * K / 2 pairs of codes in uint8, contiguous, of any shape; on a GPU."""
    absmax: torch.Tensor
    """(ceil(N * K / block_size),) in fp32, contiguous."""
    block_size: int = 64
    """Elements that share an absmax: a power of two, 32 or more."""


@triton.jit
def nf4_look_up(values: tl.tensor, codes: tl.tensor) -> tl.tensor:
    """Return the values of codes of any shape; `values` holds 16 of them in registers."""
    flat = tl.reshape(codes.to(tl.int32), (codes.shape[0] * codes.shape[1],))
    return tl.reshape(tl.gather(values, flat, 0), (codes.shape[0], codes.shape[1]))


@triton.jit
def nf4_merge_kernel(
    packed: tl.tensor,
    absmax: tl.tensor,
    values: tl.tensor,
    a: tl.tensor,
    b: tl.tensor,
    scalings: tl.tensor,
    out: tl.tensor,
    n: tl.tensor,
    k: tl.tensor,
    scaling: tl.tensor,
    stride_a: tl.tensor,
    stride_b: tl.tensor,
    stride_out: tl.tensor,
    BLOCK_SIZE: tl.constexpr,
    HAS_WHOLE_BLOCKS: tl.constexpr,
    RANK: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_N: tl.constexpr,
) -> None:
    """Merge one tile; K is even. HAS_WHOLE_BLOCKS: BLOCK_SIZE divides K and BLOCK_K."""
    tile_row, tile_column = find_tile(n, k, BLOCK_N, BLOCK_K, GROUP_N)
    first_row = (tile_row * BLOCK_N).to(tl.int64)
    first_column = tile_column * BLOCK_K
    PAIRS: tl.constexpr = BLOCK_K // 2
    rows = tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_K)
    pairs = tl.arange(0, PAIRS)
    row_mask = rows < n - tile_row * BLOCK_N
    column_mask = columns < k - first_column
    pair_mask = row_mask[:, None] & (pairs < (k - first_column) // 2)[None, :]
    codes = tl.load(
        packed
        + first_row * (k // 2)
        + first_column // 2
        + rows[:, None] * (k // 2)
        + pairs[None, :],
        mask=pair_mask,
        other=0,
    )
    if HAS_WHOLE_BLOCKS:
        # one absmax for BLOCK_SIZE columns, instead of one load of it for every pair
        BLOCKS: tl.constexpr = BLOCK_K // BLOCK_SIZE
        blocks = tl.arange(0, BLOCKS)
        per_row = k // BLOCK_SIZE
        scale = tl.load(
            absmax
            + first_row * per_row
            + first_column // BLOCK_SIZE
            + rows[:, None] * per_row
            + blocks[None, :],
            mask=row_mask[:, None] & (blocks < per_row - first_column // BLOCK_SIZE)[None, :],
            other=0.0,
        )
        spread = tl.broadcast_to(scale[:, :, None], (BLOCK_N, BLOCKS, BLOCK_SIZE // 2))
        scale = tl.reshape(spread, (BLOCK_N, PAIRS))
    else:
        # a block has an even number of elements, so that a pair is never in two
        element = (first_row + rows)[:, None] * k + first_column + 2 * pairs[None, :]
        scale = tl.load(absmax + element // BLOCK_SIZE, mask=pair_mask, other=0.0)
    table = tl.load(values + tl.arange(0, 16))
    first = nf4_look_up(table, codes >> 4) * scale
    second = nf4_look_up(table, codes & 15) * scale
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


@cache
def _values_on(device: torch.device) -> torch.Tensor:
    return torch.tensor(NF4_VALUES, dtype=torch.float32, device=device)


def nf4_lora_merge(
    weight: Nf4Weight,
    terms: Sequence[Term],
    *,
    out: torch.Tensor,
    input_precision: InputPrecision = "ieee",
    config: TileConfig | None = None,
) -> torch.Tensor:
    """Merge LoRA terms into an NF4 weight.

    Args:
        weight: Codes and absmax of an (N, K) weight, K even.
        terms: One or more of A (R, K), B (N, R) and a scaling; bf16, fp16 or fp32.
        out: (N, K) in bf16, fp16 or fp32; rows may be apart.
        input_precision: How fp32 factors are multiplied.
        config: Shape of the tiles; from the tables of `merge` if None.

    Returns:
        `out`.

    Raises:
        TypeError: A dtype is none of those above.
        ValueError: Shapes, devices or strides do not fit, K is odd, the block size is not a power
            of two from 32, or there is no term.
    """
    n, k = _check(weight, out)
    config = config or config_for(terms)
    factors = pack_factors(terms, (n, k), config.block_r, out.device)
    if out.numel() == 0:
        return out
    with on_device_of(out):
        nf4_merge_kernel[(config.tiles(n, k),)](
            weight.packed,
            weight.absmax,
            _values_on(out.device),
            factors.a,
            factors.b,
            factors.scalings,
            out,
            n,
            k,
            factors.scaling,
            factors.a.stride(0),
            factors.b.stride(0),
            out.stride(0),
            BLOCK_SIZE=weight.block_size,
            HAS_WHOLE_BLOCKS=(k | config.block_k) % weight.block_size == 0,
            RANK=factors.rank,
            PRECISION=input_precision,
            **config.options(),
        )
    return out


def _check(weight: Nf4Weight, out: torch.Tensor) -> tuple[int, int]:
    """Check everything but the terms, and return N and K."""
    if out.ndim != 2 or out.shape[1] % 2:
        msg = f"out: expected shape (N, K) with an even K, got {tuple(out.shape)}"
        raise ValueError(msg)
    if weight.block_size < 32 or weight.block_size.bit_count() != 1:
        msg = f"block_size: expected a power of two from 32, got {weight.block_size}"
        raise ValueError(msg)
    n, k = out.shape
    check_tensor("out", out, (n, k))
    if weight.packed.numel() != n * k // 2 or not weight.packed.is_contiguous():
        msg = (
            f"packed: expected {n * k // 2} contiguous bytes, "
            f"got shape {tuple(weight.packed.shape)} with strides {weight.packed.stride()}"
        )
        raise ValueError(msg)
    shape = tuple(weight.packed.shape)
    check_tensor("packed", weight.packed, shape, dtypes=(torch.uint8,), device=out.device)
    blocks = -(-n * k // weight.block_size)
    check_tensor("absmax", weight.absmax, (blocks,), dtypes=(torch.float32,), device=out.device)
    return n, k
