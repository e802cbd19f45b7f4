"""RandLoRA: an update of full rank, a sum of many products of random bases that are scaled.

    W + alpha / R * (B @ A')        B (max(N, K), n * R), A' (R * n, min(N, K))
    A'[r, i] = l[r, i] * A[r] * g[i]      A (R, min), l (R, n), g (n, min), n = ceil(min / R)

B is read with the bases outside of the rank, A' with the rank outside of the bases, as the layer
was trained; for N < K the product is that of the transposed weight. A and B are shared by all
layers, in the largest sizes. The product is rounded to the weight's dtype before it is added.

The inner size of the product is min(N, K) at least, where BLAS rounds by shape and by threads: it
is computed as a whole, with PEFT's threads.

An adapter without A and B (save_projection: false) has them drawn again from its seed, in BF16 and
with BF16's standard deviation as PEFT has them, or as sparse matrices of three values.

Sources: peft.tuners.randlora; Albert et al. 2025, "RandLoRA: Full-rank parameter-efficient
fine-tuning of large models". Shapes: N out_features, K in_features, R rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from streammerge.adapters.tuners.base import PlannedTerm, Tuner
from streammerge.adapters.tuners.dense import check_rank, linear_size
from streammerge.adapters.tuners.seeded import (
    WholeTerm,
    fit_shared,
    half_of_layers,
    largest_size,
    rounded_to,
    seed_of,
)
from streammerge.dtypes import Dtype
from streammerge.errors import AdapterError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from streammerge.adapters.options import Options
    from streammerge.adapters.terms import Weight
    from streammerge.adapters.tuners.base import AdapterModule, Layer, Shared
    from streammerge.checkpoint.header import StoredTensor

__all__ = ["TUNERS", "DrawnBases", "RandLora", "RandLoraTerm"]

_SHARED = ("randlora_A", "randlora_B")
# of the product when it is first used, whatever the size: 3 MB measured (torch 2.13.0 with MKL)
_FIXED_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class DrawnBases:
    """How the bases are drawn."""

    seed: int
    least: int
    """The smaller one of the largest N and the largest K."""
    most: int
    rank: int
    sparsity: float | None
    """Of three entries of +-1 and 0, one in so many is not zero; None for dense bases."""
    half: Dtype | None
    """What they are rounded to."""

    @property
    def bases(self) -> int:
        """The largest n."""
        return -(-self.least // self.rank)


@dataclass(frozen=True, slots=True)
class RandLoraTerm(WholeTerm):
    """Add the scaled product of the bases."""

    depends_on_threads: ClassVar[bool] = True

    scaling: float
    inner: StoredTensor
    """(R, n): l."""
    outer: StoredTensor
    """(n, min(N, K)): g."""
    shared: tuple[StoredTensor, StoredTensor] | DrawnBases
    """A (R, 1, min) and B (max, n, R)."""
    item_bytes: int
    """Of an entry in the compute dtype."""

    @property
    def factors(self) -> tuple[StoredTensor, ...]:
        """The scales, and the bases if they are stored."""
        stored = () if isinstance(self.shared, DrawnBases) else self.shared
        return (self.inner, self.outer, *stored)

    def work_bytes(self, shape: tuple[int, ...]) -> int:
        """Return the bytes of both factors and of the product, and of what is drawn."""
        least, most = sorted(shape)
        inner = math.prod(self.inner.shape)
        # the product is rounded to two bytes at least
        made = self.item_bytes * inner * (least + most) + (self.item_bytes + 2) * least * most
        made += _FIXED_BYTES
        how = self.shared
        if not isinstance(how, DrawnBases):
            return made
        # uniform and sparse numbers, and two masks; or the bases in BF16, and what is drawn of them
        drawn = (4 if how.sparsity is None else 10) * how.bases * how.rank * how.most
        # the part that is used: rounded, in float32, and in the compute dtype
        return made + drawn + (2 + 4 + self.item_bytes) * inner * most

    def delta(self, factors: list[torch.Tensor], weight: Weight) -> torch.Tensor:
        """Scale the smaller factor, multiply, and round."""
        inner, outer, *stored = factors
        rank, bases = inner.shape
        least, most = sorted(weight.shape)
        if isinstance(self.shared, DrawnBases):
            a, b = (
                rounded_to(part, self.shared.half).to(weight.compute_dtype)
                for part in self._drawn(self.shared, bases, least=least, most=most)
            )
        else:
            a, b = stored
        small = inner[:, :, None] * a[:, :bases, :least]
        small = small.mul_(outer[None]).view(rank * bases, least)
        large = b[:most, :bases].flatten(start_dim=1)
        _, inputs = self.size(weight.shape)
        # (K, N), as PEFT has it
        product = small.T @ large.T if inputs == least else large @ small
        return product.mul_(self.scaling * self.gain).to(weight.dtype).T

    @staticmethod
    def _drawn(
        how: DrawnBases, bases: int, *, least: int, most: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the parts of A and B that a layer takes."""
        draw = _draw_dense if how.sparsity is None else _draw_sparse
        a, b = draw(how)
        return a[:, :, :least], b[:most, :bases]


@dataclass(frozen=True, slots=True)
class _Settings:
    rank: int
    alpha: float
    seed: int
    saves_projection: bool
    is_sparse: bool
    is_very_sparse: bool

    def sparsity(self, least: int) -> float | None:
        """Return the sparsity of bases of a size."""
        if self.is_very_sparse:
            return math.sqrt(least)
        return 3 if self.is_sparse else None


class RandLora(Tuner):
    """`peft_type: RANDLORA`."""

    peft_type = "RANDLORA"
    title = "RandLoRA"
    formula = "W + alpha / r * sum of B_i @ (l_i * A * g_i)"
    # each module has the shared ones again
    factors = frozenset({"randlora_lambda", "randlora_gamma", *_SHARED})
    shared = frozenset(_SHARED)
    options = frozenset(
        {
            "projection_prng_key", "r", "randlora_alpha", "randlora_dropout", "save_projection",
            "sparse", "very_sparse",
        }
    )  # fmt: skip
    is_additive = True
    remarks = "needs the whole delta; without save_projection: drawn again from the seed"

    def read(self, options: Options) -> _Settings:
        """Read the rank, the scaling, and how the bases are drawn."""
        return _Settings(
            options.count("r", 32),
            options.number("randlora_alpha", 640),
            seed_of(options, "projection_prng_key", 0),
            options.flag("save_projection", default=True),
            options.flag("sparse"),
            options.flag("very_sparse"),
        )

    def check(self, module: AdapterModule, settings: _Settings) -> None:
        """Check the scales against each other and against the configuration.

        Raises:
            AdapterError: They do not fit.
        """
        inner, outer = _scales(module)
        is_sound = len(inner.shape) == len(outer.shape) == 2 and 0 not in inner.shape + outer.shape
        if not is_sound or inner.shape[1] != outer.shape[0]:
            raise AdapterError(
                "factors of the adapter do not belong together",
                where=module.where,
                got=f"randlora_lambda {inner.shape}, randlora_gamma {outer.shape}",
            )
        check_rank(module, inner.shape[0], expected=settings.rank)

    def plan(self, layer: Layer, settings: _Settings, shared: Shared) -> Sequence[PlannedTerm]:
        """Plan the product."""
        inner, outer = _scales(layer.module)
        least = min(linear_size(layer, allows_conv1d=True))
        if outer.shape != (-(-least // settings.rank), least):
            raise layer.mismatch(f"randlora_lambda {inner.shape}, randlora_gamma {outer.shape}")
        term = RandLoraTerm(
            layer.is_transposed,
            settings.alpha / settings.rank,
            inner,
            outer,
            _bases(layer, settings, shared),
            8 if layer.weight.dtype is Dtype.F64 else 4,
        )
        return [PlannedTerm("weight", term)]

    def unused(self, module: AdapterModule) -> Sequence[StoredTensor]:
        """Return the copies of what all modules share."""
        return [tensor for name, tensor in module.tensors.items() if name in _SHARED]

    def describe(self, module: AdapterModule, settings: _Settings) -> dict[str, Any]:
        """Give the rank, the number of bases, and the scaling."""
        inner, _ = _scales(module)
        return {
            "rank": settings.rank,
            "bases": inner.shape[1],
            "scaling": settings.alpha / settings.rank,
            "dtype": inner.dtype.value,
        }


TUNERS: tuple[Tuner, ...] = (RandLora(),)


def _scales(module: AdapterModule) -> list[StoredTensor]:
    return module.need("randlora_lambda", "randlora_gamma")


def _bases(
    layer: Layer, settings: _Settings, shared: Shared
) -> tuple[StoredTensor, StoredTensor] | DrawnBases:
    """Say where A and B come from.

    Raises:
        AdapterError: They are missing, or of other sizes than the layers.
    """
    least, most = sorted(largest_size(shared))
    rank = settings.rank
    if not shared.tensors and not settings.saves_projection:
        half = half_of_layers(layer, shared)
        return DrawnBases(settings.seed, least, most, rank, settings.sparsity(least), half)
    return (
        fit_shared(layer, shared, "randlora_A", rank, 1, least),
        fit_shared(layer, shared, "randlora_B", most, -(-least // rank), rank),
    )


def _draw_dense(how: DrawnBases) -> tuple[torch.Tensor, torch.Tensor]:
    """Return both bases in BF16, divided by their standard deviations."""
    import torch  # noqa: PLC0415 (planning needs no torch)

    generator = torch.Generator().manual_seed(how.seed)

    def draw(*shape: int) -> torch.Tensor:
        empty = torch.empty(shape, dtype=torch.bfloat16)
        return torch.nn.init.kaiming_uniform_(empty, a=math.sqrt(5), generator=generator)

    a = draw(how.rank, 1, how.least)
    b = torch.empty((how.most, how.bases, how.rank), dtype=torch.bfloat16)
    for number in range(how.bases):
        b[:, number] = draw(how.most, 1, how.rank)[:, 0]
    return a.div_(a.std()), b.div_(b.std())


def _draw_sparse(how: DrawnBases) -> tuple[torch.Tensor, torch.Tensor]:
    """Return both bases in float32, of -1, 0 and 1, divided by their standard deviations."""
    import torch  # noqa: PLC0415 (planning needs no torch)

    assert how.sparsity is not None
    generator = torch.Generator().manual_seed(how.seed)
    edge = 1 / (2 * how.sparsity)

    def draw(*shape: int) -> torch.Tensor:
        uniform = torch.rand(shape, generator=generator)
        signs = torch.zeros(shape)
        signs[uniform < edge] = -1
        signs[uniform > 1 - edge] = 1
        return signs.div_(signs.std())

    return draw(how.rank, 1, how.least), draw(how.most, how.bases, how.rank)
