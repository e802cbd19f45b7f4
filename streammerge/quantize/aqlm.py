"""AQLM: stand in for groups of weights by sums of codebook entries.

With the calibration inputs X and `H = 2 / tokens X^T X`, damped by a share of its mean diagonal,
codes, codebooks and a scale for each row are chosen in turn, each to make

    tr((W - W^) H (W - W^)^T)

smaller: codes by a beam search that has the groups behind a group make up for it, codebooks by
least squares, scales likewise. A row takes new codes only where they lose less than its old ones,
so that no step loses more than the one before it.

Source: Egiazarian et al., "Extreme Compression of Large Language Models via Additive Quantization",
2024, sections 3.2 and 3.3 (phases 1 and 2). Its beam search looks at what is lost with the groups
behind as they are; here it is what is lost with them at their best, as in GPTQ: for two linears of
SmolLM2-135M, the same codebooks ended a fifth lower. Its phase 3, which tunes the codebooks of a
whole layer together, is not done.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from streammerge.errors import QuantizationError
from streammerge.quantize.aqlm_fit import fit_books, fit_scales, losses
from streammerge.quantize.aqlm_search import Beam, Triangle, columns_of, search
from streammerge.quantize.aqlm_start import start_books, start_scales
from streammerge.quantize.codebooks import CodebookLinear
from streammerge.quantize.gptq import check_inputs, inverse_factor, relative_error

if TYPE_CHECKING:
    from streammerge.config.codebooks import Codebooks

__all__ = ["AqlmOptions", "CodebookInputs", "quantize_aqlm"]


@dataclass(frozen=True, slots=True)
class AqlmOptions:
    """What changes the result."""

    codebooks: Codebooks
    damp: float = 0.05
    """Share of the mean diagonal that is added to the diagonal."""
    seed: int = 0
    rounds: int = 6
    """Searches and fits, at most."""
    least_gain: float = 0.02
    """A round that loses less by no more than this share is the last."""
    beam: Beam = field(default_factory=lambda: Beam(survivors=1, picks=8))
    """Of the rounds."""
    last_beam: Beam = field(default_factory=lambda: Beam(survivors=1, picks=16))
    """Of the search that chooses codes for the codebooks and scales as they are stored."""


class CodebookInputs:
    """The matrix of inputs, damped, and its factor; linears that share their inputs share it."""

    def __init__(self, hessian: torch.Tensor, options: AqlmOptions, *, name: str) -> None:
        """Damp and factor the matrix.

        Args:
            hessian: (K, K) float32; is used up.
            options: How.
            name: Of the first of the layers, for messages.

        Raises:
            QuantizationError: The matrix holds NaN or Inf, or is not positive definite even with
                the greatest damping.
        """
        diagonal = hessian.diagonal()
        check_inputs(diagonal, name=name)
        # inputs that are always zero take nothing from the output, whatever their weights
        self.damping = options.damp * float(diagonal.mean()) or 1.0
        diagonal.add_(self.damping)
        self.matrix = hessian
        size = options.codebooks.group_size
        of_group = diagonal.view(-1, size).sum(dim=1)
        order = torch.argsort(of_group, descending=True, stable=True)
        is_dead = torch.zeros(len(hessian), dtype=torch.bool)
        upper = inverse_factor(hessian, columns_of(order, size), is_dead, 0.0, name=name)
        self.triangle = Triangle.of(order, upper)

    def relative_error(self, weight: torch.Tensor, linear: CodebookLinear) -> float:
        """Return what the outputs lose, without the damping."""
        diagonal = self.matrix.diagonal()
        diagonal.sub_(self.damping)
        found = relative_error(weight, linear, self.matrix)
        diagonal.add_(self.damping)
        return found


def quantize_aqlm(
    weight: torch.Tensor, inputs: CodebookInputs, options: AqlmOptions, *, name: str = "weight"
) -> CodebookLinear:
    """Quantize a weight.

    Args:
        weight: (N, K), any float dtype; is not changed.
        inputs: The matrix of its inputs.
        options: How; as the matrix was factored.
        name: Of the layer, for messages.

    Raises:
        QuantizationError: The weight holds NaN, Inf, or values for which float16 has no scale.
    """
    shape = options.codebooks
    scales = start_scales(weight)
    if not bool(torch.isfinite(scales.half()).all()):
        raise QuantizationError(
            f"'{name}' holds NaN, Inf, or values too large for a scale in float16",
            hint="is the base broken? it cannot be quantized as it is",
        )
    books = start_books(
        weight,
        scales,
        inputs.matrix.diagonal(),
        shape=(shape.count, shape.entries, shape.group_size),
        generator=torch.Generator().manual_seed(options.seed),
    )
    groups = weight.shape[1] // shape.group_size
    codes = torch.zeros(len(weight), groups, shape.count, dtype=torch.int32)
    linear = CodebookLinear(codes, books, scales)
    last = float("inf")
    for _ in range(options.rounds):
        _choose(weight, inputs, linear, options.beam)
        linear.books = fit_books(weight, inputs.matrix, linear)
        linear.scales = fit_scales(weight, inputs.matrix, linear)
        lost = float(losses(weight, inputs.matrix, linear).sum())
        if lost > (1 - options.least_gain) * last:
            break
        last = lost
    linear.books, linear.scales = linear.books.half().float(), linear.scales.half().float()
    if not bool(torch.isfinite(linear.books).all() & torch.isfinite(linear.scales).all()):
        raise QuantizationError(
            f"codebooks of '{name}' are too large for float16",
            hint="raise export_quantization_damp or export_quantization_nsamples",
        )
    _choose(weight, inputs, linear, options.last_beam)
    linear.relative_error = inputs.relative_error(weight, linear)
    return linear


def _choose(
    weight: torch.Tensor, inputs: CodebookInputs, linear: CodebookLinear, beam: Beam
) -> None:
    """Give rows new codes where they lose less than those that they have."""
    old = losses(weight, inputs.matrix, linear)
    before = linear.codes
    linear.codes = search(weight, linear.books, linear.scales, inputs.triangle, beam)
    is_worse = losses(weight, inputs.matrix, linear) > old
    linear.codes[is_worse] = before[is_worse]
