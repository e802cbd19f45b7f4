"""Find the place of every part of an adapter: the base tensor that it is for, or a new one."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from streammerge.errors import PlanError
from streammerge.plan.family import VOCABULARY_MODULES
from streammerge.plan.match import WRAPPER_PREFIXES, Match

if TYPE_CHECKING:
    from collections.abc import Collection

    from streammerge.adapters.adapter import Adapter, LoraModule, Replacement
    from streammerge.checkpoint.index import Checkpoint
    from streammerge.plan.family import Embeddings
    from streammerge.plan.match import NameResolver

__all__ = ["Placement", "place_adapter"]

_Part = TypeVar("_Part")


@dataclass(frozen=True, slots=True)
class Placement:
    """An adapter's parts by the name of the tensor that each is for."""

    placed: dict[str, Replacement]
    modules: dict[str, LoraModule]
    matches: Counter[str]
    """How many names were found which way."""


def place_adapter(
    adapter: Adapter,
    *,
    base: Checkpoint,
    resolver: NameResolver,
    embeddings: Embeddings,
    names: Collection[str],
) -> Placement:
    """Place an adapter.

    Args:
        adapter: The adapter.
        base: The base checkpoint.
        resolver: Finds the base's names.
        embeddings: The base's embedding and head.
        names: The output's tensors so far: the base's, and what adapters before this one added.

    Raises:
        PlanError: A part has no place, or two parts have the same one.
    """
    placer = _Placer(adapter, base, resolver, embeddings, names)
    for replacement in adapter.replacements:
        path = replacement.path
        # a new head may end like some tensor of the base: its own name is asked for first
        match = placer.find_known(path) or placer.find_new(replacement) or resolver.find(path)
        placer.take(placer.placed, match, replacement, key=replacement.tensor.name, path=path)
    for module in adapter.modules:
        path = f"{module.module}.weight"
        match = placer.find_known(path) or resolver.find(path)
        placer.take(placer.modules, match, module, key=module.a.name, path=path)
    if placer.missing:
        raise placer.unmatched()
    return Placement(placer.placed, placer.modules, placer.matches)


@dataclass(slots=True)
class _Placer:
    adapter: Adapter
    base: Checkpoint
    resolver: NameResolver
    embeddings: Embeddings
    names: Collection[str]
    placed: dict[str, Replacement] = field(default_factory=dict)
    modules: dict[str, LoraModule] = field(default_factory=dict)
    matches: Counter[str] = field(default_factory=Counter)
    missing: list[tuple[str, str]] = field(default_factory=list)

    def find_known(self, path: str) -> Match | None:
        """Find a name that stands for itself, or for the head of a tied pair."""
        match = self.resolver.find_known(path)
        if match is None and path in self.names:
            # a tensor that an adapter before this one added
            return Match(path, "exact")
        head = self.embeddings.output
        if match is None and self.embeddings.is_tied and _ends_alike(path, head):
            return Match(head, "exact")
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
        has_home = _has_below(self.names, parent) if parent else module not in WRAPPER_PREFIXES
        # a head beside a stored one would be that one under another name
        is_second_head = last in VOCABULARY_MODULES and self.embeddings.output in self.names
        if not has_home or is_second_head or _has_below(self.base.tensors, module):
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
            got=f"nearest: {', '.join(self.resolver.nearest(path))}",
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
