"""The vocabulary of a plan: what happens to each tensor, as a closed union of plain records."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from math import lcm, prod
from typing import TYPE_CHECKING, Literal

from streammerge.adapters.terms import BiasTerm, LoraTerm, Region, Term, TunerTerm
from streammerge.checkpoint.header import StoredTensor, TensorSpec

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from streammerge.codecs.base import Codec, CodedWeight, Encoder
    from streammerge.dtypes import Dtype

__all__ = ["ApplyTerms", "BiasTerm", "Change", "CopyBytes", "Encoding", "LoraTerm", "Numerics",
           "Op", "TensorPlan", "Term", "TunerTerm", "kind_of", "rank_of",
           "unique_factors"]  # fmt: skip

Numerics = Literal["peft", "fp32"]
Change = Literal["copied", "decoded", "cast", "merged", "replaced", "added", "quantized"]


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
class Encoding:
    """How a weight is stored as codes, several tensors of them."""

    codec: Codec
    dtype: Dtype
    """Of the values that are encoded."""
    weight: CodedWeight
    """The layout. Its first part holds the codes, row after row; the others describe these."""
    row_step: int
    """Multiples of this are where rows may be divided."""
    held_bytes: int
    """What has to be in memory from the weight's first row to its last."""
    together: tuple[TensorPlan, ...] = ()
    """Other weights that loaders join with it, so that a scale of the whole has to be the same."""

    @classmethod
    def of(cls, codec: Codec, tensor: TensorPlan) -> Encoding:
        """Return how a codec stores a tensor.

        Raises:
            UnsupportedError: It cannot.
        """
        encoder = codec.encoder(tensor.name, tensor.shape, tensor.dtype)
        parts = encoder.weight.parts
        step = lcm(encoder.row_step, encoder.weight.row_step)
        held = encoder.held_bytes + sum(part.tensor.nbytes for part in parts[1:])
        return cls(codec, tensor.dtype, encoder.weight, step, held)

    def encoder(self) -> Encoder:
        """Return an encoder that has seen nothing yet."""
        return self.codec.encoder(self.weight.name, self.weight.shape, self.dtype)

    def code_bytes(self, begin: int, end: int) -> int:
        """Return the bytes of the codes of rows."""
        role = self.weight.parts[0].role
        return sum(e.total_bytes for e in self.weight.extents(begin, end) if e.role == role)


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """One output weight: where it comes from, what is done to it, how it is stored."""

    name: str
    dtype: Dtype
    """Of its values."""
    source: StoredTensor
    """In the base, or in an adapter that replaces or adds the tensor."""
    op: Op
    change: Change
    encoding: Encoding | None = None
    """How its values are stored; None as they are, in one tensor of its name."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the output, which is that of the source."""
        return self.source.shape

    @property
    def rows(self) -> int:
        """Rows of the matrix as which the tensor is cut into tiles.

        All but the last dimension are rows, so that tiles of fused experts are small too; but where
        terms see a tensor of more dimensions as a matrix of `shape[0]` rows (convolutions), so do
        the tiles.
        """
        if not self.shape:
            return 1
        return prod(self.shape[:-1]) if self._splits_deep else self.shape[0]

    @property
    def columns(self) -> int:
        """Columns of that matrix."""
        return self.shape[-1] if self._splits_deep else prod(self.shape[1:])

    @property
    def _splits_deep(self) -> bool:
        if len(self.shape) < 3:
            return False
        return all(isinstance(term, LoraTerm) and term.region is not None for term in self.terms)

    def parts(self) -> Iterator[TensorPlan]:
        """Yield what is merged by itself: each expert of a fused tensor, else all of the tensor.

        A term on a region is for one expert, so that the factors of one are all that have to be in
        memory; experts without a term pass through.
        """
        if not self.terms or not self._splits_deep or not self.nbytes:
            yield self
            return
        rows = prod(self.shape[1:-1])
        terms: defaultdict[int, list[LoraTerm]] = defaultdict(list)
        for term in self.terms:
            assert isinstance(term, LoraTerm)
            assert term.region is not None
            terms[term.region.rows.start // rows].append(term)
        for number in range(self.shape[0]):
            yield self._expert(number, terms[number], rows)

    def part(self, number: int) -> TensorPlan | None:
        """Return one matrix of a tensor (E, rows, columns) by itself.

        Returns:
            None if something is done to the tensor as a whole.
        """
        if not isinstance(self.op, CopyBytes):
            found = list(self.parts())
            return found[number] if len(found) == self.shape[0] else None
        return replace(self, name=f"{self.name}[{number}]", source=self._matrix(number))

    def _matrix(self, number: int) -> StoredTensor:
        """Return where one matrix of a tensor (E, ..., columns) is stored."""
        shape = (prod(self.shape[1:-1]), self.columns)
        offset = self.source.offset + number * self.source.dtype.nbytes(prod(shape))
        return replace(self.source, shape=shape, offset=offset)

    def _expert(self, number: int, terms: list[LoraTerm], rows: int) -> TensorPlan:
        """Return one matrix of a fused tensor, with the terms' regions counted from its first row.

        A region that is all of it is none.
        """
        shape = (rows, self.columns)
        assert isinstance(self.op, ApplyTerms)
        source, work_dtype = self._matrix(number), self.op.work_dtype
        dtype = source.dtype
        name = f"{self.name}[{number}]"
        if not terms and dtype is work_dtype is self.dtype:
            return TensorPlan(name, dtype, source, CopyBytes(), "copied")
        moved = []
        for term in terms:
            assert term.region is not None
            first = term.region.rows.start - number * rows
            inside = Region(range(first, first + len(term.region.rows)), term.region.columns)
            is_all = inside == Region(range(rows), range(shape[1]))
            moved.append(replace(term, region=None if is_all else inside))
        return TensorPlan(
            name, self.dtype, source, ApplyTerms(work_dtype, tuple(moved)), self.change
        )

    @property
    def output(self) -> TensorSpec:
        """Its values, however they are stored."""
        return TensorSpec(self.name, self.dtype, self.shape)

    @property
    def specs(self) -> tuple[TensorSpec, ...]:
        """What is stored."""
        if self.encoding is None:
            return (self.output,)
        parts = [part.tensor for part in self.encoding.weight.parts]
        return tuple(TensorSpec(part.name, part.dtype, part.shape) for part in parts)

    @property
    def terms(self) -> tuple[Term, ...]:
        """The terms added, if any."""
        return self.op.terms if isinstance(self.op, ApplyTerms) else ()

    @property
    def nbytes(self) -> int:
        """Bytes of the output."""
        return sum(spec.nbytes for spec in self.specs)


def rank_of(tensor: TensorPlan) -> int:
    """Return the highest rank among a target's terms; 0 without one."""
    return max((term.rank for term in tensor.terms if isinstance(term, LoraTerm)), default=0)


def kind_of(name: str) -> str:
    """Return a tensor's name without its layer: `q_proj`, `lm_head`."""
    parts = [part for part in name.split(".") if not part.isdigit()]
    return parts[-2] if parts[-1] == "weight" and len(parts) > 1 else ".".join(parts[-2:])


def unique_factors(terms: Iterable[Term]) -> list[StoredTensor]:
    """Return the adapter tensors that terms read, each once."""
    return list(dict.fromkeys(factor for term in terms for factor in term.factors))
