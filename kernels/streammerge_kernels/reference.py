"""What the operations mean, in fp64: the truth that backends and kernels are tested against.

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

__all__ = [
    "E2M1_VALUES",
    "FP8_BLOCK",
    "NF4_VALUES",
    "Term",
    "dora_merge",
    "dora_row_norm",
    "fp8_decode",
    "lora_merge",
    "mxfp4_decode",
    "nf4_decode",
    "round_once",
]

Term = tuple[torch.Tensor, torch.Tensor, float]
"""A, B and the scaling of one adapter: (R, K), (N, R), and a factor."""

NF4_VALUES = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""By code. Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", 2023, appendix E."""

E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""By the lower three bits of a code; the fourth is its sign. OCP MX Specification 1.0, 5.3.3."""

FP8_BLOCK = 128
"""Rows and columns that share a scale, where scales are by block."""


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


def nf4_decode(
    packed: torch.Tensor, absmax: torch.Tensor, shape: tuple[int, int], block_size: int
) -> torch.Tensor:
    """Decode NF4 as bitsandbytes stores it: `NF4_VALUES[code] * absmax`, blocks along flat W.

    Args:
        packed: (N * K / 2,) after flattening, uint8, the first code of a pair in the upper bits.
        absmax: (ceil(N * K / block_size),) after flattening, fp32.
        shape: (N, K), with an even number of elements.
        block_size: Elements that share an absmax.

    Returns:
        (N, K) in fp64, exact.
    """
    pairs = packed.flatten().long()
    codes = torch.stack([pairs >> 4, pairs & 15], dim=1).flatten()
    values = torch.tensor(NF4_VALUES, dtype=torch.float64, device=packed.device)[codes]
    scales = absmax.flatten().double().repeat_interleave(block_size)[: codes.numel()]
    return (values * scales).view(shape)


def fp8_decode(quantized: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Decode FP8: `quantized * scale`.

    Args:
        quantized: (N, K) in float8_e4m3fn.
        scale: One of shape () or (1,), (N, 1) by row, or (ceil(N / 128), ceil(K / 128)) by block.

    Returns:
        (N, K) in fp64, exact.
    """
    n, k = quantized.shape
    scales = scale.double()
    if scale.ndim == 2 and scale.shape != (n, 1):
        scales = scales.repeat_interleave(FP8_BLOCK, 0).repeat_interleave(FP8_BLOCK, 1)[:n, :k]
    return quantized.double() * scales


def mxfp4_decode(packed: torch.Tensor, exponents: torch.Tensor) -> torch.Tensor:
    """Decode MXFP4: `e2m1 * 2^(exponent - 127)`, NaN where the exponent is 255.

    Args:
        packed: (N, K / 2), uint8, the first code of a pair in the lower bits.
        exponents: (N, K / 32), uint8.

    Returns:
        (N, K) in fp64, exact.
    """
    codes = torch.stack([packed & 15, packed >> 4], dim=2).flatten(1).long()
    signed = (*E2M1_VALUES, *(-value for value in E2M1_VALUES))
    values = torch.tensor(signed, dtype=torch.float64, device=packed.device)[codes]
    scales = torch.exp2(exponents.double() - 127)
    scales = torch.where(exponents == 255, torch.nan, scales)
    return values * scales.repeat_interleave(32, 1)


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
