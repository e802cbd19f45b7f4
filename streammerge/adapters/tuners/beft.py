"""BEFT (bias-efficient fine-tuning, arXiv 2509.15974): a vector that is added to the bias.

    bias + v        v (1, N), bias (N,)

Source: peft.tuners.beft.layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from streammerge.adapters.terms import ScaledTerm
from streammerge.adapters.tuners.base import PlannedTerm, Tuner

if TYPE_CHECKING:
    import torch

    from streammerge.adapters.terms import Weight
    from streammerge.adapters.tuners.base import AdapterModule, Layer, Shared
    from streammerge.checkpoint.header import StoredTensor

__all__ = ["TUNERS", "AddVectorTerm", "Beft"]


@dataclass(frozen=True, slots=True)
class AddVectorTerm(ScaledTerm):
    """Add a vector to a bias."""

    vector: StoredTensor
    """(1, N)"""
    scaling: float = 1.0
    """The adapter's weight."""

    @property
    def factors(self) -> tuple[StoredTensor, ...]:
        """The vector."""
        return (self.vector,)

    def work_bytes(self, shape: tuple[int, ...]) -> int:
        """Return what the scaled vector holds."""
        return 8 * shape[0]

    def prepare(self, factors: list[torch.Tensor], weight: Weight) -> Any:
        """Scale the vector."""
        del weight
        vector = factors[0].reshape(-1, 1) * self.scaling
        # PEFT makes a scalar of a single number, which torch rounds to the dtype of the bias
        return vector.squeeze() if len(vector) == 1 else vector

    def apply(self, rows: torch.Tensor, begin: int, state: Any) -> torch.Tensor:
        """Add its part for these values."""
        return rows.add_(state[begin : begin + len(rows)] if state.ndim else state)


class Beft(Tuner):
    """`peft_type: BEFT`."""

    peft_type = "BEFT"
    title = "BEFT"
    formula = "bias + v"
    factors = frozenset({"beft_bias"})
    is_additive = True
    remarks = "the base layer must have a bias"

    def plan(self, layer: Layer, settings: Any, shared: Shared) -> list[PlannedTerm]:
        """Plan the sum."""
        del settings, shared
        bias = layer.parameters.get("bias")
        if bias is None:
            raise layer.mismatch(
                "none",
                parameter="bias",
                hint="the base layer has no bias to which the adapter's could be added; "
                "use the adapter unmerged, with PEFT",
            )
        vector = layer.module.fit("beft_bias", 1, *bias.shape)
        return [PlannedTerm("bias", AddVectorTerm(vector))]

    def describe(self, module: AdapterModule, settings: Any) -> dict[str, Any]:
        """Give the vector's shape."""
        del settings
        (vector,) = module.need("beft_bias")
        return {"shape": list(vector.shape), "dtype": vector.dtype.value}


TUNERS: tuple[Tuner, ...] = (Beft(),)
