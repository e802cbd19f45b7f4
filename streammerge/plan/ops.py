"""The vocabulary of a plan: what happens to each tensor, as a closed union of plain records.

Shapes: N out_features, K in_features, R rank. A weight is (N, K), or (K, N) where it is stored
transposed (Conv1D, and embeddings seen as maps from tokens).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from streammerge.checkpoint.header import TensorSpec

if TYPE_CHECKING:
    from streammerge.checkpoint.header import StoredTensor
    from streammerge.dtypes import Dtype

__all__ = ["ApplyTerms", "BiasTerm", "Change", "CopyBytes", "LoraTerm", "Numerics", "Op",
           "TensorPlan", "Term", "rank_of"]  # fmt: skip

Numerics = Literal["peft", "fp32"]
Change = Literal["copied", "cast", "merged", "replaced", "added"]


@dataclass(frozen=True, slots=True)
class LoraTerm:
    """`scaling * B @ A`, one adapter's delta on one weight.

    With `magnitude` it is the DoRA form.
    """

    a: StoredTensor
    """(R, K)"""
    b: StoredTensor
    """(N, R)"""
    scaling: float
    """Factor of `B @ A`, an adapter's weight included."""
    is_transposed: bool
    """Whether the delta is added to a weight stored (K, N)."""
    rounds_delta: bool
    """Whether PEFT rounds the delta to the weight's dtype before it adds it (embeddings)."""
    magnitude: StoredTensor | None = None
    """(N,): rows are scaled to these norms (DoRA)."""

    @property
    def factors(self) -> tuple[StoredTensor, ...]:
        """Adapter tensors that the term reads."""
        return (self.a, self.b) if self.magnitude is None else (self.a, self.b, self.magnitude)


@dataclass(frozen=True, slots=True)
class BiasTerm:
    """`scaling * bias of B`, one adapter's delta on one bias."""

    vector: StoredTensor
    """(N,)"""
    scaling: float

    @property
    def factors(self) -> tuple[StoredTensor, ...]:
        """Adapter tensors that the term reads."""
        return (self.vector,)


Term = LoraTerm | BiasTerm


@dataclass(frozen=True, slots=True)
class CopyBytes:
    """Move the bytes as they are: never decoded, so NaN payloads and -0.0 survive."""


@dataclass(frozen=True, slots=True)
class ApplyTerms:
    """Decode to `work_dtype`, add the terms in order, encode to the output's dtype.

    Without terms it is a cast.
    """

    work_dtype: Dtype
    """The dtype the base model has in memory: where the terms are added, and rounded."""
    terms: tuple[Term, ...]


Op = CopyBytes | ApplyTerms


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """One output tensor: where it comes from, what is done to it, how it is stored."""

    name: str
    dtype: Dtype
    source: StoredTensor
    """In the base, or in an adapter that replaces or adds the tensor."""
    op: Op
    change: Change

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the output, which is that of the source."""
        return self.source.shape

    @property
    def spec(self) -> TensorSpec:
        """What is stored."""
        return TensorSpec(self.name, self.dtype, self.shape)

    @property
    def terms(self) -> tuple[Term, ...]:
        """The terms added, if any."""
        return self.op.terms if isinstance(self.op, ApplyTerms) else ()

    @property
    def nbytes(self) -> int:
        """Bytes of the output."""
        return self.spec.nbytes


def rank_of(tensor: TensorPlan) -> int:
    """Return the highest rank among a target's terms; 0 without one."""
    return max((term.a.shape[0] for term in tensor.terms if isinstance(term, LoraTerm)), default=0)
