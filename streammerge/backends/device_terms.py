"""What is merged on a GPU, and the factors of these targets there.

Shapes: N out_features, K in_features, R rank. On the device a term is `scaling * b @ a` with a
(R, columns) and b (rows, R) of the weight as it is stored: of a weight stored (K, N) the factors
change places, and are transposed once, when they are loaded.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch

from streammerge.backends.torch_factors import LoraFactors, load_term_factors
from streammerge.codecs.tensors import torch_dtype
from streammerge.dtypes import Dtype
from streammerge.plan.ops import ApplyTerms, BiasTerm, LoraTerm

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from streammerge.checkpoint.header import StoredTensor
    from streammerge.plan.ops import Numerics, TensorPlan, Term

__all__ = ["DeviceTerm", "Place", "find_place", "load_device_terms"]

_KERNEL_DTYPES = (Dtype.BF16, Dtype.F16, Dtype.F32)
_HALF_DTYPES = (Dtype.BF16, Dtype.F16)
# rows that kernels take are at most as far apart
_MOST_COLUMNS = 2**23


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """Where a target is merged, and why not by a kernel."""

    where: Literal["kernel", "torch", "cpu"]
    """By a kernel, by torch on the device, or by the CPU's backend."""
    reason: str = ""


@dataclass(frozen=True, slots=True)
class DeviceTerm:
    """One term of a target, as it is added to the stored rows of a region."""

    a: torch.Tensor
    """(R, columns of the region)"""
    b: torch.Tensor
    """(rows of the region, R)"""
    scaling: float
    rounds_delta: bool = False
    """Whether the delta is rounded to the weight's dtype before it is added."""
    magnitude: torch.Tensor | None = None
    """(rows,) in F32 or F64: the norms that DoRA gives to the rows."""
    rows: range | None = None
    """Of the region; None for all."""
    columns: range | None = None

    def moved(self, move: Callable[[torch.Tensor], torch.Tensor]) -> DeviceTerm:
        """Return the term with its tensors elsewhere."""
        magnitude = None if self.magnitude is None else move(self.magnitude)
        return replace(self, a=move(self.a), b=move(self.b), magnitude=magnitude)


def find_place(target: TensorPlan, *, numerics: Numerics, has_kernels: bool) -> Place:
    """Decide where a target is merged.

    Args:
        target: The target.
        numerics: What a merge rounds, and when.
        has_kernels: Whether the device runs them.
    """
    for reason in _against_device(target):
        return Place("cpu", reason)
    if not has_kernels:
        return Place("torch", "no kernels")
    for reason in _against_kernels(target, numerics):
        return Place("torch", reason)
    return Place("kernel")


def _against_device(target: TensorPlan) -> list[str]:
    """Say what only the CPU's backend does."""
    op = target.op
    assert isinstance(op, ApplyTerms)
    found = []
    if target.encoding is not None:
        found.append("writes codes")
    if not op.terms:
        found.append("only changes its dtype")
    for term in op.terms:
        if isinstance(term, LoraTerm):
            if term.needs_scan:
                found.append("DoRA on a weight stored (K, N)")
            if term.magnitude is not None and term.region is not None:
                found.append("DoRA on a part of a weight")
        elif not isinstance(term, BiasTerm):
            found.append(type(term).__name__)
    known = (*_KERNEL_DTYPES, Dtype.F64)
    found += [f"{d.value} weights" for d in _dtypes(target) if d not in known]
    return found


def _against_kernels(target: TensorPlan, numerics: Numerics) -> list[str]:
    """Say what no kernel does, of what torch does on the device."""
    dtypes = _dtypes(target)
    found = []
    if Dtype.F64 in dtypes:
        found.append("F64 weights")
    if len(set(dtypes)) > 1:
        found.append("changes its dtype")
    if target.columns > _MOST_COLUMNS:
        found.append("rows too long")
    is_narrow = Dtype.F32 not in dtypes
    terms = [term for term in target.terms if isinstance(term, LoraTerm)]
    if len(terms) < len(target.terms):
        found.append("biases")
    if any(term.region is not None and term.region.columns.step != 1 for term in terms):
        found.append("columns that lie apart")
    if is_narrow and numerics == "fp32" and len(terms) > 1 and not _can_fold(terms):
        found.append("several terms of which not all are added to the same part")
    return found


def _dtypes(target: TensorPlan) -> list[Dtype]:
    assert isinstance(target.op, ApplyTerms)
    return [target.source.dtype, target.op.work_dtype, target.dtype]


def _can_fold(terms: list[LoraTerm]) -> bool:
    return all(term.magnitude is None and term.region == terms[0].region for term in terms)


def load_device_terms(
    target: TensorPlan, raw: Mapping[StoredTensor, bytearray], *, place: Place, numerics: Numerics
) -> list[DeviceTerm]:
    """Return the terms of a target for a device, their tensors still on the host.

    Args:
        target: The target, with parts of factors in the place of these.
        raw: Bytes of each factor.
        place: Where it is merged.
        numerics: With `fp32` all terms that a kernel adds are one, which is rounded once.
    """
    assert isinstance(target.op, ApplyTerms)
    compute = torch.float64 if target.op.work_dtype is Dtype.F64 else torch.float32
    rounds = numerics == "peft" and target.op.work_dtype in _HALF_DTYPES
    terms = [_load(term, raw, compute, rounds=rounds) for term in target.terms]
    if place.where == "kernel" and numerics == "fp32" and len(terms) > 1:
        loras = [term for term in target.terms if isinstance(term, LoraTerm)]
        return [_fold(terms)] if _can_fold(loras) else terms
    return terms


def _load(
    term: Term, raw: Mapping[StoredTensor, bytearray], compute: torch.dtype, *, rounds: bool
) -> DeviceTerm:
    loaded = load_term_factors(term, raw, compute)
    if isinstance(term, BiasTerm):
        # a bias is a matrix of one column, and as such a product of rank one
        return DeviceTerm(torch.ones((1, 1), dtype=compute), loaded[0].view(-1, 1), term.scaling)
    assert isinstance(term, LoraTerm)
    assert isinstance(loaded, LoraFactors)
    a, b = loaded.a, loaded.b
    if _is_as_stored(term):
        dtype = torch.promote_types(
            torch_dtype(term.a.tensor.dtype), torch_dtype(term.b.tensor.dtype)
        )
        a, b = a.to(dtype), b.to(dtype)
    if term.is_transposed:
        a, b = b.T.contiguous(), a.T.contiguous()
    region = term.region
    return DeviceTerm(
        a,
        b,
        term.scaling,
        term.rounds_delta and rounds,
        loaded.magnitude,
        None if region is None else region.rows,
        None if region is None else region.columns,
    )


def _is_as_stored(term: LoraTerm) -> bool:
    """Tell whether 16 bits hold the factors exactly: products of them are exact on tensor cores."""
    factors = (term.a, term.b)
    is_changed = any(factor.is_changed for factor in factors) or term.gain is not None
    return not is_changed and all(factor.tensor.dtype in _HALF_DTYPES for factor in factors)


def _fold(terms: list[DeviceTerm]) -> DeviceTerm:
    """Return the sum of terms as one; a scaling moves into its B, whose rounding is one of F32."""
    return DeviceTerm(
        torch.cat([term.a.float() for term in terms]),
        torch.cat([term.b.float() * term.scaling for term in terms], dim=1),
        1.0,
        rows=terms[0].rows,
        columns=terms[0].columns,
    )
