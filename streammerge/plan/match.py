"""Find the base tensor that an adapter's module path means.

In this order: the exact name; one base prefix added or taken away (a bare model against one with a
head); transformers' own renames, if known; the only base tensor that ends in the path, layer
numbers included. What matches none of these is an error for the caller, never a silent no-op.
"""

from __future__ import annotations

import difflib
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from streammerge.plan.family import VOCABULARY_MODULES

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = ["WRAPPER_PREFIXES", "Match", "NameResolver"]

How = Literal["exact", "prefix", "renamed", "suffix"]
# what wraps the layers of a bare model; each may be missing on either side
WRAPPER_PREFIXES = (
    "model", "transformer", "base_model", "bert", "roberta", "gpt_neox", "decoder",
    "language_model", "backbone",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Match:
    """A base tensor, and how it was found."""

    name: str
    how: How


@dataclass(slots=True)
class NameResolver:
    """Resolve parameter paths of adapters to the tensor names of one base."""

    names: frozenset[str]
    renames: Mapping[str, str] = field(default_factory=dict)
    """In-memory name to checkpoint name, where transformers renames."""
    _by_last: dict[str, list[str]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._by_last = defaultdict(list)
        for name in self.names:
            self._by_last[_tail(name)].append(name)

    def find_direct(self, path: str) -> Match | None:
        """Match exactly, or by one prefix."""
        if path in self.names:
            return Match(path, "exact")
        head, _, rest = path.partition(".")
        candidates = {rest} if head in WRAPPER_PREFIXES else set()
        candidates.update(f"{prefix}.{path}" for prefix in WRAPPER_PREFIXES)
        found = sorted(candidates & self.names)
        return Match(found[0], "prefix") if len(found) == 1 else None

    def find(self, path: str) -> Match | None:
        """Match in any way; None if nothing, or more than one tensor, answers."""
        return self.find_known(path) or self._find_suffix(path)

    def find_known(self, path: str) -> Match | None:
        """Match in any way but by a suffix."""
        match = self.find_direct(path)
        if match is None and path in self.renames:
            return Match(self.renames[path], "renamed")
        return match

    def nearest(self, path: str, *, count: int = 3) -> list[str]:
        """Return the base tensors whose names look most like a path."""
        same_end = self._by_last.get(_tail(path), [])
        pool: Iterable[str] = same_end or self.names
        return difflib.get_close_matches(path, sorted(pool)[:20_000], n=count, cutoff=0.0)

    def _find_suffix(self, path: str) -> Match | None:
        parts = path.split(".")
        # a shorter end that lost a layer number would match another layer
        numbered = [at for at, part in enumerate(parts) if part.isdigit()]
        # without a number, two components say too little: `pooler.dense` is not some other `dense`
        keeps = 2 if parts[-2:-1] and parts[-2] in VOCABULARY_MODULES else 3
        last_start = max(numbered[0] - 1, 0) if numbered else max(len(parts) - keeps, 0)
        candidates = self._by_last.get(_tail(path), [])
        for start in range(1, last_start + 1):
            end = "." + ".".join(parts[start:])
            # what the longer name has before the path must not be a layer the path does not name
            found = [
                name
                for name in candidates
                if f".{name}".endswith(end)
                and not any(part.isdigit() for part in name.removesuffix(end[1:]).split("."))
            ]
            if found:
                return Match(found[0], "suffix") if len(found) == 1 else None
        return None


def _tail(name: str) -> str:
    """Return the last two components: the layer's own name and the parameter."""
    return ".".join(name.rsplit(".", 2)[-2:])
