"""Where a checkpoint keeps the parameters of experts: fused, or in tensors of each expert's own.

In memory a parameter of experts is (E, D1, D2), one matrix per expert. A checkpoint has it as it is
(maybe under another name, or with every matrix transposed), or split into a fused tensor each for
gate and up, or as one tensor per expert and projection.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from streammerge.adapters.terms import Region
from streammerge.errors import PlanError
from streammerge.plan.family import are_experts_transposed_on_disk

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from streammerge.plan.match import NameResolver
    from streammerge.plan.slots import Slot

__all__ = ["ExpertLayout", "Piece", "StoredParameter"]

# the projections of one expert, by the fused parameter that holds them, in the order of its rows;
# each with the names that checkpoints use
_PROJECTIONS: dict[str, tuple[tuple[str, ...], ...]] = {
    "gate_up_proj": (("gate_proj", "w1"), ("up_proj", "w3")),
    "up_proj": (("up_proj", "w3"),),
    "down_proj": (("down_proj", "w2"),),
}
# what one layer's experts are called in memory and in checkpoints
_CONTAINERS = ("mlp.experts", "block_sparse_moe.experts", "block_sparse_moe",
               "feed_forward.experts", "moe.experts", "moe", "ffn.experts",
               "mixer.experts")  # fmt: skip
# modules that are one fused parameter each, called `weight`
_MODULES = {"gate_up_proj": ("input_linear", "fc1"), "down_proj": ("output_linear", "fc2")}


@dataclass(frozen=True, slots=True)
class Piece:
    """Where rows `rows` of one expert's matrix in memory are stored."""

    target: str
    expert: int
    rows: range
    region: Region | None
    is_transposed: bool
    """Whether the target, or its region, holds them as columns."""


@dataclass(frozen=True, slots=True)
class StoredParameter:
    """A parameter of a module in memory, wherever the checkpoint has it."""

    shape: tuple[int, ...]
    """In memory: (E, D1, D2), or (D1, D2)."""
    pieces: tuple[Piece, ...]

    @property
    def experts(self) -> int:
        """E; 1 for a matrix."""
        return self.shape[0] if len(self.shape) == 3 else 1


@dataclass(slots=True)
class ExpertLayout:
    """The experts of one base."""

    resolver: NameResolver
    slots: Mapping[str, Slot]
    config: Mapping[str, Any]
    _found: dict[tuple[str, str], StoredParameter | None] = field(default_factory=dict)

    def find(self, path: str, name: str) -> StoredParameter | None:
        """Find a parameter, whichever way it is stored.

        Args:
            path: Path of the module in memory.
            name: The parameter's name in it.

        Raises:
            PlanError: The experts of one layer differ in shape.
        """
        key = (path, name)
        if key not in self._found:
            self._found[key] = (
                self.find_fused(path, name)
                or self._find_halves(path, name)
                or self._find_apart(path, name)
            )
        return self._found[key]

    def find_fused(self, path: str, name: str) -> StoredParameter | None:
        """Find a parameter that is one tensor on disk as well."""
        target = self.find_tensor(path, name)
        if target is None:
            return None
        shape = self.slots[target].source.shape
        if len(shape) == 2:
            return StoredParameter(
                shape, (Piece(target, 0, range(shape[0]), None, is_transposed=False),)
            )
        return self._stack(name, [target]) if len(shape) == 3 else None

    def find_tensor(self, path: str, name: str) -> str | None:
        """Return the name of the tensor that a parameter is, if it is one."""
        module = path.rpartition(".")[2]
        fused = next((fused for fused, known in _MODULES.items() if module in known), None)
        paths = [f"{path}.{name}"]
        for container in _containers(path):
            paths += [f"{container}.{name}", f"{container}.{name}.weight"]
            paths += [f"{container}.{one}.weight" for one in _MODULES.get(name, ())]
        if name == "weight" and fused is not None:
            owners = _containers(path.rpartition(".")[0])
            paths += [f"{owner}.experts.{fused}" for owner in owners]
            paths += [f"{owner}.{fused}" for owner in owners]
        return self._known(paths) or self._by_suffix(f"{path}.{name}")

    def _find_halves(self, path: str, name: str) -> StoredParameter | None:
        """Find gate and up as one fused tensor each."""
        targets = [
            self._known(
                f"{container}.{projection}{end}"
                for container in _containers(path)
                for projection in projections
                for end in ("", ".weight")
            )
            for projections in _PROJECTIONS.get(name, ())
        ]
        known = [target for target in targets if target is not None]
        shapes = {self.slots[target].source.shape for target in known}
        if not known or len(known) < len(targets) or len(shapes) > 1 or len(shapes.pop()) != 3:
            return None
        return self._stack(name, known)

    def _stack(self, name: str, targets: list[str]) -> StoredParameter:
        """Describe fused tensors that are one parameter, one below the other in each expert."""
        pieces = []
        start = 0
        for target in targets:
            experts, rows, columns = self.slots[target].source.shape
            is_transposed = are_experts_transposed_on_disk(
                self.config, name, (experts, rows, columns)
            )
            d1, d2 = (columns, rows) if is_transposed else (rows, columns)
            for expert in range(experts):
                inside = Region(range(expert * rows, (expert + 1) * rows), range(columns))
                below = range(start, start + d1)
                pieces.append(Piece(target, expert, below, inside, is_transposed))
            start += d1
        return StoredParameter((experts, start, d2), tuple(pieces))

    def _find_apart(self, path: str, name: str) -> StoredParameter | None:
        """Find one tensor per expert and projection."""
        spelt = [self._spell(path, names) for names in _PROJECTIONS.get(name, ())]
        pieces: list[Piece] = []
        shapes: set[tuple[int, ...]] = set()
        expert = 0
        while spelt and None not in spelt:
            targets = [self._known([f"{one[0]}.{expert}.{one[1]}.weight"]) for one in spelt if one]
            if None in targets:
                break
            start = 0
            for target in filter(None, targets):
                shape = self.slots[target].source.shape
                if len(shape) != 2:
                    return None
                rows = range(start, start + shape[0])
                pieces.append(Piece(target, expert, rows, None, is_transposed=False))
                start += shape[0]
            shapes.add((start, *shape[1:]))
            expert += 1
        if len(shapes) > 1:
            raise PlanError(
                "experts of one layer differ in shape",
                where=f"'{pieces[0].target}' of {self.slots[pieces[0].target].source.path.parent}",
                got=", ".join(map(str, sorted(shapes))),
            )
        return StoredParameter((expert, *shapes.pop()), tuple(pieces)) if pieces else None

    def _spell(self, path: str, projections: tuple[str, ...]) -> tuple[str, str] | None:
        """Return what a layer's experts are called here, and a projection, by the first expert."""
        for container in _containers(path):
            for projection in projections:
                if self._known([f"{container}.0.{projection}.weight"]):
                    return container, projection
        for projection in projections:
            end = f".0.{projection}.weight"
            name = self._by_suffix(f"{path}{end}")
            if name is not None and name.endswith(end):
                return name.removesuffix(end), projection
        return None

    def _known(self, paths: Iterable[str]) -> str | None:
        for path in paths:
            match = self.resolver.find_known(path)
            if match is not None and match.name in self.slots:
                return match.name
        return None

    def _by_suffix(self, path: str) -> str | None:
        match = self.resolver.find(path)
        return match.name if match is not None and match.name in self.slots else None


def _containers(path: str) -> list[str]:
    """Return the names that the experts of a layer may have, an adapter's own first."""
    found = [path]
    own = [name for name in _CONTAINERS if path.endswith(f".{name}")]
    if own:
        before = path.removesuffix(max(own, key=len))
        found += [f"{before}{other}" for other in _CONTAINERS if f"{before}{other}" != path]
    return found
