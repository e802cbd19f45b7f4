"""What the merge operations mean, in fp64: the truth that backends and kernels are tested against.

Shapes: N out_features, K in_features, R rank. Every operation converts its inputs to fp64, which is
exact, does its arithmetic there, and rounds to `out_dtype` once, to nearest, ties to even. It is
neither fast nor frugal. Inputs keep their values; the result is a new tensor on the same device.

On its way from F64 to F16 or BF16 torch passes through F32 and rounds twice. `round_once` rounds
to odd there, which leaves the second rounding the only one that counts (Boldo and Melquiond,
"Emulation of a FMA and correctly rounded sums", 2008).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Term", "dora_merge", "dora_row_norm", "lora_merge", "round_once"]

Term = tuple[torch.Tensor, torch.Tensor, float]
"""A, B and the scaling of one adapter: (R, K), (N, R), and a factor."""


def lora_merge(weight: torch.Tensor, terms: Sequence[Term], out_dtype: torch.dtype) -> torch.Tensor:
    """Add LoRA deltas to a weight: `round_once(W + sum(scaling * B @ A))`.

    Args:
        weight: (N, K), any float dtype.
        terms: One per adapter. Without terms the result is a cast.
        out_dtype: dtype of the result.

    Returns:
        (N, K) in `out_dtype`.

    Raises:
        ValueError: A shape does not fit.
    """
    total = weight.double()
    for a, b, scaling in terms:
        total = total + _delta(weight, a, b, scaling)
    return round_once(total, out_dtype)


def dora_row_norm(
    weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Measure the rows of an adapted weight: `||W + scaling * B @ A||_2` over K.

    Args:
        weight: (N, K), any float dtype.
        a: (R, K), any float dtype.
        b: (N, R), any float dtype.
        scaling: Factor of `B @ A`.

    Returns:
        (N,) in fp64.

    Raises:
        ValueError: A shape does not fit.
    """
    return _row_norm(weight.double() + _delta(weight, a, b, scaling))


def dora_merge(
    weight: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    magnitude: torch.Tensor,
    scaling: float,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Merge a DoRA adapter: with `V = W + scaling * B @ A`, `round_once(m / ||V||_2 * V)` by rows.

    No term is added to the norm, as in PEFT: a row of zeros gives NaN. Source of the formula:
    Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", 2024, equation 5.

    Args:
        weight: (N, K), any float dtype.
        a: (R, K), any float dtype.
        b: (N, R), any float dtype.
        magnitude: m, (N,), any float dtype.
        scaling: Factor of `B @ A`.
        out_dtype: dtype of the result.

    Returns:
        (N, K) in `out_dtype`.

    Raises:
        ValueError: A shape does not fit.
    """
    if magnitude.shape != weight.shape[:1]:
        msg = f"magnitude is {tuple(magnitude.shape)}, weight {tuple(weight.shape)}"
        raise ValueError(msg)
    adapted = weight.double() + _delta(weight, a, b, scaling)
    rows = magnitude.double() / _row_norm(adapted)
    return round_once(rows.unsqueeze(1) * adapted, out_dtype)


def round_once(values: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    """Round fp64 values to a narrower dtype, to nearest, ties to even, whatever lies in between.

    Args:
        values: Any shape, fp64.
        out_dtype: A float dtype of torch, of at least 16 bits.

    Returns:
        The same shape in `out_dtype`.
    """
    if out_dtype in {torch.float64, torch.float32}:
        return values.to(out_dtype)
    near = values.float()
    # to odd: of the two fp32 neighbours of an inexact value, the one whose last bit is set
    bits = near.view(torch.int32)
    is_inexact = (near.double() != values) & near.isfinite()
    is_even = (bits & 1) == 0
    # the sign bit apart, the order of the bits is that of the magnitudes
    step = torch.where(near.double().abs() < values.abs(), 1, -1).to(torch.int32)
    odd = torch.where(is_inexact & is_even, bits + step, bits)
    return odd.view(torch.float32).to(out_dtype)


def _delta(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
    """Return `scaling * B @ A`, (N, K) in fp64."""
    fits = weight.ndim == a.ndim == b.ndim == 2 and a.shape[0] == b.shape[1]
    if not fits or weight.shape != (b.shape[0], a.shape[1]):
        msg = (
            f"weight is {tuple(weight.shape)}, A {tuple(a.shape)}, B {tuple(b.shape)}; "
            "expected (N, K), (R, K), (N, R)"
        )
        raise ValueError(msg)
    return scaling * (b.double() @ a.double())


def _row_norm(adapted: torch.Tensor) -> torch.Tensor:
    norm: torch.Tensor = torch.linalg.vector_norm(adapted, dim=1)
    return norm
