"""The tables of bitsandbytes' codes, and which code it chooses. Imports torch."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch

from streammerge.codecs.bnb4 import NESTED_BLOCK

if TYPE_CHECKING:
    from streammerge.codecs.bnb4 import QuantType

__all__ = ["code_table", "dynamic_map", "quantize", "quantize_absmax"]

# quantiles of a normal distribution, from the appendix of the QLoRA paper
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
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
    table = code_table(quant_type)
    order = torch.argsort(table)
    bounds = (table[order[:-1]] + table[order[1:]]) / 2
    full = len(flat) - len(flat) % block
    blocks = flat[:full].view(-1, block)
    absmax = blocks.abs().amax(dim=-1)
    # the smallest divisor that bitsandbytes takes; a block of zeros gets the code of zero
    scaled = (blocks * (1.0 / absmax.clamp(min=1e-38))[:, None]).clamp_(-1, 1).flatten()
    if full < len(flat):
        # the last block, when it is not whole, is divided and not multiplied by an inverse
        rest = flat[full:].abs().amax().clamp(min=1e-38)
        absmax = torch.cat([absmax, rest[None]])
        scaled = torch.cat([scaled, (flat[full:] / rest).clamp_(-1, 1)])
    scaled = torch.nn.functional.pad(scaled, (0, len(scaled) % 2))
    codes = order[torch.bucketize(scaled, bounds, out_int32=True)].to(torch.uint8)
    return (codes[::2] << 4) | codes[1::2], absmax


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
