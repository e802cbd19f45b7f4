"""The output while adapters are applied to it: one slot per tensor."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from streammerge.adapters.terms import LoraTerm
from streammerge.errors import PlanError
from streammerge.plan.ops import ApplyTerms, Change, CopyBytes, TensorPlan

if TYPE_CHECKING:
    from streammerge.adapters.adapter import Replacement
    from streammerge.adapters.terms import Term
    from streammerge.checkpoint.header import StoredTensor
    from streammerge.dtypes import Dtype

__all__ = ["Slot"]


@dataclass(slots=True)
class Slot:
    """A tensor of the output."""

    source: StoredTensor
    work_dtype: Dtype
    change: Change = "copied"
    terms: list[Term] = field(default_factory=list)

    def copy(self) -> Slot:
        """Return a slot of the same history, to go on separately."""
        return replace(self, terms=list(self.terms))

    def add(self, term: Term) -> None:
        """Add a term.

        Raises:
            PlanError: The tensor holds codes, to which nothing can be added; or it is changed both
                by parts and as a whole, which see other rows of it.
        """
        if not self.work_dtype.is_mergeable:
            raise PlanError(
                "adapter targets a quantized tensor: a delta cannot be added to its codes",
                where=f"'{self.source.name}' of {self.source.path.parent}",
                expected="F16, BF16, F32 or F64",
                got=self.work_dtype.value,
                hint="give the unquantized base",
            )
        if len(self.source.shape) > 2 and self.terms and _is_part(term) != _is_part(self.terms[-1]):
            raise PlanError(
                "adapters change experts in one tensor by parts and as a whole",
                where=f"'{self.source.name}' of {self.source.path.parent}",
                hint="merge one of them by itself, then the others onto the result",
            )
        self.terms.append(term)
        self.change = self.change if self.change == "added" else "merged"

    def replaced_by(self, replacement: Replacement, *, name: str, rows_may_differ: bool) -> Slot:
        """Return the slot with a whole tensor of an adapter in its place.

        Args:
            replacement: The tensor.
            name: The slot's name, for messages.
            rows_may_differ: Whether the vocabulary may be resized by it.

        Raises:
            PlanError: Shape or dtype do not fit.
        """
        tensor = replacement.tensor
        fits = tensor.shape == self.source.shape or (
            rows_may_differ and tensor.shape[1:] == self.source.shape[1:]
        )
        if not fits:
            raise PlanError(
                "shape mismatch: another base?",
                where=f"key '{tensor.name}' of {tensor.path}",
                expected=f"{self.source.shape} as '{name}'",
                got=tensor.shape,
                hint="give the base that the adapter was trained on",
            )
        is_cast = tensor.dtype is not self.work_dtype
        if is_cast and not (tensor.dtype.is_mergeable and self.work_dtype.is_mergeable):
            raise PlanError(
                "adapter's tensor cannot be converted to the base's dtype",
                where=f"key '{tensor.name}' of {tensor.path}",
                expected=self.work_dtype.value,
                got=tensor.dtype.value,
            )
        change: Change = self.change if self.change == "added" else "replaced"
        return Slot(tensor, self.work_dtype, change)

    def finish(self, name: str, *, output_dtype: Dtype | None) -> TensorPlan:
        """Turn the slot into a plan."""
        dtype = self.work_dtype
        if output_dtype is not None and dtype.is_mergeable:
            dtype = output_dtype
        if not self.terms and self.source.dtype is self.work_dtype is dtype:
            return TensorPlan(name, dtype, self.source, CopyBytes(), self.change)
        change: Change = "cast" if self.change in {"copied", "decoded"} else self.change
        op = ApplyTerms(self.work_dtype, tuple(self.terms))
        return TensorPlan(name, dtype, self.source, op, change)


def _is_part(term: Term) -> bool:
    return isinstance(term, LoraTerm) and term.region is not None
