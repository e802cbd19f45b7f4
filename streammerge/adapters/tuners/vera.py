"""VeRA and PVeRA: all layers share two random matrices, and train vectors that scale their rows.

    W + (b[:, None] * B[:N]) @ (d[:, None] * A[:, :K])      A (R, K'), B (N', R), b (N,), d (R,)

N' and K' are the largest among the adapter's layers. PVeRA has 2R rows of A and entries of d, of
which the first half gives the mean and the other the variance: merged is the mean.

An adapter without A and B (save_projection: false) has them drawn again from its seed, A first.
PEFT converts them to the dtype of the layers then, so that the base has to have the dtype of the
one that was trained.

Sources: peft.tuners.vera, peft.tuners.pvera; Kopiczko et al. 2023, "VeRA: Vector-based Random
Matrix Adaptation". Shapes: N out_features, K in_features, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from streammerge.adapters.tuners.base import PlannedTerm, Tuner
from streammerge.adapters.tuners.dense import check_rank, linear_size
from streammerge.adapters.tuners.seeded import (
    ProductTerm,
    fit_shared,
    half_of_layers,
    largest_size,
    rounded_to,
    seed_of,
)
from streammerge.errors import AdapterError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from streammerge.adapters.options import Options
    from streammerge.adapters.terms import Weight
    from streammerge.adapters.tuners.base import AdapterModule, Layer, Shared
    from streammerge.checkpoint.header import StoredTensor
    from streammerge.dtypes import Dtype

__all__ = ["TUNERS", "Drawn", "Pvera", "Vera", "VeraTerm"]


@dataclass(frozen=True, slots=True)
class Drawn:
    """How the two matrices are drawn."""

    seed: int
    rows: int
    """Of A: R, or 2R."""
    columns: int
    """Of A: K'."""
    outputs: int
    """N'."""
    half: Dtype | None
    """What they are rounded to."""


@dataclass(frozen=True, slots=True)
class VeraTerm(ProductTerm):
    """Add the product of two scaled matrices."""

    rank: int
    outer: StoredTensor
    """(N,): b."""
    inner: StoredTensor
    """(R,) or (2R,): d."""
    shared: tuple[StoredTensor, StoredTensor] | Drawn
    """A and B."""

    @property
    def factors(self) -> tuple[StoredTensor, ...]:
        """The vectors, and the matrices if they are stored."""
        return (self.outer, self.inner, *(() if isinstance(self.shared, Drawn) else self.shared))

    def work_bytes(self, shape: tuple[int, ...]) -> int:
        """Return the bytes of both scaled matrices, and of what is drawn."""
        used = self.rank * sum(shape)
        if not isinstance(self.shared, Drawn):
            return 8 * used
        drawn = self.shared.rows * self.shared.columns + self.rank * self.shared.outputs
        # the part that is used, rounded, in float32 and in the compute dtype
        return 4 * drawn + (2 + 4 + 8 + 8) * used

    def matrices(
        self, factors: list[torch.Tensor], weight: Weight
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale the rows of A and B."""
        outer, inner, *stored = factors
        outputs, inputs = self.size(weight.shape)
        if isinstance(self.shared, Drawn):
            a, b = _draw(self.shared, self.rank)
            a, b = (
                rounded_to(part, self.shared.half).to(weight.compute_dtype)
                for part in (a[: self.rank, :inputs], b[:outputs])
            )
        else:
            a, b = stored
        return inner[: self.rank, None] * a[: self.rank, :inputs], outer[:, None] * b[:outputs]


@dataclass(frozen=True, slots=True)
class _Settings:
    rank: int
    seed: int
    saves_projection: bool


class Vera(Tuner):
    """`peft_type: VERA`."""

    peft_type = "VERA"
    title = "VeRA"
    formula = "W + (b * B) @ (d * A)"
    factors = frozenset({"vera_lambda_b", "vera_lambda_d"})
    shared = frozenset({"vera_A", "vera_B"})
    options = frozenset(
        {"d_initial", "projection_prng_key", "r", "save_projection", "vera_dropout"}
    )
    is_additive = True
    remarks = "without save_projection: drawn again from the seed"
    _prefix: ClassVar[str] = "vera"
    _halves: ClassVar[int] = 1

    def read(self, options: Options) -> _Settings:
        """Read the rank and the seed."""
        return _Settings(
            options.count("r", 256),
            seed_of(options, "projection_prng_key", 0),
            options.flag("save_projection", default=True),
        )

    def check(self, module: AdapterModule, settings: _Settings) -> None:
        """Check that the vectors are vectors, and their rank.

        Raises:
            AdapterError: They do not fit the configuration.
        """
        outer, inner = self._vectors(module)
        if len(outer.shape) != 1 or len(inner.shape) != 1 or inner.shape[0] % self._halves:
            raise AdapterError(
                "adapter tensor is no vector of the right length",
                where=module.where,
                got=f"{outer.name} {outer.shape}, {inner.name} {inner.shape}",
            )
        check_rank(module, inner.shape[0] // self._halves, expected=settings.rank)

    def plan(self, layer: Layer, settings: _Settings, shared: Shared) -> Sequence[PlannedTerm]:
        """Plan the product."""
        outer, inner = self._vectors(layer.module)
        outputs, _ = linear_size(layer, allows_conv1d=True)
        if outer.shape != (outputs,):
            raise layer.mismatch(f"'{outer.name}' {outer.shape}")
        projections = self._projections(layer, settings, shared)
        term = VeraTerm(layer.is_transposed, settings.rank, outer, inner, projections)
        return [PlannedTerm("weight", term)]

    def describe(self, module: AdapterModule, settings: _Settings) -> dict[str, Any]:
        """Give the rank and the number of outputs."""
        outer, _ = self._vectors(module)
        return {
            "rank": settings.rank,
            "out_features": outer.shape[0],
            "dtype": outer.dtype.value,
        }

    def _vectors(self, module: AdapterModule) -> list[StoredTensor]:
        return module.need(f"{self._prefix}_lambda_b", f"{self._prefix}_lambda_d")

    def _projections(
        self, layer: Layer, settings: _Settings, shared: Shared
    ) -> tuple[StoredTensor, StoredTensor] | Drawn:
        """Say where A and B come from.

        Raises:
            AdapterError: They are missing, or of other sizes than the layers.
        """
        rank, rows = settings.rank, settings.rank * self._halves
        outputs, inputs = largest_size(shared)
        if not shared.tensors and not settings.saves_projection:
            return Drawn(settings.seed, rows, inputs, outputs, half_of_layers(layer, shared))
        return (
            fit_shared(layer, shared, f"{self._prefix}_A", rows, inputs),
            fit_shared(layer, shared, f"{self._prefix}_B", outputs, rank),
        )


class Pvera(Vera):
    """`peft_type: PVERA`."""

    peft_type = "PVERA"
    title = "PVeRA"
    factors = frozenset({"pvera_lambda_b", "pvera_lambda_d"})
    shared = frozenset({"pvera_A", "pvera_B"})
    options = frozenset(
        {
            "d_initial", "generator_seed", "projection_prng_key", "pvera_dropout", "r",
            "sample_at_inference", "save_projection",
        }
    )  # fmt: skip
    remarks = "the mean, as PEFT merges it; without save_projection: drawn again from the seed"
    _prefix = "pvera"
    _halves = 2


TUNERS: tuple[Tuner, ...] = (Vera(), Pvera())


def _draw(how: Drawn, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A and B in float32, from the uniform distribution of Kaiming's initialisation."""
    import torch  # noqa: PLC0415 (planning needs no torch)

    generator = torch.Generator().manual_seed(how.seed)
    shapes = (how.rows, how.columns), (how.outputs, rank)
    a, b = (
        torch.nn.init.kaiming_uniform_(torch.empty(shape), generator=generator) for shape in shapes
    )
    return a, b
