"""Find out what a checkpoint's tensors were called where an adapter was trained.

Adapters carry in-memory names, checkpoints carry the names of the hub, and transformers renames
between them at load time for some families. Common ones are known (`plan/names.py`); for the others
transformers is asked, if it is installed, by a process of its own: it builds the model's skeleton
on the meta device from config.json alone, and its memory is gone with it.
"""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from streammerge.errors import PlanError
from streammerge.plan.family import find_embeddings
from streammerge.plan.match import NameResolver
from streammerge.plan.names import are_names_known, known_renames, spell_alike

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from streammerge.adapters.adapter import Adapter
    from streammerge.checkpoint.index import Checkpoint

__all__ = ["MemoryNames", "find_renames", "transformers_names"]

TIMEOUT_SECONDS = 300
_WEIGHTS = ("weight", "in_proj_weight")
# heads that are new where an adapter brings them
_NEW_HEADS = frozenset({"score", "classifier", "qa_outputs"})
_IN_EXPERT = re.compile(r"(?P<experts>.+experts)\.\d+\.\w+")


@dataclass(frozen=True, slots=True)
class MemoryNames:
    """What transformers says of a checkpoint's tensors."""

    renames: dict[str, str] = field(default_factory=dict)
    """Name in memory to checkpoint name, where they differ."""
    forms: dict[str, str] = field(default_factory=dict)
    """Path of an adapter's module to its path in memory, where they differ."""
    made: dict[str, str] = field(default_factory=dict)
    """Name in memory to what it is made of, where it is no tensor of the checkpoint."""
    note: str | None = None
    """Why transformers could not be asked."""


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A module that an adapter has something for."""

    module: str
    adapter: Adapter
    parameter: str | None = None
    """Path of the whole parameter that it brings, if it does."""
    has_parts: bool = False
    """Whether the layer may be stored in parts, as experts are."""


def find_renames(
    base: Checkpoint, adapters: Sequence[Adapter]
) -> tuple[dict[str, str], str | None]:
    """Map in-memory names to checkpoint names, as far as adapters need it.

    Returns:
        The names that differ; empty if every name of the adapters is the checkpoint's own. And a
        note if transformers was needed and could not be asked.

    Raises:
        PlanError: An adapter's layer is made of other tensors than its own.
    """
    names = frozenset(base.tensors)
    wanted = [part for adapter in adapters for part in _wanted_of(adapter)]
    missing = _missing(base, NameResolver(names), wanted)
    if not missing or not base.config:
        return {}, None
    renames = known_renames(names, base.config, _with_containers(missing))
    missing = _missing(base, NameResolver(names, renames), missing)
    if not missing or are_names_known(base.config):
        return renames, None
    answer = transformers_names(base.path, base.tensors, _with_containers(missing))
    renamed = set(answer.renames.values())
    in_memory = {name: name for name in names if name not in renamed} | answer.renames
    renames |= answer.renames | spell_alike(in_memory, answer.forms)
    for part in _missing(base, NameResolver(names, renames), missing):
        _refuse_made(part, answer)
    return renames, answer.note


def _wanted_of(adapter: Adapter) -> Iterator[_Wanted]:
    targets = adapter.config.target_parameters
    # a wrapped weight has the name that any layer's has
    wrapped = [f".{target}".rpartition(".") for target in targets if not target.endswith("weight")]
    for module in adapter.modules:
        wraps = any(f".{module.module}".endswith(owner) for owner, _, _ in wrapped)
        has_parts = wraps or module.depth > 0 or bool(_IN_EXPERT.fullmatch(module.module))
        yield _Wanted(module.module, adapter, has_parts=has_parts)
    for replacement in adapter.replacements:
        yield _Wanted(replacement.path.rpartition(".")[0], adapter, replacement.path)
    for rows in adapter.rows:
        yield _Wanted(rows.module, adapter)


def _missing(base: Checkpoint, resolver: NameResolver, wanted: Iterable[_Wanted]) -> list[_Wanted]:
    """Return what is not in the checkpoint under its own name."""
    embeddings = find_embeddings(base.tensors, config=base.config)
    # a tied head is not stored
    is_absent = embeddings.is_tied and embeddings.is_known
    head = _last(embeddings.output.rpartition(".")[0]) if is_absent else None
    return [
        part
        for part in wanted
        if not _is_there(resolver, part)
        and _last(part.module) != head
        and part.module.partition(".")[0] not in _NEW_HEADS
    ]


def _is_there(resolver: NameResolver, part: _Wanted) -> bool:
    paths = [f"{part.module}.{end}" for end in _WEIGHTS]
    if any(resolver.find_known(path) for path in ([part.parameter] if part.parameter else paths)):
        return True
    expert = _IN_EXPERT.fullmatch(part.module)
    return part.has_parts and resolver.has_module(expert["experts"] if expert else part.module)


def _with_containers(wanted: Iterable[_Wanted]) -> list[str]:
    """Return paths of modules, and of the experts that some of them are one of."""
    modules = [part.module for part in wanted]
    experts = [match["experts"] for m in modules if (match := _IN_EXPERT.fullmatch(m))]
    return list(dict.fromkeys([*modules, *experts]))


def _last(path: str) -> str:
    return path.rpartition(".")[2]


def _refuse_made(part: _Wanted, answer: MemoryNames) -> None:
    """Refuse a layer that is made of other tensors.

    Raises:
        PlanError: It is.
    """
    weight = f"{part.module}.weight"
    made = {name for name in answer.made if name.rpartition(".")[0] == part.module}
    if made:
        raise PlanError(
            "adapter is for a layer that is no tensor of the base: transformers makes it when it "
            "loads the model",
            where=f"module '{part.module}' of {part.adapter.path}",
            expected="a tensor that is stored as the layer has it",
            got=answer.made[weight if weight in made else min(made)],
            hint="merge this adapter with PEFT",
        )


def transformers_names(folder: Path, names: Iterable[str], modules: Iterable[str]) -> MemoryNames:
    """Ask transformers.

    Args:
        folder: The base checkpoint, for its config.json.
        names: The checkpoint's tensor names.
        modules: Paths of an adapter's modules.
    """
    if importlib.util.find_spec("transformers") is None:
        return MemoryNames(
            note="transformers is not installed: its renames of layers are not known"
        )
    try:
        answer = subprocess.run(  # noqa: S603 (our own program)
            [sys.executable, "-m", "streammerge.engine.inmemory_names", str(folder.resolve())],
            input=json.dumps({"names": list(names), "modules": list(modules)}),
            capture_output=True,
            text=True,
            timeout=TIMEOUT_SECONDS,
            check=True,
            # not the current folder, whose files python would take for modules
            cwd=Path(__file__).parents[2],
        )
        found = json.loads(answer.stdout.splitlines()[-1])
        if not isinstance(found, dict):
            return MemoryNames(note="transformers could not name the layers (it gave no map)")
        return MemoryNames(found["renames"], found["forms"], found["made"])
    except subprocess.CalledProcessError as error:
        *_, line = (str(error.stderr).strip() or str(error)).splitlines()
        return MemoryNames(note=f"transformers could not name the layers ({line})")
    except (subprocess.SubprocessError, ValueError, KeyError, IndexError) as error:
        return MemoryNames(note=f"transformers could not name the layers ({error})")
