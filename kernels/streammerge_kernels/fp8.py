"""Decode an FP8 weight, merge LoRA terms into it, and round once to a dense dtype, or to FP8 again.

    Y = Q * scale + sum over terms of scaling * B @ A
    dense:    OUT = round(Y)
    FP8:      scale' = max |Y| / 448,   Q' = e4m3(Y / scale')

Q, Y, OUT (N, K), Q in e4m3fn; A (R, K); B (N, R). A scale is for the tensor, (1,); for a row,
(N, 1); or for a block of 128 x 128, (ceil(N / 128), ceil(K / 128)). The maximum is over what shares
a scale; where it is zero, the new scale is 1. A block is one tile, whose program finds its scale.
For rows and tensors a pass before it finds the maxima, which no order of programs changes.

The bound of `merge` holds for dense results.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
import triton
import triton.language as tl

from streammerge_kernels.checks import (
    Factors,
    InputPrecision,
    check_no_partial_overlap,
    check_tensor,
    on_device_of,
    pack_factors,
)
from streammerge_kernels.e4m3 import E4M3_MAX, e4m3_to_fp32, fp32_to_e4m3
from streammerge_kernels.merge import config_for
from streammerge_kernels.reference import FP8_BLOCK
from streammerge_kernels.tile import TileConfig, delta, find_tile

if TYPE_CHECKING:
    from collections.abc import Sequence

    from streammerge_kernels.reference import Term

__all__ = [
    "FP32_BLOCK_CONFIGS",
    "HALF_BLOCK_CONFIGS",
    "fp8_lora_merge",
    "fp8_lora_requantize",
    "fp8_maximum_kernel",
    "fp8_merge_kernel",
]

# Of a merge from blocks to blocks, where a tile is a block; otherwise those of `merge`.
HALF_BLOCK_CONFIGS = {
    16: TileConfig(block_n=128, block_k=128, block_r=16, num_warps=8, num_stages=3),
    256: TileConfig(block_n=128, block_k=128, block_r=32, num_warps=8, num_stages=2),
}
FP32_BLOCK_CONFIGS = {
    256: TileConfig(block_n=128, block_k=128, block_r=16, num_warps=16, num_stages=2),
}

Granularity = Literal["tensor", "row", "block"]


@triton.jit
def fp8_tile(
    quantized: tl.tensor,
    scale: tl.tensor,
    a: tl.tensor,
    b: tl.tensor,
    scalings: tl.tensor,
    n: tl.tensor,
    k: tl.tensor,
    scaling: tl.tensor,
    stride_q: tl.tensor,
    stride_scale: tl.tensor,
    stride_a: tl.tensor,
    stride_b: tl.tensor,
    tile_row: tl.tensor,
    tile_column: tl.tensor,
    GRANULARITY: tl.constexpr,
    SIZE: tl.constexpr,
    RANK: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
) -> tl.tensor:
    """Return Y on a tile. BLOCK_N and BLOCK_K divide SIZE, the rows and columns of a block."""
    first_row = (tile_row * BLOCK_N).to(tl.int64)
    first_column = tile_column * BLOCK_K
    rows = tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_K)
    row_mask = rows < n - tile_row * BLOCK_N
    column_mask = columns < k - first_column
    codes = tl.load(
        quantized + first_row * stride_q + first_column + rows[:, None] * stride_q + columns,
        mask=row_mask[:, None] & column_mask[None, :],
        other=0,
    )
    if GRANULARITY == "tensor":
        factor = tl.load(scale)
    elif GRANULARITY == "row":
        factor = tl.load(scale + first_row + rows, mask=row_mask, other=0.0)[:, None]
    else:
        factor = tl.load(scale + first_row // SIZE * stride_scale + first_column // SIZE)
    return e4m3_to_fp32(codes) * factor + delta(
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


@triton.jit
def fp8_merge_kernel(
    quantized: tl.tensor,
    scale: tl.tensor,
    a: tl.tensor,
    b: tl.tensor,
    scalings: tl.tensor,
    out: tl.tensor,
    out_scale: tl.tensor,
    n: tl.tensor,
    k: tl.tensor,
    scaling: tl.tensor,
    stride_q: tl.tensor,
    stride_scale: tl.tensor,
    stride_a: tl.tensor,
    stride_b: tl.tensor,
    stride_out: tl.tensor,
    GRANULARITY: tl.constexpr,
    SIZE: tl.constexpr,
    RANK: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_N: tl.constexpr,
) -> None:
    """Merge one tile: to a dense dtype if `out_scale` is None, and otherwise to FP8.

    `out_scale` has the granularity of `scale`. By block it is written, with BLOCK_N and BLOCK_K
    equal to SIZE; by row or tensor it is read.
    """
    tile_row, tile_column = find_tile(n, k, BLOCK_N, BLOCK_K, GROUP_N)
    first_row = (tile_row * BLOCK_N).to(tl.int64)
    first_column = tile_column * BLOCK_K
    rows = tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_K)
    row_mask = rows < n - tile_row * BLOCK_N
    mask = row_mask[:, None] & (columns < k - first_column)[None, :]
    total = fp8_tile(
        quantized,
        scale,
        a,
        b,
        scalings,
        n,
        k,
        scaling,
        stride_q,
        stride_scale,
        stride_a,
        stride_b,
        tile_row,
        tile_column,
        GRANULARITY,
        SIZE,
        RANK,
        PRECISION,
        BLOCK_N,
        BLOCK_K,
        BLOCK_R,
    )
    target = out + first_row * stride_out + first_column
    target += rows[:, None] * stride_out + columns[None, :]
    if out_scale is None:
        tl.store(target, total.to(out.dtype.element_ty), mask=mask)
    else:
        if GRANULARITY == "block":
            # NaN stays NaN, and has no part in the scale of the others
            sizes = tl.where(mask & (total == total), tl.abs(total), 0.0)
            largest = tl.max(tl.max(sizes, axis=1), axis=0)
            factor = tl.where(largest > 0, tl.div_rn(largest, E4M3_MAX), 1.0)
            tl.store(out_scale + tile_row * stride_scale + tile_column, factor)
        elif GRANULARITY == "row":
            factor = tl.load(out_scale + first_row + rows, mask=row_mask, other=1.0)[:, None]
        else:
            factor = tl.load(out_scale)
        tl.store(target, fp32_to_e4m3(tl.div_rn(total, factor)), mask=mask)


@triton.jit
def fp8_maximum_kernel(
    quantized: tl.tensor,
    scale: tl.tensor,
    a: tl.tensor,
    b: tl.tensor,
    scalings: tl.tensor,
    maxima: tl.tensor,
    n: tl.tensor,
    k: tl.tensor,
    scaling: tl.tensor,
    stride_q: tl.tensor,
    stride_scale: tl.tensor,
    stride_a: tl.tensor,
    stride_b: tl.tensor,
    GRANULARITY: tl.constexpr,
    SIZE: tl.constexpr,
    RANK: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_N: tl.constexpr,
) -> None:
    """Find max |Y| of the rows of one tile; `maxima` is (ceil(K / BLOCK_K), N)."""
    tile_row, tile_column = find_tile(n, k, BLOCK_N, BLOCK_K, GROUP_N)
    rows = tl.arange(0, BLOCK_N)
    row_mask = rows < n - tile_row * BLOCK_N
    mask = row_mask[:, None] & (tl.arange(0, BLOCK_K) < k - tile_column * BLOCK_K)[None, :]
    total = fp8_tile(
        quantized,
        scale,
        a,
        b,
        scalings,
        n,
        k,
        scaling,
        stride_q,
        stride_scale,
        stride_a,
        stride_b,
        tile_row,
        tile_column,
        GRANULARITY,
        SIZE,
        RANK,
        PRECISION,
        BLOCK_N,
        BLOCK_K,
        BLOCK_R,
    )
    largest = tl.max(tl.where(mask & (total == total), tl.abs(total), 0.0), axis=1)
    target = maxima + tile_column.to(tl.int64) * n + tile_row * BLOCK_N
    tl.store(target + rows, largest, mask=row_mask)


def fp8_lora_merge(
    quantized: torch.Tensor,
    scale: torch.Tensor,
    terms: Sequence[Term],
    *,
    out: torch.Tensor,
    input_precision: InputPrecision = "ieee",
    config: TileConfig | None = None,
) -> torch.Tensor:
    """Merge LoRA terms into an FP8 weight, to a dense dtype.

    Args:
        quantized: (N, K) in float8_e4m3fn, on a GPU; rows may be apart.
        scale: fp32, contiguous: (1,), (N, 1), or (ceil(N / 128), ceil(K / 128)).
        terms: One or more of A (R, K), B (N, R) and a scaling; bf16, fp16 or fp32.
        out: (N, K) in bf16, fp16 or fp32; rows may be apart.
        input_precision: How fp32 factors are multiplied.
        config: Shape of the tiles, at most 128 x 128; from the tables of `merge` if None.

    Returns:
        `out`.

    Raises:
        TypeError: A dtype is none of those above.
        ValueError: Shapes, devices or strides do not fit, a tile is larger than a block, or there
            is no term.
    """
    granularity = _check(quantized, scale)
    n, k = quantized.shape
    check_tensor("out", out, (n, k), device=quantized.device)
    check_no_partial_overlap(out, quantized)
    config = config or config_for(terms)
    if max(config.block_n, config.block_k) > FP8_BLOCK:
        msg = f"config: expected tiles of at most {FP8_BLOCK} x {FP8_BLOCK}, got {config}"
        raise ValueError(msg)
    factors = pack_factors(terms, (n, k), config.block_r, quantized.device)
    _merge(_Call(quantized, scale, granularity, factors, input_precision, config), out, None)
    return out


def fp8_lora_requantize(
    quantized: torch.Tensor,
    scale: torch.Tensor,
    terms: Sequence[Term],
    *,
    out: torch.Tensor | None = None,
    input_precision: InputPrecision = "ieee",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge LoRA terms into an FP8 weight, and quantize the sum as the weight was.

    Args:
        quantized: (N, K) in float8_e4m3fn, on a GPU; rows may be apart.
        scale: fp32, contiguous: (1,), (N, 1), or (ceil(N / 128), ceil(K / 128)).
        terms: One or more of A (R, K), B (N, R) and a scaling; bf16, fp16 or fp32.
        out: (N, K) in float8_e4m3fn; may be `quantized`. New memory if None.
        input_precision: How fp32 factors are multiplied.

    Returns:
        The new codes, which are `out` if there is one, and new scales of the shape of `scale`.

    Raises:
        TypeError: A dtype is none of those above.
        ValueError: Shapes, devices or strides do not fit, there is no term, or `out` overlaps
            `quantized` without being it.
    """
    granularity = _check(quantized, scale)
    n, k = quantized.shape
    if out is None:
        out = torch.empty((n, k), dtype=quantized.dtype, device=quantized.device)
    fp8 = (torch.float8_e4m3fn,)
    check_tensor("out", out, (n, k), dtypes=fp8, device=quantized.device)
    check_no_partial_overlap(out, quantized)
    if granularity == "block":
        config = config_for(terms, half=HALF_BLOCK_CONFIGS, fp32=FP32_BLOCK_CONFIGS)
    else:
        config = config_for(terms)
    factors = pack_factors(terms, (n, k), config.block_r, quantized.device)
    call = _Call(quantized, scale, granularity, factors, input_precision, config)
    new_scale = torch.empty_like(scale) if granularity == "block" else _new_scale(call)
    _merge(call, out.view(torch.uint8), new_scale)
    return out, new_scale


@dataclass(frozen=True, slots=True)
class _Call:
    """What both kernels of a merge are launched with; checked."""

    quantized: torch.Tensor
    scale: torch.Tensor
    granularity: Granularity
    factors: Factors
    input_precision: InputPrecision
    config: TileConfig

    @property
    def grid(self) -> tuple[int]:
        return (self.config.tiles(*self.quantized.shape),)

    @property
    def inputs(self) -> tuple[torch.Tensor | None, ...]:
        factors = self.factors
        codes = self.quantized.view(torch.uint8)
        return codes, self.scale, factors.a, factors.b, factors.scalings

    @property
    def sizes(self) -> tuple[int | float, ...]:
        return (
            *self.quantized.shape,
            self.factors.scaling,
            self.quantized.stride(0),
            self.scale.stride(0),
            self.factors.a.stride(0),
            self.factors.b.stride(0),
        )

    @property
    def options(self) -> dict[str, object]:
        return {
            "GRANULARITY": self.granularity,
            "SIZE": FP8_BLOCK,
            "RANK": self.factors.rank,
            "PRECISION": self.input_precision,
            **self.config.options(),
        }


def _merge(call: _Call, out: torch.Tensor, out_scale: torch.Tensor | None) -> None:
    if out.numel() == 0:
        return
    with on_device_of(out):
        fp8_merge_kernel[call.grid](
            *call.inputs, out, out_scale, *call.sizes, out.stride(0), **call.options
        )


def _new_scale(call: _Call) -> torch.Tensor:
    """Find the scales of the sum, by row or tensor."""
    n, k = call.quantized.shape
    if n * k == 0:
        return torch.ones_like(call.scale)
    maxima = torch.empty(
        (-(-k // call.config.block_k), n), dtype=torch.float32, device=call.scale.device
    )
    with on_device_of(maxima):
        fp8_maximum_kernel[call.grid](*call.inputs, maxima, *call.sizes, **call.options)
        largest = maxima.amax(0) if call.granularity == "row" else maxima.amax()
        # divided on the device by a tensor: by a Python number torch multiplies with its inverse
        scale = largest / torch.full_like(largest, E4M3_MAX.value)
        scale = torch.where(largest > 0, scale, 1.0)
    return scale.view(call.scale.shape)


def _check(quantized: torch.Tensor, scale: torch.Tensor) -> Granularity:
    """Check codes and scales, and tell what a scale is for."""
    if quantized.ndim != 2:
        msg = f"quantized: expected shape (N, K), got {tuple(quantized.shape)}"
        raise ValueError(msg)
    n, k = quantized.shape
    check_tensor("quantized", quantized, (n, k), dtypes=(torch.float8_e4m3fn,))
    blocks = (-(-n // FP8_BLOCK), -(-k // FP8_BLOCK))
    shapes: dict[tuple[int, ...], Granularity] = {(1,): "tensor", (n, 1): "row", blocks: "block"}
    shape = tuple(scale.shape)
    if shape not in shapes or not scale.is_contiguous():
        msg = (
            f"scale: expected a contiguous tensor of shape {', '.join(map(str, shapes))}, "
            f"got {shape} with strides {scale.stride()}"
        )
        raise ValueError(msg)
    check_tensor("scale", scale, shape, dtypes=(torch.float32,), device=quantized.device)
    return shapes[shape]
