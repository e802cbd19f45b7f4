"""What every kernel does with its tile: find it, and compute the delta that belongs on it.

    delta = sum over terms of scaling * B @ A          (fp32, on a tile of BLOCK_N x BLOCK_K)

Shapes: N out_features, K in_features, R rank. One program owns one tile of the output, so no result
depends on the order in which programs run. Offsets of a tile are 64 bit, offsets inside it 32 bit.

Kernels take the factors as `Factors` holds them. One term has a scalar `scaling`, applied after the
sum over its rank. Of several terms the ranks lie one behind the other, each padded to BLOCK_R, and
`scalings` holds one factor per BLOCK_R: a product is scaled in fp32 before it joins the sum, so
that no factor is rounded on the way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict

import triton
import triton.language as tl

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["LaunchOptions", "TileConfig", "choose_config", "delta", "find_tile"]

ROWS_OF_TILES_TOGETHER = 8


class LaunchOptions(TypedDict):
    """Keyword arguments of a launch that a `TileConfig` decides."""

    BLOCK_N: int
    BLOCK_K: int
    BLOCK_R: int
    GROUP_N: int
    num_warps: int
    num_stages: int
    enable_fp_fusion: bool


@dataclass(frozen=True, slots=True)
class TileConfig:
    """Shape of a tile, and how many warps work on it."""

    block_n: int
    block_k: int
    block_r: int
    """Rank that one `tl.dot` covers; at least 16, the least that tensor cores take."""
    num_warps: int
    num_stages: int

    def options(self) -> LaunchOptions:
        """Return the keyword arguments of a launch.

        Triton changes its default of `enable_fp_fusion` in 3.10; given here, bits stay.
        """
        return LaunchOptions(
            BLOCK_N=self.block_n,
            BLOCK_K=self.block_k,
            BLOCK_R=self.block_r,
            GROUP_N=ROWS_OF_TILES_TOGETHER,
            num_warps=self.num_warps,
            num_stages=self.num_stages,
            enable_fp_fusion=True,
        )

    def tiles(self, n: int, k: int) -> int:
        """Count the tiles of an (N, K) tensor."""
        return -(-n // self.block_n) * -(-k // self.block_k)


def choose_config(table: Mapping[int, TileConfig], rank: int) -> TileConfig:
    """Return the entry of the least key that is `rank` or more, or else of the greatest key."""
    fitting = [limit for limit in table if rank <= limit]
    return table[min(fitting, default=max(table))]


@triton.jit
def find_tile(
    n: tl.tensor,
    k: tl.tensor,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_N: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Return the row and the column of this program's tile, counted in tiles.

    GROUP_N rows of tiles are walked column by column: the tiles that run together then share rows
    of B and columns of A in L2.
    """
    tile_rows = tl.cdiv(n, BLOCK_N)
    tile_columns = tl.cdiv(k, BLOCK_K)
    program = tl.program_id(0)
    per_group = GROUP_N * tile_columns
    first = program // per_group * GROUP_N
    height = min(tile_rows - first, GROUP_N)
    within = program % per_group
    return first + within % height, within // height


@triton.jit
def delta(
    b: tl.tensor,
    a: tl.tensor,
    scaling: tl.tensor,
    scalings: tl.tensor,
    stride_b: tl.tensor,
    stride_a: tl.tensor,
    row_mask: tl.tensor,
    column_mask: tl.tensor,
    RANK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tl.tensor:
    """Return the fp32 delta of a tile; `b` and `a` point at its first row and first column."""
    rows = tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    # a loop, not unrolled: at rank 256 an unrolled one spills 16 registers on sm_80
    for first in range(0, RANK, BLOCK_R):
        ranks = first + tl.arange(0, BLOCK_R)
        mask_b = row_mask[:, None]
        mask_a = column_mask[None, :]
        if RANK % BLOCK_R != 0:
            mask_b = mask_b & (ranks < RANK)[None, :]
            mask_a = mask_a & (ranks < RANK)[:, None]
        tile_b = tl.load(b + rows[:, None] * stride_b + ranks[None, :], mask=mask_b, other=0.0)
        row_a = ranks.to(tl.int64)[:, None] * stride_a
        tile_a = tl.load(a + row_a + columns[None, :], mask=mask_a, other=0.0)
        if scalings is None:
            total = tl.dot(tile_b, tile_a, total, input_precision=PRECISION)
        else:
            product = tl.dot(tile_b, tile_a, input_precision=PRECISION)
            total += tl.load(scalings + first // BLOCK_R) * product
    if scalings is None:
        total = scaling * total
    return total
