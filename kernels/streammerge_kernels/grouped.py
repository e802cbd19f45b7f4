"""Merge one LoRA term each into many small weights, in one launch.

    OUT[e] = round( W[e] + scaling[e] * B[e] @ A[e] )      for e in 0..E-1

W[e], OUT[e] (N[e], K[e]) contiguous; A[e] (R, K[e]); B[e] (N[e], R). Shapes may differ, dtypes and
the rank may not. Launches cost about as much as the smallest experts take, so all tiles of all
weights are one grid: a table in device memory holds the pointers and shapes, another the number of
tiles before each weight, in which a program searches for its own.

The bound of `merge` holds for every weight.
"""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from streammerge_kernels.checks import (
    InputPrecision,
    check_no_partial_overlap,
    check_tensor,
    on_device_of,
)
from streammerge_kernels.merge import HALF_CONFIGS
from streammerge_kernels.tile import TileConfig, choose_config, delta

if TYPE_CHECKING:
    from collections.abc import Sequence

    from streammerge_kernels.reference import Term

__all__ = ["FP32_CONFIGS", "grouped_lora_merge_", "grouped_merge_kernel"]

# As in `merge`, but for fp32 at ranks of more than one block: the pointers and shapes, which are in
# registers here, leave too few for a tile of 64 x 64.
FP32_CONFIGS = {
    16: TileConfig(block_n=64, block_k=64, block_r=16, num_warps=4, num_stages=2),
    256: TileConfig(block_n=32, block_k=64, block_r=16, num_warps=4, num_stages=2),
}

TRITON_DTYPES = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
}


@triton.jit
def grouped_merge_kernel(
    table: tl.tensor,
    first_tiles: tl.tensor,
    scalings: tl.tensor,
    experts: tl.tensor,
    WEIGHT_DTYPE: tl.constexpr,
    FACTOR_DTYPE: tl.constexpr,
    OUT_DTYPE: tl.constexpr,
    STEPS: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
    RANK: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
) -> None:
    """Merge one tile of one weight.

    `table` is (E, 6): pointers to W, A, B and OUT, then N and K. 2^STEPS is at least E.
    """
    program = tl.program_id(0)
    expert = 0
    beyond = experts
    for _ in tl.static_range(STEPS):
        middle = (expert + beyond) // 2
        is_before = tl.load(first_tiles + middle) <= program
        expert = tl.where(is_before, middle, expert)
        beyond = tl.where(is_before, beyond, middle)
    entry = table + expert * 6
    weight = tl.load(entry).to(tl.pointer_type(WEIGHT_DTYPE))
    a = tl.load(entry + 1).to(tl.pointer_type(FACTOR_DTYPE))
    b = tl.load(entry + 2).to(tl.pointer_type(FACTOR_DTYPE))
    out = tl.load(entry + 3).to(tl.pointer_type(OUT_DTYPE))
    n = tl.load(entry + 4).to(tl.int32)
    k = tl.load(entry + 5).to(tl.int32)
    if IS_ALIGNED:
        # arguments of a launch are looked at, numbers from memory are not: without this there is
        # no 128-bit access
        weight = tl.multiple_of(weight, 16)
        a = tl.multiple_of(a, 16)
        b = tl.multiple_of(b, 16)
        out = tl.multiple_of(out, 16)
        k = tl.multiple_of(k, 16)
    local = program - tl.load(first_tiles + expert)
    tile_columns = tl.cdiv(k, BLOCK_K)
    first_row = (local // tile_columns * BLOCK_N).to(tl.int64)
    first_column = local % tile_columns * BLOCK_K
    rows = tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_K)
    row_mask = rows < n - local // tile_columns * BLOCK_N
    column_mask = columns < k - first_column
    mask = row_mask[:, None] & column_mask[None, :]
    place = first_row * k + first_column
    inside = rows[:, None] * k + columns[None, :]
    tile_w = tl.load(weight + place + inside, mask=mask, other=0.0)
    total = tile_w.to(tl.float32) + delta(
        b + first_row * RANK,
        a + first_column,
        tl.load(scalings + expert),
        None,
        RANK,
        k,
        row_mask,
        column_mask,
        RANK,
        BLOCK_N,
        BLOCK_K,
        BLOCK_R,
        PRECISION,
    )
    tl.store(out + place + inside, total.to(OUT_DTYPE), mask=mask)


def grouped_lora_merge_(
    weights: Sequence[torch.Tensor],
    terms: Sequence[Term],
    *,
    out: Sequence[torch.Tensor] | None = None,
    input_precision: InputPrecision = "ieee",
    config: TileConfig | None = None,
) -> Sequence[torch.Tensor]:
    """Merge one term into each of many weights, in place or into `out`, in one launch.

    Args:
        weights: E of (N, K), contiguous, all of one dtype: bf16, fp16 or fp32.
        terms: E of A (R, K), B (N, R) and a scaling, contiguous, all of one dtype and rank.
        out: E of (N, K), contiguous, all of one dtype. The weights themselves if None.
        input_precision: How fp32 factors are multiplied.
        config: Shape of the tiles; from the tables of this module if None.

    Returns:
        `out`, or `weights` if there is none. Memory of all arguments has to live until the launch
        is done, as for any kernel; the tables belong to the current stream.

    Raises:
        TypeError: A dtype is none of those above, or differs from that of the first.
        ValueError: Numbers, shapes, ranks, devices or strides do not fit, or an `out` overlaps its
            weight without being it.
    """
    out = weights if out is None else out
    if not len(weights) == len(terms) == len(out):
        counts = f"{len(weights)}, {len(terms)} and {len(out)}"
        msg = f"expected as many weights, terms and out, got {counts}"
        raise ValueError(msg)
    if not weights:
        return out
    rank = terms[0][0].shape[0]
    for index in range(len(weights)):
        _check_expert(index, weights, terms, out)
    factor_dtype = terms[0][0].dtype
    tables = FP32_CONFIGS if factor_dtype == torch.float32 else HALF_CONFIGS
    config = config or choose_config(tables, rank)
    tiles = [config.tiles(*weight.shape) for weight in weights]
    first_tiles = list(accumulate(tiles, initial=0))
    if not first_tiles[-1]:
        return out
    rows = [
        (w.data_ptr(), a.data_ptr(), b.data_ptr(), o.data_ptr(), *w.shape)
        for w, (a, b, _), o in zip(weights, terms, out, strict=True)
    ]
    device = weights[0].device
    options = {key: value for key, value in config.options().items() if key != "GROUP_N"}
    with on_device_of(weights[0]):
        grouped_merge_kernel[(first_tiles[-1],)](
            torch.tensor(rows, dtype=torch.int64).to(device),
            torch.tensor(first_tiles, dtype=torch.int32).to(device),
            torch.tensor([float(s) for _, _, s in terms], dtype=torch.float32).to(device),
            len(weights),
            WEIGHT_DTYPE=TRITON_DTYPES[weights[0].dtype],
            FACTOR_DTYPE=TRITON_DTYPES[factor_dtype],
            OUT_DTYPE=TRITON_DTYPES[out[0].dtype],
            STEPS=(len(weights) - 1).bit_length(),
            IS_ALIGNED=all(value % 16 == 0 for row in rows for value in (*row[:4], row[5])),
            RANK=rank,
            PRECISION=input_precision,
            **options,
        )
    return out


def _check_expert(
    index: int,
    weights: Sequence[torch.Tensor],
    terms: Sequence[Term],
    out: Sequence[torch.Tensor],
) -> None:
    """Check one weight and what belongs to it, given the first."""
    weight, (a, b, _) = weights[index], terms[index]
    rank = terms[0][0].shape[0]
    if weight.ndim != 2 or rank == 0:
        msg = (
            f"weights[{index}]: expected shape (N, K) and a rank above 0, "
            f"got {tuple(weight.shape)} and {rank}"
        )
        raise ValueError(msg)
    n, k = weight.shape
    device = weights[0].device
    check_tensor("weights[0]", weights[0], tuple(weights[0].shape))
    parts = (
        (f"weights[{index}]", weight, (n, k), weights[0]),
        (f"terms[{index}]: A", a, (rank, k), terms[0][0]),
        (f"terms[{index}]: B", b, (n, rank), terms[0][0]),
        (f"out[{index}]", out[index], (n, k), out[0]),
    )
    check_tensor("terms[0]: A", terms[0][0], tuple(terms[0][0].shape), device=device)
    check_tensor("out[0]", out[0], tuple(out[0].shape), device=device)
    for name, tensor, shape, first in parts:
        check_tensor(name, tensor, shape, dtypes=(first.dtype,), device=device)
        if not tensor.is_contiguous():
            msg = f"{name}: expected a contiguous tensor, got strides {tensor.stride()}"
            raise ValueError(msg)
    check_no_partial_overlap(out[index], weight)
