"""Adapters on experts, which model, checkpoint and adapter may each keep fused or apart.

In memory a fused parameter is (E, D1, D2), one matrix per expert. PEFT's wrapper of a parameter
stores A as (E * R, in) with the experts one after the other, and B as (out, R * E) with the experts
innermost; for the matrix of expert e

    in = D2, out = D1:  delta_e = scaling * B_e @ A_e          PEFT from 0.19
    in = D1, out = D2:  delta_e = scaling * (B_e @ A_e).T      older, and models that declare it

Several wrapped parameters of a module nest: the one registered first is innermost, and its key has
the most `base_layer.` in it. The output keeps the base's division of experts into tensors.
Source: peft.tuners.lora.layer.ParamWrapper.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import permutations
from typing import TYPE_CHECKING, Any, Literal

from streammerge.adapters.terms import Factor, LoraTerm, Region
from streammerge.adapters.tuners.lora_settings import LoraSettings, is_wrapped_parameter
from streammerge.errors import PlanError
from streammerge.plan.expert_layout import ExpertLayout
from streammerge.plan.family import (
    are_experts_in_out_on_disk,
    are_experts_interleaved,
    are_experts_transposed_in_memory,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from streammerge.adapters.adapter import Adapter
    from streammerge.adapters.tuners.base import AdapterModule
    from streammerge.plan.expert_layout import StoredParameter
    from streammerge.plan.match import NameResolver
    from streammerge.plan.slots import Slot

__all__ = ["ExpertParts", "MoeLayout", "find_expert_parts", "is_wrapped_parameter"]

MoeLayout = Literal["peft", "unsloth"]
# in the order in which modules register them; wrappers nest in it
_ORDER = ("gate_proj", "gate_up_proj", "gate_up_proj_bias", "up_proj", "w1", "v1", "w3",
          "down_proj", "down_proj_bias", "w2")  # fmt: skip
# the fused parameter of one expert's projection, and which part of how many it is
_FUSED = {
    "gate_proj": ("gate_up_proj", 0, 2), "w1": ("gate_up_proj", 0, 2),
    "up_proj": ("gate_up_proj", 1, 2), "w3": ("gate_up_proj", 1, 2),
    "gate_up_proj": ("gate_up_proj", 0, 1),
    "down_proj": ("down_proj", 0, 1), "w2": ("down_proj", 0, 1),
}  # fmt: skip
_ONE_EXPERT = re.compile(r"(?P<experts>.+)\.(?P<number>\d+)\.(?P<projection>\w+)")
_ANOTHER_BASE = "give the base that the adapter was trained on"


@dataclass(frozen=True, slots=True)
class ExpertParts:
    """What one module of an adapter does to the tensors of experts."""

    module: AdapterModule
    terms: tuple[tuple[str, LoraTerm], ...]
    """Each with the name of its target."""


def find_expert_parts(
    modules: Iterable[AdapterModule],
    *,
    adapter: Adapter,
    resolver: NameResolver,
    slots: Mapping[str, Slot],
    config: Mapping[str, Any],
    layout: MoeLayout,
) -> tuple[list[ExpertParts], list[AdapterModule]]:
    """Place modules whose layers are no tensors of their own.

    Args:
        modules: Those that no base tensor answers to.
        adapter: The adapter that they belong to.
        resolver: Finds the base's names.
        slots: The output's tensors so far.
        config: The base's config.json.
        layout: How columns of B are divided among experts.

    Returns:
        What was placed, and the modules that have no place here either.

    Raises:
        PlanError: A place was found, but a module does not fit it.
    """
    settings = adapter.config.settings
    if not isinstance(settings, LoraSettings):
        return [], list(modules)
    stored = ExpertLayout(resolver, slots, config)
    wrapped = _Wrapped(adapter, settings, stored, config, layout)
    groups: dict[str, list[AdapterModule]] = {}
    for module in modules:
        groups.setdefault(module.module, []).append(module)
    parts, unplaced = [], []
    for path, group in groups.items():
        found = wrapped.place(path, group)
        if not found and len(group) == 1:
            one = _one_expert(group[0], settings, stored, config)
            found = [one] if one is not None else []
        if found:
            parts.extend(found)
        else:
            unplaced.extend(group)
    return parts, unplaced


@dataclass(slots=True)
class _Wrapped:
    """An adapter on whole parameters."""

    adapter: Adapter
    settings: LoraSettings
    stored: ExpertLayout
    config: Mapping[str, Any]
    layout: MoeLayout

    def place(self, path: str, group: list[AdapterModule]) -> list[ExpertParts]:
        """Place the wrappers of one module's parameters, if they are that."""
        targets = self.adapter.config.target_parameters
        names = sorted({target.rpartition(".")[2] for target in targets})
        wanted = [name for name in names if is_wrapped_parameter(f"{path}.{name}", targets)]
        found = {name: self.stored.find(path, name) for name in wanted}
        known = {name: stored for name, stored in found.items() if stored is not None}
        if not known:
            return []
        # the innermost first
        layers = sorted(group, key=lambda module: -module.depth)
        for module in layers:
            _check_plain(module, self.settings, what="a parameter", hint="")
        is_nested = [module.depth for module in layers] == [*range(len(layers))][::-1]
        orders = [
            order
            for order in (_orders(known, len(layers)) if is_nested else ())
            if all(
                self._fits(path, name, module, known[name])
                for name, module in zip(order, layers, strict=True)
            )
        ]
        if len(orders) != 1:
            raise self._misfit(path, layers, found, is_ambiguous=len(orders) > 1)
        return [
            ExpertParts(module, tuple(self._terms(path, name, module, known[name])))
            for name, module in zip(orders[0], layers, strict=True)
        ]

    def _misfit(
        self,
        path: str,
        layers: list[AdapterModule],
        found: Mapping[str, StoredParameter | None],
        *,
        is_ambiguous: bool,
    ) -> PlanError:
        wanted = [
            f"{name} {stored.shape} of rank {self.settings.rank_of(f'{path}.{name}')}"
            if stored is not None
            else f"{name}, which is not found in the base"
            for name, stored in found.items()
        ]
        got = [
            f"lora_A {module.tensors['lora_A'].shape}, lora_B {module.tensors['lora_B'].shape}"
            for module in layers
        ]
        return PlanError(
            "it is not clear which of the adapter's factors is for which parameter"
            if is_ambiguous
            else "adapter's factors do not fit the parameters that target_parameters names",
            where=f"module '{path}' of {self.adapter.path}",
            expected="; ".join(wanted),
            got="; ".join(got),
            hint=_ANOTHER_BASE,
        )

    def _fits(self, path: str, name: str, module: AdapterModule, stored: StoredParameter) -> bool:
        a, b = module.need("lora_A", "lora_B")
        rank = self.settings.rank_of(f"{path}.{name}")
        d1, d2 = stored.shape[-2:]
        shapes = {(d1, d2)} if stored.experts == 1 else {(d1, d2), (d2, d1)}
        is_whole = a.shape[0] == b.shape[1] == stored.experts * rank
        return is_whole and (b.shape[0], a.shape[1]) in shapes

    def _terms(
        self, path: str, name: str, module: AdapterModule, stored: StoredParameter
    ) -> Iterable[tuple[str, LoraTerm]]:
        a, b = module.need("lora_A", "lora_B")
        rank, experts = self.settings.rank_of(f"{path}.{name}"), stored.experts
        d1, d2 = stored.shape[-2:]
        is_standard = (b.shape[0], a.shape[1]) == (d1, d2)
        if d1 == d2 and experts > 1:
            is_standard = not self._is_unswapped()
        scaling = self.settings.scaling_of(f"{path}.{name}", rank=rank)
        for piece in stored.pieces:
            of_a = range(piece.expert * rank, (piece.expert + 1) * rank)
            of_b = (
                of_a if self.layout == "unsloth" else range(piece.expert, rank * experts, experts)
            )
            if is_standard:
                first, second = Factor(a, rows=of_a), Factor(b, rows=piece.rows, columns=of_b)
            else:
                first, second = Factor(a, rows=of_a, columns=piece.rows), Factor(b, columns=of_b)
            yield (
                piece.target,
                LoraTerm(
                    first,
                    second,
                    scaling,
                    # un-swapped factors give the transpose of the matrix in memory
                    is_transposed=piece.is_transposed == is_standard,
                    # the delta of a whole parameter is rounded before it is added
                    rounds_delta=True,
                    region=piece.region,
                ),
            )

    def _is_unswapped(self) -> bool:
        """Whether in and out follow the order of the dimensions; asked where sizes do not say."""
        if are_experts_transposed_in_memory(self.config):
            return True
        older = self.adapter.config.is_older_than(0, 19)
        return older is None or older


def _orders(known: Mapping[str, StoredParameter], count: int) -> Iterable[tuple[str, ...]]:
    """Return the orders in which a module may have registered its parameters."""
    if len(known) != count:
        return []
    if all(name in _ORDER for name in known):
        return [tuple(sorted(known, key=_ORDER.index))]
    return permutations(sorted(known))


def _check_plain(module: AdapterModule, settings: LoraSettings, *, what: str, hint: str) -> None:
    """Refuse what is more than two factors.

    Raises:
        PlanError: It is.
    """
    beyond = sorted(module.tensors.keys() - {"lora_A", "lora_B"})
    inits = {"pissa": "PiSSA", "olora": "OLoRA"}
    kind = settings.variant or inits.get(settings.residual or "")
    if beyond or not settings.is_plain:
        raise PlanError(
            f"only plain LoRA is merged into {what}",
            where=module.where,
            got=", ".join(filter(None, [kind, *beyond])),
            hint=hint or None,
        )


def _one_expert(
    module: AdapterModule,
    settings: LoraSettings,
    stored: ExpertLayout,
    config: Mapping[str, Any],
) -> ExpertParts | None:
    """Place a module that is one expert's projection, where the base has them fused.

    Raises:
        PlanError: It does not fit.
    """
    match = _ONE_EXPERT.fullmatch(module.module)
    if match is None or match["projection"] not in _FUSED or module.depth or module.is_inner:
        return None
    fused, part, parts = _FUSED[match["projection"]]
    parameter = stored.find_fused(match["experts"], fused)
    if parameter is None or len(parameter.shape) != 3:
        return None
    _check_plain(
        module,
        settings,
        what="one expert of a fused tensor",
        hint="give a base that stores each expert by itself",
    )
    a, b = module.need("lora_A", "lora_B")
    number, rank = int(match["number"]), settings.rank_of(module.module)
    n, k = b.shape[0], a.shape[1]
    target = parameter.pieces[0].target
    experts, rows, columns = stored.slots[target].source.shape
    # as (out, in), or as (in, out)
    is_transposed = (rows, columns) == (k, n * parts)
    fits = is_transposed or (rows, columns) == (n * parts, k)
    if n * parts == k:
        is_transposed = are_experts_in_out_on_disk(config)
    if not fits or number >= experts or a.shape[0] != rank or b.shape[1] != rank:
        raise PlanError(
            "shape mismatch: another base?",
            where=module.where,
            expected=f"a delta of rank {rank} for one of '{target}' {(experts, rows, columns)}",
            got=f"lora_A {a.shape}, lora_B {b.shape}",
            hint=_ANOTHER_BASE,
        )
    inside = range(part * n, (part + 1) * n)
    if is_transposed and parts > 1 and are_experts_interleaved(config):
        inside = range(part, n * parts, parts)
    first = number * rows
    region = (
        Region(range(first, first + rows), inside)
        if is_transposed
        else Region(range(first + inside.start, first + inside.stop), range(columns))
    )
    term = LoraTerm(
        Factor(a),
        Factor(b),
        settings.scaling_of(module.module),
        is_transposed,
        rounds_delta=settings.rounds_delta,
        region=region,
    )
    return ExpertParts(module, ((target, term),))
