"""GPTQ: quantize a layer's inputs one after the other, and let the rest make up for each.

With the calibration inputs X (tokens, K) and `H = 2 / tokens * X^T X`, damped by a share of its
mean diagonal, and U upper triangular with `U^T U = H^-1`, for each input k in turn:

    q_k = the nearest code to w_k
    e   = (w_k - dequantize(q_k)) / U[k, k]
    w_j = w_j - e * U[k, j]                 for all j > k

What the outputs lose is the sum of all `e^2`. The scale of a group is the one, among those that
reach from all to half of its extremes, whose sum is smallest for the weights as they come in.

Source: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", 2023, algorithm 1. Inputs may be taken in the order of falling `H[k, k]`, with the
groups fixed beforehand (`act_order`), so that `g_idx` stays in order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from streammerge.errors import QuantizationError
from streammerge.quantize.linear import Grid, QuantizedLinear, search_grid

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from streammerge.quantize.linear import Decoded

__all__ = [
    "Factored",
    "GptqOptions",
    "Hessian",
    "check_inputs",
    "inverse_factor",
    "quantize_gptq",
    "relative_error",
]

# inputs that are quantized before the rest is brought up to date by one product
BLOCK = 128
# within a block, those whose effect on each other is applied at once
SUB_BLOCK = 32
# the damping is raised tenfold until the matrix is positive definite, up to this share
MOST_DAMP = 10.0
# tokens of one product, so that the copy in float32 stays small
CHUNK_TOKENS = 4096
# rows of a matrix that are permuted, or compared with their codes, at a time
CHUNK_ROWS = 512


@dataclass(frozen=True, slots=True)
class GptqOptions:
    """What changes the result of a solve."""

    grid: Grid
    group_size: int = 128
    """Inputs per group; -1 for one group per row."""
    damp: float = 0.1
    """Share of the mean diagonal that is added to the diagonal."""
    act_order: bool = True
    """Take the inputs of greatest magnitude first, with groups fixed beforehand."""
    desc_act: bool = False
    """Take them first and form the groups in that order, so that `g_idx` is not in order."""


class Hessian:
    """Accumulates `2 / tokens * X^T X` in float32."""

    def __init__(self, features: int) -> None:
        """Begin with no token.

        Args:
            features: K.
        """
        self.matrix = torch.zeros(features, features)
        self.tokens = 0

    def add(self, inputs: torch.Tensor) -> None:
        """Count inputs (..., K) in."""
        flat = inputs.reshape(-1, inputs.shape[-1])
        for begin in range(0, len(flat), CHUNK_TOKENS):
            wide = flat[begin : begin + CHUNK_TOKENS].to(torch.float32)
            count = len(wide)
            total = self.tokens + count
            self.matrix.addmm_(wide.T, wide, beta=self.tokens / total, alpha=2.0 / total)
            self.tokens = total


class Factored:
    """The matrix of inputs as the solver takes it; linears that share their inputs share it."""

    def __init__(
        self, hessian: torch.Tensor, options: GptqOptions, *, name: str = "weight"
    ) -> None:
        """Order the inputs, and factor the matrix.

        Args:
            hessian: (K, K) float32; is not changed.
            options: How.
            name: Of the first of the layers, for messages.

        Raises:
            QuantizationError: The matrix holds NaN or Inf, or is not positive definite even with
                the greatest damping.
        """
        diagonal = hessian.diagonal()
        check_inputs(diagonal, name=name)
        self.hessian = hessian
        self.is_dead = diagonal == 0
        self.order = torch.arange(len(hessian))
        if options.act_order or options.desc_act:
            self.order = torch.argsort(diagonal, descending=True, stable=True)
        self.upper = inverse_factor(hessian, self.order, self.is_dead, options.damp, name=name)


def quantize_gptq(
    weight: torch.Tensor, factored: Factored, options: GptqOptions, *, name: str = "weight"
) -> QuantizedLinear:
    """Quantize a weight.

    Args:
        weight: (N, K), any float dtype; is not changed.
        factored: The matrix of its inputs.
        options: How; as the matrix was factored.
        name: Of the layer, for messages.

    Raises:
        QuantizationError: The weight holds NaN or Inf.
    """
    rows, features = weight.shape
    group_size = features if options.group_size == -1 else options.group_size
    # by input, so that the values of one input are neighbours in memory
    work = weight.T.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    work[factored.is_dead] = 0.0
    groups = torch.arange(features) // group_size
    order = factored.order
    if options.desc_act:
        # groups of neighbours in the order of work
        groups = torch.empty_like(groups).scatter_(0, order, groups)
    # what an error of an input adds to the loss, while nothing before it has changed it
    worth = torch.empty(features)
    worth[order] = factored.upper.diagonal() ** -2
    scales, zeros = _grids(work, groups, options.grid, worth)
    if not bool(torch.isfinite(scales).all()):
        raise QuantizationError(
            f"'{name}' holds NaN, Inf, or values too large for a scale in float16",
            hint="is the base broken? it cannot be quantized as it is",
        )
    work = work[order]
    codes = torch.empty(features, rows, dtype=torch.uint8)
    of_order = groups[order]

    def grid_of(k: int) -> tuple[torch.Tensor, torch.Tensor]:
        group = of_order[k]
        return scales[group], zeros[group]

    for part, done in _solve(work, factored.upper, grid_of, options.grid):
        codes[order[part]] = done
    del work
    result = QuantizedLinear(
        codes=codes.T.contiguous(),
        scales=scales.T.contiguous(),
        zeros=zeros.T.contiguous().to(torch.int32),
        g_idx=groups.to(torch.int32),
        bits=options.grid.bits,
        group_size=group_size,
    )
    del codes
    result.relative_error = relative_error(weight, result, factored.hessian)
    return result


def relative_error(weight: torch.Tensor, quantized: Decoded, hessian: torch.Tensor) -> float:
    """Return `tr(D H D^T) / tr(W H W^T)` with D the difference: what the outputs lose."""
    before = after = 0.0
    for begin in range(0, len(weight), CHUNK_ROWS):
        rows = slice(begin, begin + CHUNK_ROWS)
        wide = weight[rows].to(torch.float32)
        before += float((wide @ hessian).mul_(wide).sum(dtype=torch.float64))
        lost = wide - quantized.dequantize(rows=rows)
        after += float((lost @ hessian).mul_(lost).sum(dtype=torch.float64))
    return after / before if before > 0 else 0.0


def _grids(
    wide: torch.Tensor, groups: torch.Tensor, grid: Grid, worth: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scales and zeros, each (groups, N)."""
    count = int(groups.max()) + 1
    scales = torch.empty(count, wide.shape[1])
    zeros = torch.empty_like(scales)
    for group in range(count):
        own = groups == group
        scales[group], zeros[group] = search_grid(wide[own].T, grid, worth[own])
    return scales, zeros


def check_inputs(diagonal: torch.Tensor, *, name: str) -> None:
    """Make sure that a matrix of inputs is one.

    Args:
        diagonal: (K,)
        name: Of the layer, for messages.

    Raises:
        QuantizationError: It holds NaN or Inf.
    """
    if not bool(torch.isfinite(diagonal).all()):
        raise QuantizationError(
            f"calibration gave inputs of '{name}' that are NaN or Inf",
            hint="the model overflows before this layer: is the base broken?",
        )


def inverse_factor(
    hessian: torch.Tensor, order: torch.Tensor, is_dead: torch.Tensor, damp: float, *, name: str
) -> torch.Tensor:
    """Return U of the damped matrix, in the order of work.

    Args:
        hessian: (K, K) float32; is not changed.
        order: (K,)
        is_dead: (K,): inputs that are always zero, whose weights are.
        damp: Share of the mean diagonal that is added to the diagonal, at least.
        name: Of the layer, for messages.

    Raises:
        QuantizationError: It is not positive definite even with the greatest damping.
    """
    mean = float(hessian.diagonal().mean())
    share = damp
    # by columns, as LAPACK has it: otherwise torch copies the largest thing in memory
    matrix = torch.empty_like(hessian).mT
    failed = torch.empty((), dtype=torch.int32)
    while True:
        for begin in range(0, len(order), CHUNK_ROWS):
            rows = slice(begin, begin + CHUNK_ROWS)
            matrix[rows] = hessian[order[rows]][:, order]
        matrix.diagonal().add_(share * mean)
        matrix.diagonal()[is_dead[order]] = 1.0
        # each step in the place of the one before
        torch.linalg.cholesky_ex(matrix, out=(matrix, failed))
        if not int(failed):
            torch.cholesky_inverse(matrix, out=matrix)
            torch.linalg.cholesky_ex(matrix, upper=True, out=(matrix, failed))
            if not int(failed):
                return matrix
        share = max(share * 10, 1e-3)
        if share > MOST_DAMP:
            raise QuantizationError(
                f"inputs of '{name}' cannot be decorrelated: too few calibration tokens?",
                expected=f"more than {hessian.shape[0]} tokens",
                hint="raise export_quantization_nsamples or export_quantization_damp",
            )


def _solve(
    work: torch.Tensor,
    upper: torch.Tensor,
    grid_of: Callable[[int], tuple[torch.Tensor, torch.Tensor]],
    grid: Grid,
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Quantize the rows of `work` (K, N) in turn; yield a block's rows and their codes.

    Args:
        work: The weight by input, in the order of work; is used up.
        upper: (K, K)
        grid_of: Scales and zeros, each (N,), of a row.
        grid: What codes there are.
    """
    features = len(work)
    for begin in range(0, features, BLOCK):
        end = min(begin + BLOCK, features)
        errors = torch.empty(end - begin, work.shape[1])
        codes = torch.empty(end - begin, work.shape[1], dtype=torch.uint8)
        for sub in range(begin, end, SUB_BLOCK):
            stop = min(sub + SUB_BLOCK, end)
            if sub > begin:
                # what the inputs before these in the block have left to make up for
                work[sub:stop] -= upper[begin:sub, sub:stop].T @ errors[: sub - begin]
            for k in range(sub, stop):
                row = work[k]
                if k > sub:
                    row = row - upper[sub:k, k] @ errors[sub - begin : k - begin]
                scale, zero = grid_of(k)
                code = torch.round(row / scale).add_(zero).clamp_(0, grid.highest)
                codes[k - begin] = code
                left = row - scale * (code - zero)
                torch.div(left, upper[k, k], out=errors[k - begin])
        yield slice(begin, end), codes
        if end < features:
            work[end:] -= upper[begin:end, end:].T @ errors
