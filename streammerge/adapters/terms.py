"""Terms: what one adapter does to one tensor, as records that a plan can hold.

`LoraTerm` and `BiasTerm` are all that most adapters need, and every backend has its own arithmetic
for them. Everything else is a `TunerTerm`, which brings its arithmetic along, written in torch.

Shapes: N out_features, K in_features, R rank. A weight is (N, K), or (K, N) where it is stored
transposed (Conv1D, and embeddings seen as maps from tokens). Tensors of more dimensions count as
matrices of `shape[0]` rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from streammerge.errors import PlanError

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from streammerge.checkpoint.header import StoredTensor

__all__ = [
    "BiasTerm",
    "Factor",
    "LoraTerm",
    "Region",
    "ScaledTerm",
    "Term",
    "TunerTerm",
    "Weight",
    "not_a_sum",
]


@dataclass(frozen=True, slots=True)
class Factor:
    """A matrix that a term multiplies: an adapter's tensor, or a part of it.

    The stored tensor is seen as a matrix of `shape[0]` rows; then, in this order: rows and columns
    are selected, blocks are spread along a diagonal, columns are repeated.
    """

    tensor: StoredTensor
    rows: range | None = None
    columns: range | None = None
    diagonal_blocks: int = 1
    """The rows are this many blocks, each with columns of its own (block-diagonal LoRA)."""
    column_repeats: int = 1
    """Each column stands for this many (QA-LoRA, whose inputs are pooled)."""
    gain: float = 1.0

    @property
    def is_part(self) -> bool:
        """Whether it is a part of the tensor."""
        return self.rows is not None or self.columns is not None

    @property
    def is_changed(self) -> bool:
        """Whether its values are others than those of the tensor, or elsewhere."""
        return self.diagonal_blocks > 1 or self.column_repeats > 1 or self.gain != 1.0

    @property
    def is_whole(self) -> bool:
        """Whether it is the tensor as it stands."""
        return not self.is_part and not self.is_changed

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the matrix."""
        rows = len(self.rows) if self.rows is not None else self.tensor.shape[0]
        stored = prod(self.tensor.shape[1:])
        columns = len(self.columns) if self.columns is not None else stored
        return rows, columns * self.diagonal_blocks * self.column_repeats


@dataclass(frozen=True, slots=True)
class Region:
    """A part of a target, seen as a matrix of `shape[0] * ... * shape[-2]` rows: one expert's."""

    rows: range
    """A contiguous range."""
    columns: range


@dataclass(frozen=True, slots=True)
class LoraTerm:
    """`scaling * B @ A`, one adapter's delta on one weight, or on a region of it.

    With `magnitude` it is the DoRA form.
    """

    a: Factor
    """(R, K)"""
    b: Factor
    """(N, R)"""
    scaling: float
    """Factor of `B @ A`, an adapter's weight included."""
    is_transposed: bool
    """Whether the delta is added to a weight stored (K, N)."""
    rounds_delta: bool
    """Whether PEFT rounds the delta to the weight's dtype before it adds it (embeddings)."""
    magnitude: StoredTensor | None = None
    """(N,): rows of the weight as (N, K) are scaled to these norms (DoRA)."""
    gain: StoredTensor | None = None
    """(R,): multiplies the columns of B (KaSA)."""
    region: Region | None = None
    """Where the delta goes; None for the whole weight."""

    @property
    def factors(self) -> tuple[StoredTensor, ...]:
        """Adapter tensors that the term reads."""
        vectors = [vector for vector in (self.magnitude, self.gain) if vector is not None]
        return (self.a.tensor, self.b.tensor, *vectors)

    @property
    def rank(self) -> int:
        """R."""
        return self.a.shape[0]

    @property
    def is_additive(self) -> bool:
        """Whether the term adds something that does not depend on the weight."""
        return self.magnitude is None

    def scaled(self, weight: float) -> LoraTerm:
        """Return `weight` times the term.

        Raises:
            PlanError: The term is not something to be added.
        """
        if self.magnitude is not None and weight != 1.0:
            raise not_a_sum("DoRA")
        return replace(self, scaling=self.scaling * weight)

    def work_bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes needed beyond the factors: B with its gains, and the norms of stored columns.

        A weight of a single column has all of its values in memory while its norm is taken.
        """
        gained = 8 * prod(self.b.shape) if self.gain is not None else 0
        columns = prod(shape[1:])
        norms = 3 * 8 * (columns if columns > 1 else shape[0])
        return gained + (norms if self.needs_scan else 0)

    @property
    def needs_scan(self) -> bool:
        """Whether all of the weight is looked at before the first tile is merged."""
        return self.magnitude is not None and self.is_transposed


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

    @property
    def is_additive(self) -> bool:
        """Whether the term adds something that does not depend on the weight."""
        return True

    def scaled(self, weight: float) -> BiasTerm:
        """Return `weight` times the term."""
        return replace(self, scaling=self.scaling * weight)

    def work_bytes(self, shape: tuple[int, ...]) -> int:  # noqa: ARG002 (a term's interface)
        """Bytes needed beyond the factors."""
        return 0


class Weight(Protocol):
    """A whole target as a term finds it: after the terms before it, not cut into tiles."""

    shape: tuple[int, ...]
    """As stored."""
    dtype: torch.dtype
    """Of the values: the weight's own, or the compute dtype with `numerics: fp32`."""
    compute_dtype: torch.dtype
    """Of the factors: float64 for an F64 weight, else float32."""

    def tiles(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield the first row and the values of one piece of rows after the other, each (n, K).

        A piece is overwritten when the next one is asked for.
        """

    def whole(self) -> torch.Tensor:
        """Return all of it as one new matrix of `shape[0]` rows."""

    def rows(self, begin: int, end: int) -> torch.Tensor:
        """Return some of its rows, read again; in `apply` too, whose own rows it may write over."""


class TunerTerm(ABC):
    """What an adapter of another kind than LoRA does to one tensor.

    Subclasses are frozen dataclasses. Their methods import torch where they need it, and do what
    PEFT does with a weight of the same dtype, so that they round where it rounds: with
    `numerics: fp32` they are given weights in the compute dtype, where nothing is rounded.
    """

    __slots__ = ()

    depends_on_threads: ClassVar[bool] = False
    """Whether the bits of `prepare` depend on torch's threads, as those of LAPACK do: then it runs
    with as many as torch had before, which is what PEFT has.
    """

    @property
    @abstractmethod
    def factors(self) -> tuple[StoredTensor, ...]:
        """Adapter tensors that the term reads."""

    @property
    def is_additive(self) -> bool:
        """Whether the term adds what does not depend on the weight; then `scaled` works."""
        return False

    def work_bytes(self, shape: tuple[int, ...]) -> int:  # noqa: ARG002 (an interface)
        """Return the most bytes that `prepare` holds at a time, beyond the factors in float64.

        Args:
            shape: Shape of the target as stored.
        """
        return 0

    def prepare(self, factors: list[torch.Tensor], weight: Weight) -> Any:  # noqa: ARG002
        """Return what every tile needs; called once per target, before its first tile.

        Args:
            factors: The adapter's tensors in the order of `self.factors`, in their stored shapes;
                floating-point ones in the compute dtype.
            weight: The whole target, for terms that have to look at all of it first.
        """
        return factors

    @abstractmethod
    def apply(self, rows: torch.Tensor, begin: int, state: Any) -> torch.Tensor:
        """Return rows `begin, begin + 1, ...` of the target with the term applied.

        The result must not depend on how the target is cut into tiles of four rows or more.

        Args:
            rows: (n, K); a vector's values are n rows of one column. May be overwritten.
            begin: Number of the first row.
            state: What `prepare` returned. Several threads use it at the same time.

        Returns:
            (n, K) in the dtype of `rows`.
        """

    def scaled(self, weight: float) -> TunerTerm:
        """Return `weight` times the term.

        Raises:
            PlanError: The term is not something to be added.
        """
        if weight != 1.0:
            raise not_a_sum(type(self).__name__)
        return self


class ScaledTerm(TunerTerm):
    """A tuner's term that adds `scaling` times what does not depend on the weight.

    Subclasses have the field `scaling`.
    """

    __slots__ = ()

    scaling: float

    @property
    def is_additive(self) -> bool:
        """It is."""
        return True

    def scaled(self, weight: float) -> TunerTerm:
        """Return `weight` times the term."""
        term: Any = self
        scaled: TunerTerm = replace(term, scaling=self.scaling * weight)
        return scaled


Term = LoraTerm | BiasTerm | TunerTerm


def not_a_sum(kind: str) -> PlanError:
    """Say that a kind of adapter cannot be weighted."""
    return PlanError(
        f"adapter_weights cannot be used with {kind}: its result is not a sum",
        hint="leave adapter_weights out to merge one adapter after the other",
    )
