"""TinyLoRA: between frozen factors stands a small matrix, made of a few trained numbers.

    W + B @ (sum over i of v_i * P_i) @ A        A (R, K), B (N, R), P (u, R, R), v (u,)

A and B were made from the weight by singular value decomposition, and are stored. P is drawn from a
seed plus the layer's number among the adapter's layers, in the order in which the model has them.
v belongs to a group of layers with neighbouring numbers (weight_tying); the file does not say which
layer has which number, nor do the names of a checkpoint. It is found from P: the number is that for
which the same P is drawn.

So an adapter without P (save_projection: false) is refused if it has more than one layer.

Sources: peft.tuners.tinylora; Morris et al. 2026, "Learning to Reason in 13 Parameters". Shapes:
N out_features, K in_features, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from streammerge.adapters.tuners.base import PlannedTerm, Tuner
from streammerge.adapters.tuners.dense import linear_size
from streammerge.adapters.tuners.seeded import (
    ProductTerm,
    fit_shared,
    half_of_layers,
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

__all__ = ["TUNERS", "TinyLora", "TinyLoraTerm"]

_VECTOR = "tinylora_v"


@dataclass(frozen=True, slots=True)
class TinyLoraTerm(ProductTerm):
    """Add `B @ M @ A`, M of one of several vectors."""

    a: StoredTensor
    """(R, K)"""
    b: StoredTensor
    """(N, R)"""
    projection: StoredTensor | None
    """(u, R, R): P; None if it is drawn again, for layer 0."""
    vectors: tuple[StoredTensor, ...]
    """(u,) each: of all groups."""
    groups: tuple[int, ...]
    """The group of each layer, by number."""
    seed: int
    half: Dtype | None
    """What a P that is drawn again is rounded to."""

    @property
    def factors(self) -> tuple[StoredTensor, ...]:
        """The frozen factors, the vectors, and P if it is stored."""
        stored = () if self.projection is None else (self.projection,)
        return (self.a, self.b, *self.vectors, *stored)

    def work_bytes(self, shape: tuple[int, ...]) -> int:
        """Return the bytes of `B @ M`, and of a P that is drawn and what it is compared as."""
        del shape
        rank = self.a.shape[0]
        return 8 * prod(self.b.shape) + 4 * 8 * self.vectors[0].shape[0] * rank * rank

    def matrices(
        self, factors: list[torch.Tensor], weight: Weight
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Find P and v, and multiply B."""
        import torch  # noqa: PLC0415 (planning needs no torch)

        a, b, *rest = factors
        count = len(self.vectors)
        if self.projection is None:
            projection = rounded_to(self._drawn(0), self.half).to(weight.compute_dtype)
        else:
            projection = rest[count]
        vector = rest[self._group(projection) if count > 1 else 0]
        middle = torch.einsum("i,ijk->jk", vector, projection)
        return a, b @ middle

    def _group(self, projection: torch.Tensor) -> int:
        """Return the group of the layer that P was drawn for.

        Raises:
            AdapterError: There is none, or it is not clear which.
        """
        assert self.projection is not None
        found = set()
        for number, group in enumerate(self.groups):
            drawn = self._drawn(number)
            # P went through the dtype of the base on which it was trained
            forms = (rounded_to(drawn, half) for half in (None, Dtype.BF16, Dtype.F16))
            if any(projection.equal(form.to(projection.dtype)) for form in forms):
                found.add(group)
        if len(found) != 1:
            raise AdapterError(
                "it is not clear which of the adapter's vectors is for a layer: its projection is "
                f"that of {'no layer' if not found else 'several layers'}",
                where=f"key '{self.projection.name}' of {self.projection.path}",
                expected=f"one that is drawn from projection_seed {self.seed} and a number below "
                f"{len(self.groups)}",
                hint="merge this adapter with PEFT",
            )
        return found.pop()

    def _drawn(self, number: int) -> torch.Tensor:
        """Return P of a layer in float32."""
        import torch  # noqa: PLC0415 (planning needs no torch)

        rank, count = self.a.shape[0], self.vectors[0].shape[0]
        generator = torch.Generator().manual_seed(self.seed + number)
        size = (count, rank, rank)
        return torch.normal(mean=0.0, std=1.0 / rank**0.5, size=size, generator=generator)


@dataclass(frozen=True, slots=True)
class _Settings:
    rank: int
    count: int
    """u"""
    tying: float
    seed: int

    def groups(self, layers: int) -> tuple[int, ...]:
        """Return the group of each of a number of layers."""
        groups = max(1, round(layers * (1.0 - self.tying)))
        size = max(1, layers // groups)
        return tuple(min(number // size, groups - 1) for number in range(layers))


class TinyLora(Tuner):
    """`peft_type: TINYLORA`."""

    peft_type = "TINYLORA"
    title = "TinyLoRA"
    formula = "W + B @ (sum of v_i * P_i) @ A"
    factors = frozenset({"tinylora_A", "tinylora_B", "tinylora_P"})
    shared = frozenset({_VECTOR})
    options = frozenset(
        {
            "init_v_bound", "projection_seed", "r", "save_projection", "tinylora_dropout", "u",
            "weight_tying",
        }
    )  # fmt: skip
    is_additive = True
    remarks = "with save_projection, or of a single layer"

    def read(self, options: Options) -> _Settings:
        """Read the sizes, the seed, and how layers share vectors.

        Raises:
            AdapterError: They are not sound.
        """
        tying = options.number("weight_tying", 0.0)
        if not 0 <= tying <= 1:
            raise options.bad("weight_tying", expected="a number from 0 to 1")
        return _Settings(
            options.count("r", 2),
            options.count("u", 64),
            float(tying),
            seed_of(options, "projection_seed", 42),
        )

    def check(self, module: AdapterModule, settings: _Settings) -> None:
        """Check the factors against each other and against the configuration.

        Raises:
            AdapterError: They do not fit.
        """
        a, b = module.need("tinylora_A", "tinylora_B")
        is_sound = len(a.shape) == len(b.shape) == 2 and a.shape[0] == b.shape[1]
        # a small weight has fewer singular values than the rank that is asked for
        if not is_sound or a.shape[0] != min(settings.rank, a.shape[1], b.shape[0]):
            raise AdapterError(
                "factors of the adapter do not belong together",
                where=module.where,
                expected=f"r = {settings.rank}",
                got=f"tinylora_A {a.shape}, tinylora_B {b.shape}",
                hint="adapter_config.json belongs to another adapter?",
            )
        if module.get("tinylora_P") is not None:
            _ = module.fit("tinylora_P", settings.count, a.shape[0], a.shape[0])

    def plan(self, layer: Layer, settings: _Settings, shared: Shared) -> Sequence[PlannedTerm]:
        """Plan the product."""
        module = layer.module
        a, b = module.need("tinylora_A", "tinylora_B")
        _ = linear_size(layer, allows_conv1d=True)
        delta = (b.shape[0], a.shape[1])
        # an embedding is not transposed, whatever other layers are
        is_transposed = layer.is_transposed and delta[::-1] == layer.weight.shape
        if delta != layer.weight.shape and not is_transposed:
            raise layer.mismatch(f"tinylora_A {a.shape}, tinylora_B {b.shape}")
        projection = module.get("tinylora_P")
        groups = settings.groups(len(shared.layers))
        if projection is None and len(groups) > 1:
            raise AdapterError(
                "adapter was saved without its projections: what they are drawn from depends on "
                "the order of the model's layers, which its files do not say",
                where=module.where,
                expected="tinylora_P",
                hint="set save_projection to true in its configuration, load it with PEFT on its "
                "base, and save it again",
            )
        names = [f"{_VECTOR}.{group}" for group in sorted(set(groups))]
        vectors = tuple(fit_shared(layer, shared, name, settings.count) for name in names)
        if len(vectors) != len(shared.tensors):
            raise AdapterError(
                "adapter has vectors of more layers than it is for",
                where=module.where,
                expected=", ".join(names)[:200],
                got=", ".join(sorted(shared.tensors))[:200],
            )
        half = half_of_layers(layer, shared) if projection is None else None
        term = TinyLoraTerm(is_transposed, a, b, projection, vectors, groups, settings.seed, half)
        return [PlannedTerm("weight", term)]

    def describe(self, module: AdapterModule, settings: _Settings) -> dict[str, Any]:
        """Give the rank, the trained numbers, and the delta's shape."""
        a, b = module.need("tinylora_A", "tinylora_B")
        return {
            "rank": a.shape[0],
            "u": settings.count,
            "shape": [b.shape[0], a.shape[1]],
            "dtype": a.dtype.value,
        }


TUNERS: tuple[Tuner, ...] = (TinyLora(),)
