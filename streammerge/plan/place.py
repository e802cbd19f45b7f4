"""Find the place of every part of an adapter: the base tensor that it is for, or a new one."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from streammerge.adapters.tuners.base import AdapterModule, Layer, Parameter
from streammerge.errors import PlanError
from streammerge.plan.experts import (
    ExpertParts,
    MoeLayout,
    find_expert_parts,
    is_wrapped_parameter,
)
from streammerge.plan.family import VOCABULARY_MODULES, is_conv1d
from streammerge.plan.match import WRAPPER_PREFIXES, Match

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from pathlib import Path

    from streammerge.adapters.adapter import Adapter, Replacement, RowReplacement
    from streammerge.plan.family import Embeddings
    from streammerge.plan.match import NameResolver
    from streammerge.plan.slots import Slot

__all__ = ["BaseView", "Placement", "layer_of", "place_adapter"]

_Part = TypeVar("_Part")
# names under which layers keep what an adapter may change; the first that is there is the weight
_WEIGHTS = ("weight", "in_proj_weight")
_ENDS = ("in_proj_weight", "in_proj_bias", "weight", "bias")


@dataclass(frozen=True, slots=True)
class BaseView:
    """What parts of adapters are matched against."""

    path: Path
    config: Mapping[str, Any]
    names: Collection[str]
    """The base's own tensors."""
    resolver: NameResolver
    embeddings: Embeddings
    moe_layout: MoeLayout = "peft"


@dataclass(frozen=True, slots=True)
class Placement:
    """An adapter's parts by the name of the tensor that each is for."""

    placed: dict[str, Replacement]
    layers: dict[str, AdapterModule]
    """Modules by the name of their layer's weight."""
    rows: dict[str, RowReplacement]
    experts: list[ExpertParts]
    """Modules whose layers are parts of fused experts, or parts of whose layers are experts."""
    matches: Counter[str]
    """How many names were found which way."""


def place_adapter(adapter: Adapter, *, base: BaseView, slots: Mapping[str, Slot]) -> Placement:
    """Place an adapter.

    Args:
        adapter: The adapter.
        base: The base.
        slots: The output's tensors so far: the base's, and what adapters before this one added.

    Raises:
        PlanError: A part has no place, or two parts have the same one.
    """
    placer = _Placer(adapter, base, slots)
    for replacement in adapter.replacements:
        path = replacement.path
        # a new head may end like some tensor of the base: its own name is asked for first
        match = placer.find_known(path) or placer.find_new(replacement) or base.resolver.find(path)
        placer.take(placer.placed, match, replacement, key=replacement.tensor.name, path=path)
    placer.place_modules()
    for rows in adapter.rows:
        path = f"{rows.module}.weight"
        match = placer.find_known(path) or base.resolver.find(path)
        placer.take(placer.rows, match, rows, key=rows.tensor.name, path=path)
    if placer.missing:
        raise placer.unmatched()
    return Placement(placer.placed, placer.layers, placer.rows, placer.experts, placer.matches)


def layer_of(
    name: str,
    module: AdapterModule,
    *,
    slots: Mapping[str, Slot],
    base: BaseView,
    fan_in_fan_out: bool,
) -> Layer:
    """Describe the base layer of a module.

    Args:
        name: The tensor that is its weight.
        module: The module.
        slots: The output's tensors so far.
        base: The base.
        fan_in_fan_out: What the adapter says of the weight's orientation; believed only where no
            config.json says better.
    """
    before = name[: -len(next(end for end in _ENDS if name.endswith(end)))]
    parameters = {
        end: Parameter(
            f"{before}{end}", slot.source.shape, slot.source, slot.work_dtype, bool(slot.terms)
        )
        for end in _ENDS
        if (slot := slots.get(f"{before}{end}")) is not None
    }
    is_transposed = is_conv1d(module.module, config=base.config)
    if not base.config:
        is_transposed = _looks_transposed(parameters, fan_in_fan_out=fan_in_fan_out)
    return Layer(module, parameters, is_transposed)


def _looks_transposed(parameters: Mapping[str, Parameter], *, fan_in_fan_out: bool) -> bool:
    """Tell a Conv1D by its bias, which it always has: it is as long as the weight has columns."""
    weight, bias = parameters.get("weight"), parameters.get("bias")
    # PEFT saves what it found for the last layer of a mixed model: what is no Conv1D for certain is
    # not made one by it
    if weight is None or bias is None or len(weight.shape) != 2:
        return False
    rows, columns = weight.shape
    return fan_in_fan_out if rows == columns else bias.shape == (columns,)


@dataclass(slots=True)
class _Placer:
    adapter: Adapter
    base: BaseView
    slots: Mapping[str, Slot]
    placed: dict[str, Replacement] = field(default_factory=dict)
    layers: dict[str, AdapterModule] = field(default_factory=dict)
    rows: dict[str, RowReplacement] = field(default_factory=dict)
    experts: list[ExpertParts] = field(default_factory=list)
    matches: Counter[str] = field(default_factory=Counter)
    missing: list[tuple[str, str]] = field(default_factory=list)

    def place_modules(self) -> None:
        """Place what has a layer of its own, then what is a part of experts."""
        rest = []
        for module in self.adapter.modules:
            match = self._find_layer(module)
            if match is None:
                rest.append(module)
            else:
                key = next(iter(module.tensors.values())).name
                self.take(self.layers, match, module, key=key, path=module.module)
        self.experts, unplaced = find_expert_parts(
            rest,
            adapter=self.adapter,
            resolver=self.base.resolver,
            slots=self.slots,
            config=self.base.config,
            layout=self.base.moe_layout,
        )
        if self.experts:
            self.matches["experts"] += len(self.experts)
        for module in unplaced:
            path = f"{module.module}.weight"
            key = next(iter(module.tensors.values())).name
            self.take(self.layers, self.base.resolver.find(path), module, key=key, path=path)

    def _find_layer(self, module: AdapterModule) -> Match | None:
        if module.depth:
            return None
        for end in _WEIGHTS:
            path = f"{module.module}.{end}"
            match = self.find_known(path)
            if match is not None:
                return None if self._is_stack(path, match.name) else match
        return None

    def _is_stack(self, path: str, name: str) -> bool:
        """Whether PEFT takes a weight for a stack of experts' matrices."""
        is_deep = name in self.slots and len(self.slots[name].source.shape) == 3
        return is_deep and is_wrapped_parameter(path, self.adapter.config.target_parameters)

    def find_known(self, path: str) -> Match | None:
        """Find a name that stands for itself, or for the head of a tied pair."""
        match = self.base.resolver.find_known(path)
        if match is None and path in self.slots:
            # a tensor that an adapter before this one added
            return Match(path, "exact")
        embeddings = self.base.embeddings
        if match is None and embeddings.is_tied and _ends_alike(path, embeddings.output):
            return Match(embeddings.output, "exact")
        return match

    def find_new(self, replacement: Replacement) -> Match | None:
        """Accept a tensor that the base lacks, of a module in modules_to_save that is all new."""
        listed = self.adapter.config.modules_to_save
        owner = replacement.path.rpartition(".")[0]
        module = next((m for m in _ancestors(owner) if m.endswith(listed)), None)
        if not listed or module is None or replacement.is_base_copy:
            return None
        parent, _, last = module.rpartition(".")
        # inside something that the base names so, or a head of the model's own
        has_home = _has_below(self.slots, parent) if parent else module not in WRAPPER_PREFIXES
        # a head beside a stored one would be that one under another name
        is_second_head = last in VOCABULARY_MODULES and self.base.embeddings.output in self.slots
        if not has_home or is_second_head or _has_below(self.base.names, module):
            return None
        return Match(replacement.path, "exact")

    def take(
        self, into: dict[str, _Part], match: Match | None, part: _Part, *, key: str, path: str
    ) -> None:
        """Note where a part goes, or that it has no place."""
        if match is None:
            self.missing.append((key, path))
            return
        if match.name in into:
            raise PlanError(
                "two modules of the adapter mean the same base tensor",
                where=f"key '{key}'",
                got=match.name,
                hint="adapter of another model family?",
            )
        into[match.name] = part
        self.matches[match.how] += 1

    def unmatched(self) -> PlanError:
        """Say which parts of the adapter have no place."""
        missing, adapter = self.missing, self.adapter
        key, path = missing[0]
        count = (
            f"{len(missing)} adapter tensors have" if len(missing) > 1 else "an adapter tensor has"
        )
        return PlanError(
            f"{count} no base tensor, the first is '{key}'",
            where=adapter.path,
            expected=f"'{path}' in {self.base.path}",
            got=f"nearest: {', '.join(self.base.resolver.nearest(path))}",
            hint=f"another base? The adapter names {adapter.config.base_model!r}; "
            "names of a transformers version that renames layers need transformers installed",
        )


def _ends_alike(path: str, head: str) -> bool:
    return path == head or path.rsplit(".", 2)[-2:] == head.rsplit(".", 2)[-2:]


def _ancestors(module: str) -> list[str]:
    parts = module.split(".")
    return [".".join(parts[: count + 1]) for count in range(len(parts))]


def _has_below(names: Collection[str], module: str) -> bool:
    return any(name.startswith(module + ".") for name in names)
