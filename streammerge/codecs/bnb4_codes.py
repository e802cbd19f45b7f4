"""The tables of bitsandbytes' codes, and which code it chooses. Imports torch."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch

from streammerge.codecs.bnb4 import NESTED_BLOCK
from streammerge.codecs.tensors import count_below

if TYPE_CHECKING:
    from streammerge.codecs.bnb4 import QuantType

__all__ = ["block_absmax", "code_table", "dynamic_map", "mean_absmax", "quantize",
           "quantize_absmax", "round_to_codes"]  # fmt: skip

# quantiles of a normal distribution, from the appendix of the QLoRA paper
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
_SMALLEST = 1e-38
_FP4_TWELFTHS = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)


@functools.cache
def code_table(quant_type: QuantType) -> torch.Tensor:
    """Return the (16,) float32 values of the codes."""
    if quant_type == "nf4":
        return torch.tensor(_NF4)
    # zero has no sign: 0 - 0 is 0
    positive = torch.tensor(_FP4_TWELFTHS)
    return torch.cat([positive, 0 - positive]) / 12


def quantize(
    flat: torch.Tensor, *, quant_type: QuantType, block: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return packed codes and absmax of values that begin with a block."""
    absmax = block_absmax(flat, block)
    scaled = _scale(flat, absmax, block)
    scaled = torch.nn.functional.pad(scaled, (0, len(scaled) % 2))
    table = code_table(quant_type)
    order = torch.argsort(table)
    codes = order.to(torch.uint8).index_select(0, _nearest(scaled, table[order]))
    return (codes[::2] << 4) | codes[1::2], absmax


def round_to_codes(
    flat: torch.Tensor, *, quant_type: QuantType, block: int, absmax: torch.Tensor | None = None
) -> torch.Tensor:
    """Return what the codes of values stand for, in float32.

    Args:
        flat: (n,) float32 values that begin with a block.
        quant_type: Which codes.
        block: Values per absmax.
        absmax: What the codes are multiplied by, where that is not the absmax that they were found
            with: it is quantized too.
    """
    own = block_absmax(flat, block)
    ordered = code_table(quant_type).sort().values
    # 0.5 ns a value where indexing takes 3.1 (one thread of a Xeon with AVX-512, torch 2.13.0)
    found = ordered.index_select(0, _nearest(_scale(flat, own, block), ordered))
    padded = torch.nn.functional.pad(found, (0, -len(found) % block)).view(-1, block)
    return padded.mul_((own if absmax is None else absmax)[:, None]).flatten()[: len(flat)]


def block_absmax(flat: torch.Tensor, block: int) -> torch.Tensor:
    """Return the largest magnitude of each block; the last block may be shorter."""
    full = len(flat) - len(flat) % block
    absmax = flat[:full].view(-1, block).abs().amax(dim=-1)
    if full == len(flat):
        return absmax
    # the smallest divisor that bitsandbytes takes
    return torch.cat([absmax, flat[full:].abs().amax().clamp(min=_SMALLEST)[None]])


def _scale(flat: torch.Tensor, absmax: torch.Tensor, block: int) -> torch.Tensor:
    """Return values in units of absmax; those of a block of zeros are zero."""
    full = len(flat) - len(flat) % block
    inverse = 1.0 / absmax[: full // block].clamp(min=_SMALLEST)
    scaled = (flat[:full].view(-1, block) * inverse[:, None]).clamp_(-1, 1).flatten()
    if full == len(flat):
        return scaled
    # the last block, when it is not whole, is divided and not multiplied by an inverse
    return torch.cat([scaled, (flat[full:] / absmax[-1]).clamp_(-1, 1)])


def _nearest(scaled: torch.Tensor, ordered: torch.Tensor) -> torch.Tensor:
    """Return the place of the nearest value in an ascending table, as int32."""
    return count_below(scaled, (ordered[:-1] + ordered[1:]) / 2).int()


@functools.cache
def dynamic_map() -> torch.Tensor:
    """Return the (256,) float32 values of bitsandbytes' signed 8-bit codes, in ascending order.

    Seven decades down from 1; the decade 10^-d has 2^(6 - d) values of each sign, the middles of
    equal steps from a tenth of it to all of it. Zero and 1 fill up the table.
    """
    values = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, (1 << (6 - decade)) + 1, dtype=torch.float32)
        middles = (10.0**-decade * ((edges[:-1] + edges[1:]) / 2)).tolist()
        values += middles + [-value for value in middles]
    return torch.tensor(sorted(values), dtype=torch.float32)


@functools.cache
def _nearest_codes() -> torch.Tensor:
    """Return the nearest code of 65536 values from -1 to 1."""
    table = dynamic_map()
    grid = torch.arange(1 << 16, dtype=torch.float32) / 65535 * 2 - 1
    return torch.bucketize(grid, (table[1:] + table[:-1]) / 2).to(torch.uint8)


def quantize_absmax(centred: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes and scales of absmax less its mean, as the CPU kernel finds them.

    The kernel does not search the nearest code of a value, but of the nearest of 65536 steps.
    """
    count = len(centred)
    blocks = torch.nn.functional.pad(centred, (0, -count % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    scales = blocks.abs().amax(dim=-1)
    scaled = (blocks * (1.0 / scales)[:, None]).clamp_(-1, 1)
    # a block of zeros has no scale; its codes are 0
    steps = torch.nan_to_num((scaled + 1).mul_(32767.5).add_(0.5).floor_(), nan=0.0)
    return _nearest_codes()[steps.int()].flatten()[:count], scales


def mean_absmax(absmax: torch.Tensor) -> torch.Tensor:
    """Return the mean, with the bits that one thread of torch gives it, whatever the threads are.

    Args:
        absmax: (2, blocks) float32, twice the same. torch shares a sum among threads, which rounds
            otherwise; of several sums each is one thread's.
    """
    return absmax.mean(dim=1)[0]
