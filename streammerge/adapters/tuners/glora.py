"""GLoRA: a weight and its bias are multiplied and added to, and the bias is told of the weight.

    W + (W * A + B)                 A, B: (N, R) @ (R, K), or (N, 1), or a number
    b + (b * D + E + W @ C)         D, E: (N,), or a number;  C: (K, R) @ (R, 1), or (K, 1)

each step rounded to the weight's dtype. W and b are those before the merge. What an adapter leaves
out counts as zero (PEFT stores the zeros too); C, D and E are there only where there is a bias.

`W @ C` takes the whole weight into memory while the bias is merged. With a 16-bit weight it is the
processor's own 16-bit product. BLAS divides its sums by the number of threads from some hundred
inputs on: the bits of the bias are those of PEFT with one thread, and within the rounding of a sum
of K products of those with several.

Sources: peft.tuners.glora, Chavan et al. 2023, "One-for-All: Generalized LoRA for Parameter-
Efficient Fine-tuning" (arXiv:2306.07967). Shapes: N out_features, K in_features, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from streammerge.adapters.terms import TunerTerm
from streammerge.adapters.tuners.base import PlannedTerm, Tuner
from streammerge.adapters.tuners.dense import linear_size
from streammerge.errors import AdapterError, PlanError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from streammerge.adapters.options import Options
    from streammerge.adapters.terms import Weight
    from streammerge.adapters.tuners.base import AdapterModule, Layer, Shared
    from streammerge.checkpoint.header import StoredTensor

__all__ = ["TUNERS", "BiasPathsTerm", "Glora", "WeightPathsTerm"]

_PATHS = "ABCDE"
_OF_BIAS = "CDE"
# what each form of a path stores
_NAMES = {"lora": ("Xd", "Xu"), "vector": ("X",), "constant": ("X",), "none": ()}

_Path = tuple["StoredTensor", ...]
"""Two factors, or a vector or number, or nothing."""


@dataclass(frozen=True, slots=True)
class WeightPathsTerm(TunerTerm):
    """Multiply the weight by one plus A, and add B."""

    a: _Path
    b: _Path

    @property
    def factors(self) -> tuple[StoredTensor, ...]:
        """What A and B are made of."""
        return (*self.a, *self.b)

    def prepare(self, factors: list[torch.Tensor], weight: Weight) -> Any:
        """Tell those of A and of B apart."""
        del weight
        return factors[: len(self.a)], factors[len(self.a) :]

    def apply(self, rows: torch.Tensor, begin: int, state: Any) -> torch.Tensor:
        """Change these rows."""
        a, b = (_rows_of(path, begin, rows) for path in state)
        return rows.add_((rows * a).add_(b))


@dataclass(frozen=True, slots=True)
class BiasPathsTerm(TunerTerm):
    """Multiply the bias by one plus D, add E, and add the product of the weight with C."""

    d: _Path
    e: _Path
    c: _Path
    weight: StoredTensor | None
    """(N, K), where there is a C."""

    @property
    def factors(self) -> tuple[StoredTensor, ...]:
        """What D, E and C are made of, and the weight."""
        return (*self.d, *self.e, *self.c, *(() if self.weight is None else (self.weight,)))

    def work_bytes(self, shape: tuple[int, ...]) -> int:
        """Return what the weight takes in the dtype in which it is multiplied, and a copy of it."""
        del shape
        return 8 * prod(self.weight.shape) if self.weight is not None else 0

    def prepare(self, factors: list[torch.Tensor], weight: Weight) -> Any:
        """Multiply the weight with C."""
        rest = list(factors)
        d, e, c = ([rest.pop(0) for _ in path] for path in (self.d, self.e, self.c))
        if self.weight is None:
            return d, e, None
        column = (c[0] @ c[1] if len(c) == 2 else c[0]).to(weight.dtype)
        return d, e, rest[0].to(weight.dtype) @ column

    def apply(self, rows: torch.Tensor, begin: int, state: Any) -> torch.Tensor:
        """Change these numbers, each a row of its own."""
        d, e, product = state
        of_weight = 0.0 if product is None else product[begin : begin + len(rows)]
        d, e = (_rows_of(path, begin, rows) for path in (d, e))
        return rows.add_((rows * d).add_(e).add_(of_weight))


@dataclass(frozen=True, slots=True)
class _Settings:
    rank: int
    forms: dict[str, str]
    """`lora`, `vector`, `constant` or `none` for each path."""


class Glora(Tuner):
    """`peft_type: GLORA`."""

    peft_type = "GLORA"
    title = "GLoRA"
    formula = "W + W * A + B; bias + bias * D + E + W @ C"
    factors = frozenset({f"glora_{path}" for path in _PATHS})
    parts = frozenset({"X", "Xd", "Xu", "zeros"})
    options = frozenset({"config_A_B", "config_C", "config_D_E", "r"})
    remarks = "with C, a layer's weight must be that of the base"

    def read(self, options: Options) -> _Settings:
        """Read rank and forms.

        Raises:
            AdapterError: They are not sound.
        """
        of_weight = options.choice("config_A_B", "lora", "vector", "constant", "none")
        of_both = options.choice("config_C", "lora", "vector", "none")
        of_bias = options.choice("config_D_E", "constant", "vector", "none")
        forms = dict(zip(_PATHS, (of_weight, of_weight, of_both, of_bias, of_bias), strict=True))
        return _Settings(options.count("r", 8), forms)

    def check(self, module: AdapterModule, settings: _Settings) -> None:
        """Check that every path has the form that the configuration says, or none.

        Raises:
            AdapterError: One has another.
        """
        has_bias = any(_found(module, path) for path in _OF_BIAS)
        for path, form in settings.forms.items():
            found = _found(module, path)
            wanted = set(_NAMES[form]) if has_bias or path not in _OF_BIAS else set()
            if found != wanted:
                raise AdapterError(
                    "tensors of the adapter and adapter_config.json disagree",
                    where=module.where,
                    expected=f"glora_{path} as {form}",
                    got=", ".join(sorted(found)) or "nothing",
                    hint="adapter_config.json belongs to another adapter?",
                )

    def plan(self, layer: Layer, settings: _Settings, shared: Shared) -> Sequence[PlannedTerm]:
        """Plan the changes of the weight and of the bias."""
        del shared
        out_features, in_features = linear_size(layer)
        rank, module = settings.rank, layer.module
        shapes: dict[str, dict[str, tuple[int, ...]]] = {
            "A": {"Xd": (out_features, rank), "Xu": (rank, in_features), "X": (out_features, 1)},
            "C": {"Xd": (in_features, rank), "Xu": (rank, 1), "X": (in_features, 1)},
            "D": {"X": (out_features,)},
        }
        shapes |= {"B": shapes["A"], "E": shapes["D"]}
        paths = {path: _path(module, path, settings.forms[path], shapes[path]) for path in _PATHS}
        planned = [PlannedTerm("weight", WeightPathsTerm(paths["A"], paths["B"]))]
        bias = layer.parameters.get("bias")
        has_bias_paths = any(_found(module, path) for path in _OF_BIAS)
        wants_bias_paths = any(settings.forms[path] != "none" for path in _OF_BIAS)
        if bias is None and not has_bias_paths:
            return planned
        if bias is None or bias.shape != (out_features,) or has_bias_paths != wants_bias_paths:
            raise layer.mismatch(
                "the adapter of a layer with a bias"
                if has_bias_paths
                else "the adapter of a layer without a bias",
                parameter="bias",
            )
        weight = _weight_beside(layer) if paths["C"] else None
        term = BiasPathsTerm(paths["D"], paths["E"], paths["C"], weight)
        return [*planned, PlannedTerm("bias", term)]

    def unused(self, module: AdapterModule) -> list[StoredTensor]:
        """Return the zeros that stand for paths an adapter does without."""
        return [tensor for name, tensor in module.tensors.items() if name.endswith(".zeros")]

    def describe(self, module: AdapterModule, settings: _Settings) -> dict[str, Any]:
        """Give the rank, and the form of each path that is there."""
        forms = {path: form for path, form in settings.forms.items() if _found(module, path)}
        return {"rank": settings.rank, **forms}


TUNERS: tuple[Tuner, ...] = (Glora(),)


def _found(module: AdapterModule, path: str) -> set[str]:
    """Return the names of what is stored of a path, but for zeros."""
    start = f"glora_{path}."
    names = {name.removeprefix(start) for name in module.tensors if name.startswith(start)}
    return names - {"zeros"}


def _path(
    module: AdapterModule, path: str, form: str, shapes: Mapping[str, tuple[int, ...]]
) -> _Path:
    """Return a path's tensors, checked; none where the layer has no use for it.

    Raises:
        AdapterError: One has another shape.
    """
    if not _found(module, path):
        return ()
    return tuple(
        module.fit(f"glora_{path}.{name}", *((1,) if form == "constant" else shapes[name]))
        for name in _NAMES[form]
    )


def _weight_beside(layer: Layer) -> StoredTensor:
    """Return the weight that the bias is told of.

    Raises:
        PlanError: It is not what is stored any more.
    """
    if layer.weight.is_changed or layer.weight.stored is None:
        raise PlanError(
            "an adapter before this one changes a weight that GLoRA's C multiplies for the bias",
            where=layer.module.where,
            got=layer.weight.name,
            hint="merge this one first, or in a run of its own onto the result",
        )
    return layer.weight.stored


def _rows_of(path: list[torch.Tensor], begin: int, rows: torch.Tensor) -> Any:
    """Return what a path is for some rows, in their dtype."""
    if not path:
        return 0.0
    end = begin + len(rows)
    if len(path) == 2:
        return (path[0][begin:end] @ path[1]).to(rows.dtype)
    values = path[0].to(rows.dtype)
    return values[0] if values.shape == (1,) else values[begin:end].view(-1, 1)
