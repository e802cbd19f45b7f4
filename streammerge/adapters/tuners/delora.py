"""DeLoRA: a low-rank delta whose parts have their lengths taken off, and a common one put on.

    d_k = lambda / r / (||A_k|| * ||B_k||)      norms of rows of A and columns of B, at least 1e-4
    W += (B @ diag(d) @ A) * w                  rounded before it is added

w (K,) holds the norms of the columns of the weight that training began with. They are stored, so
that the delta does not depend on the weight it is added to.

Source: peft.tuners.delora, Bini et al. 2025, "Decoupling Angles and Strength in Low-rank
Adaptation" (arXiv:2503.18225). Shapes: N out_features, K in_features, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from streammerge.adapters.options import first_match
from streammerge.adapters.terms import ScaledTerm
from streammerge.adapters.tuners.base import PlannedTerm, Tuner
from streammerge.adapters.tuners.dense import check_rank, linear_size
from streammerge.errors import AdapterError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from streammerge.adapters.options import Options
    from streammerge.adapters.terms import Weight
    from streammerge.adapters.tuners.base import AdapterModule, Layer, Shared
    from streammerge.checkpoint.header import StoredTensor

__all__ = ["TUNERS", "Delora", "DeloraTerm"]

_LEAST_NORM = 1e-4


@dataclass(frozen=True, slots=True)
class DeloraTerm(ScaledTerm):
    """Add the delta of fixed length."""

    a: StoredTensor
    """(R, K)"""
    b: StoredTensor
    """(N, R)"""
    strength: StoredTensor
    """(1,): lambda."""
    column_norms: StoredTensor
    """(K,)"""
    scaling: float = 1.0

    @property
    def factors(self) -> tuple[StoredTensor, ...]:
        """The factors, lambda, and the norms."""
        return (self.a, self.b, self.strength, self.column_norms)

    def work_bytes(self, shape: tuple[int, ...]) -> int:
        """Return what B with its scales takes, and A and B while they are measured."""
        rows, columns = shape
        rank = self.a.shape[0]
        return 8 * rank * (2 * rows + columns + 2 * rank)

    def prepare(self, factors: list[torch.Tensor], weight: Weight) -> Any:
        """Scale the columns of B."""
        import torch  # noqa: PLC0415 (planning needs no torch)

        del weight
        a, b, strength, column_norms = factors
        lengths = a.norm(dim=1).clamp(min=_LEAST_NORM) * b.norm(dim=0).clamp(min=_LEAST_NORM)
        scales = strength / a.shape[0] / lengths
        # as a product with a matrix, which PEFT has it be: a zero keeps no sign
        return b @ torch.diag(scales), a, column_norms

    def apply(self, rows: torch.Tensor, begin: int, state: Any) -> torch.Tensor:
        """Add the rows of the delta."""
        b, a, column_norms = state
        delta = (b[begin : begin + len(rows)] @ a).mul_(column_norms)
        if self.scaling != 1.0:
            delta.mul_(self.scaling)
        return rows.add_(delta.to(rows.dtype))


@dataclass(frozen=True, slots=True)
class _Settings:
    rank: int
    rank_pattern: dict[str, int]

    def rank_of(self, module: str) -> int:
        """Return the rank that a module was trained with."""
        rank: int = first_match(self.rank_pattern, module, self.rank)
        return rank


class Delora(Tuner):
    """`peft_type: DELORA`."""

    peft_type = "DELORA"
    title = "DeLoRA"
    formula = "W + (B @ diag(lambda / r / (||A_k|| ||B_k||)) @ A) * w_norm"
    factors = frozenset({"delora_A", "delora_B", "delora_lambda", "delora_w_norm"})
    options = frozenset({"delora_lambda", "lambda_pattern", "module_dropout", "r", "rank_pattern"})
    is_additive = True

    def read(self, options: Options) -> _Settings:
        """Read the ranks; lambda's start is in the file what training made of it."""
        return _Settings(options.count("r", 8), options.pattern("rank_pattern", whole=True))

    def check(self, module: AdapterModule, settings: _Settings) -> None:
        """Check the factors against each other and against the configuration.

        Raises:
            AdapterError: They do not fit.
        """
        a, b, strength, column_norms = _tensors(module)
        fits = len(a.shape) == len(b.shape) == 2 and a.shape[0] == b.shape[1]
        if not fits or strength.shape != (1,) or column_norms.shape != a.shape[1:]:
            raise AdapterError(
                "factors of the adapter do not belong together",
                where=module.where,
                got=f"delora_A {a.shape}, delora_B {b.shape}, delora_lambda {strength.shape}, "
                f"delora_w_norm {column_norms.shape}",
            )
        check_rank(module, a.shape[0], expected=settings.rank_of(module.module))

    def plan(self, layer: Layer, settings: _Settings, shared: Shared) -> Sequence[PlannedTerm]:
        """Plan the addition of the delta."""
        del settings, shared
        size = linear_size(layer)
        a, b, strength, column_norms = _tensors(layer.module)
        if (b.shape[0], a.shape[1]) != size:
            raise layer.mismatch(f"delora_A {a.shape}, delora_B {b.shape}")
        return [PlannedTerm("weight", DeloraTerm(a, b, strength, column_norms))]

    def describe(self, module: AdapterModule, settings: _Settings) -> dict[str, Any]:
        """Give the rank and the delta's shape."""
        del settings
        a, b, *_ = _tensors(module)
        return {
            "rank": a.shape[0],
            "shape": [b.shape[0], a.shape[1]],
            "dtype": a.dtype.value,
        }


TUNERS: tuple[Tuner, ...] = (Delora(),)


def _tensors(module: AdapterModule) -> list[StoredTensor]:
    return module.need("delora_A", "delora_B", "delora_lambda", "delora_w_norm")
