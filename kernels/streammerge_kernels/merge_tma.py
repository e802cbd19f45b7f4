"""Merge LoRA terms into a dense weight, with tiles that the copy engine of sm_90 and newer moves.

    OUT = round( W + sum over terms of scaling * B @ A )

The same operation, bound and configurations as in `merge`. The engine checks the bounds of tensors
itself, so that the kernel has no masks. On other GPUs triton emulates tensor descriptors, with
scalar accesses only: that is why `merge` is another kernel.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from streammerge_kernels.checks import (
    InputPrecision,
    check_no_partial_overlap,
    check_tensor,
    on_device_of,
    pack_factors,
)
from streammerge_kernels.merge import config_for
from streammerge_kernels.tile import TileConfig, find_tile

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from streammerge_kernels.reference import Term

__all__ = ["lora_merge_tma_", "merge_tma_kernel"]


@triton.jit
def merge_tma_kernel(
    weight: tl.tensor,
    a: tl.tensor,
    b: tl.tensor,
    scalings: tl.tensor,
    out: tl.tensor,
    n: tl.tensor,
    k: tl.tensor,
    scaling: tl.tensor,
    RANK: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_N: tl.constexpr,
) -> None:
    """Merge one tile; tensors are descriptors of BLOCK_N, BLOCK_K and BLOCK_R."""
    tile_row, tile_column = find_tile(n, k, BLOCK_N, BLOCK_K, GROUP_N)
    first_row = tile_row * BLOCK_N
    first_column = tile_column * BLOCK_K
    tile_w = weight.load([first_row, first_column])
    total = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    for first in range(0, RANK, BLOCK_R):
        tile_b = b.load([first_row, first])
        tile_a = a.load([first, first_column])
        if scalings is None:
            total = tl.dot(tile_b, tile_a, total, input_precision=PRECISION)
        else:
            product = tl.dot(tile_b, tile_a, input_precision=PRECISION)
            total += tl.load(scalings + first // BLOCK_R) * product
    if scalings is None:
        total = scaling * total
    total += tile_w.to(tl.float32)
    out.store([first_row, first_column], total.to(out.dtype))


def lora_merge_tma_(
    weight: torch.Tensor,
    terms: Sequence[Term],
    *,
    out: torch.Tensor | None = None,
    input_precision: InputPrecision = "ieee",
    config: TileConfig | None = None,
) -> torch.Tensor:
    """Merge LoRA terms into a weight, in place or into `out`, on sm_90 or newer.

    Args:
        weight: (N, K) in bf16, fp16 or fp32, on a GPU, aligned; rows may be apart.
        terms: One or more of A (R, K), B (N, R) and a scaling; bf16, fp16 or fp32, aligned. Of
            several terms B is copied, so that only a single one has to be aligned.
        out: (N, K) in bf16, fp16 or fp32, aligned. The weight itself if None.
        input_precision: How fp32 factors are multiplied.
        config: Shape of the tiles; from the tables of `merge` if None.

    Returns:
        `out`, or `weight` if there is none.

    Raises:
        TypeError: A dtype is none of those above.
        ValueError: Shapes, devices or strides do not fit, pointer or rows of a tensor are not
            aligned to 16 bytes, there is no term, or `out` overlaps the weight without being it.
    """
    out = weight if out is None else out
    if weight.ndim != 2:
        msg = f"weight: expected shape (N, K), got {tuple(weight.shape)}"
        raise ValueError(msg)
    n, k = weight.shape
    check_tensor("weight", weight, (n, k))
    check_tensor("out", out, (n, k), device=weight.device)
    check_no_partial_overlap(out, weight)
    config = config or config_for(terms)
    factors = pack_factors(terms, (n, k), config.block_r, weight.device)
    if weight.numel() == 0:
        return out
    tile = [config.block_n, config.block_k]
    with on_device_of(weight):
        merge_tma_kernel[(config.tiles(n, k),)](
            _describe("weight", weight, tile),
            _describe("A", factors.a, [config.block_r, config.block_k]),
            _describe("B", factors.b, [config.block_n, config.block_r]),
            factors.scalings,
            _describe("out", out, tile),
            n,
            k,
            factors.scaling,
            RANK=factors.rank,
            PRECISION=input_precision,
            **config.options(),
        )
    return out


def _describe(name: str, tensor: torch.Tensor, block: list[int]) -> TensorDescriptor:
    """Return the descriptor of a tensor.

    Raises:
        ValueError: The tensor is not aligned.
    """
    # the stride of a single row means nothing, and torch may have any
    row_bytes = (tensor.stride(0) if tensor.shape[0] > 1 else 16) * tensor.element_size()
    if tensor.data_ptr() % 16 or row_bytes % 16:
        msg = (
            f"{name}: expected pointer and rows aligned to 16 bytes, "
            f"got address {tensor.data_ptr():#x} and {row_bytes} bytes from row to row; "
            "lora_merge_ takes any"
        )
        raise ValueError(msg)
    strides = [row_bytes // tensor.element_size(), 1]
    return TensorDescriptor(tensor, list(tensor.shape), strides, block)
