"""Uni-LoRA: the entries of all factors are those of one trained vector, each with a scale.

    W + B @ A        A = t[i_A] * s_A (R, K), B = t[i_B] * s_B (N, R), t (d,)

With save_indices the file has the indices i and the scales s. Without, which is PEFT's default, it
has t alone, and not even the names of the layers: the indices are dealt out to all factors of the
model in the order in which it has its layers, which no file says. Such an adapter is refused.

Sources: peft.tuners.unilora; Li et al. 2025, "Uni-LoRA: One Vector is All You Need". Shapes:
N out_features, K in_features, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from streammerge.adapters.tuners.base import PlannedTerm, Tuner
from streammerge.adapters.tuners.dense import check_rank, linear_size
from streammerge.adapters.tuners.seeded import ProductTerm, check_indices, fit_shared
from streammerge.errors import AdapterError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from streammerge.adapters.options import Options
    from streammerge.adapters.terms import Weight
    from streammerge.adapters.tuners.base import AdapterModule, Layer, Shared
    from streammerge.checkpoint.header import StoredTensor

__all__ = ["TUNERS", "UniLora", "UniLoraTerm"]

_VECTOR = "unilora_theta_d"
_NAMES = ("unilora_indices_A", "unilora_indices_B", "unilora_scales_A", "unilora_scales_B")


@dataclass(frozen=True, slots=True)
class UniLoraTerm(ProductTerm):
    """Add the product of two factors made of one vector."""

    vector: StoredTensor
    """(d,)"""
    indices: tuple[StoredTensor, StoredTensor]
    """Of A and of B."""
    scales: tuple[StoredTensor, StoredTensor]

    @property
    def factors(self) -> tuple[StoredTensor, ...]:
        """The vector, and what the factors are made with."""
        return (self.vector, *self.indices, *self.scales)

    def work_bytes(self, shape: tuple[int, ...]) -> int:
        """Return the bytes of both factors before they are scaled and after, and of indices."""
        del shape
        return 24 * sum(prod(indices.shape) for indices in self.indices)

    def matrices(
        self, factors: list[torch.Tensor], weight: Weight
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take the entries and scale them."""
        del weight
        vector, *rest = factors
        a, b = (
            vector[check_indices(indices, stored, count=len(vector))].mul_(scales)
            for indices, stored, scales in zip(rest[:2], self.indices, rest[2:], strict=True)
        )
        return a, b


@dataclass(frozen=True, slots=True)
class _Settings:
    rank: int
    length: int


class UniLora(Tuner):
    """`peft_type: UNILORA`."""

    peft_type = "UNILORA"
    title = "Uni-LoRA"
    formula = "W + B @ A, of entries of one vector"
    factors = frozenset(_NAMES)
    shared = frozenset({_VECTOR})
    options = frozenset(
        {
            "init_theta_d_bound", "proj_seed", "r", "save_indices", "theta_d_length",
            "unilora_dropout",
        }
    )  # fmt: skip
    is_additive = True
    remarks = "with save_indices only"

    def read(self, options: Options) -> _Settings:
        """Read the sizes.

        Raises:
            AdapterError: The file does not say which layers it is for.
        """
        if not options.flag("save_indices"):
            raise AdapterError(
                "adapter was saved without its indices: they depend on the order of the model's "
                "layers, which its files do not say",
                where=options.path,
                expected="save_indices: true",
                hint="set save_indices to true in its configuration, load it with PEFT on its "
                "base, and save it again",
            )
        return _Settings(options.count("r", 4), options.count("theta_d_length", 256))

    def check(self, module: AdapterModule, settings: _Settings) -> None:
        """Check indices and scales against each other and against the configuration.

        Raises:
            AdapterError: They do not fit.
        """
        of_a, of_b, *scales = module.need(*_NAMES)
        for indices, at, scale in zip((of_a, of_b), (0, 1), scales, strict=True):
            if len(indices.shape) != 2 or scale.shape != indices.shape:
                raise AdapterError(
                    "indices and scales of the adapter do not belong together",
                    where=module.where,
                    got=f"'{indices.name}' {indices.shape}, '{scale.name}' {scale.shape}",
                )
            check_rank(module, indices.shape[at], expected=settings.rank)
            if indices.dtype.kind != "int" or scale.dtype.kind != "float":
                raise AdapterError(
                    "adapter tensor has a dtype that it cannot have",
                    where=module.where,
                    expected="whole numbers for indices, others for scales",
                    got=f"{indices.dtype.value} and {scale.dtype.value}",
                )

    def plan(self, layer: Layer, settings: _Settings, shared: Shared) -> Sequence[PlannedTerm]:
        """Plan the product."""
        of_a, of_b, scale_a, scale_b = layer.module.need(*_NAMES)
        if (of_b.shape[0], of_a.shape[1]) != linear_size(layer, allows_conv1d=True):
            raise layer.mismatch(f"unilora_indices_A {of_a.shape}, unilora_indices_B {of_b.shape}")
        vector = fit_shared(layer, shared, _VECTOR, settings.length)
        term = UniLoraTerm(layer.is_transposed, vector, (of_a, of_b), (scale_a, scale_b))
        return [PlannedTerm("weight", term)]

    def describe(self, module: AdapterModule, settings: _Settings) -> dict[str, Any]:
        """Give the rank, the number of trained numbers, and the delta's shape."""
        of_a, of_b, scales, _ = module.need(*_NAMES)
        return {
            "rank": settings.rank,
            "theta_d_length": settings.length,
            "shape": [of_b.shape[0], of_a.shape[1]],
            "dtype": scales.dtype.value,
        }


TUNERS: tuple[Tuner, ...] = (UniLora(),)
