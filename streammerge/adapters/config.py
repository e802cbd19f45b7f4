"""adapter_config.json: what of it changes a merge, and what makes a merge impossible."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from streammerge.adapters.options import Choices, Options
from streammerge.adapters.tuners import NOT_MERGEABLE, all_tuners, find_tuner
from streammerge.checkpoint.jsonfile import read_json_object
from streammerge.errors import AdapterError

if TYPE_CHECKING:
    from pathlib import Path

    from streammerge.adapters.tuners.base import Tuner

__all__ = ["AdapterConfig", "TokenRows", "read_adapter_config"]

# of every kind of adapter: they say how it was trained, or which of its layers, and the file holds
# the outcome
_COMMON = frozenset(
    """
    auto_mapping base_model_name_or_path bias ensure_weight_tying exclude_modules fan_in_fan_out
    inference_mode init_weights layers_pattern layers_to_transform modules_to_save peft_type
    peft_version revision runtime_config target_modules task_type
    """.split()
)


@dataclass(frozen=True, slots=True)
class TokenRows:
    """Rows of embeddings that were trained by themselves, by the ends of their modules' paths."""

    indices: dict[str, tuple[int, ...]]
    """In the order of the rows in the file; the empty name means the input embedding."""


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """The part of an adapter's configuration that a merge depends on."""

    path: Path
    tuner: Tuner
    """What knows this kind of adapter."""
    settings: Any
    """What it has read."""
    fan_in_fan_out: bool = False
    modules_to_save: tuple[str, ...] = ()
    target_parameters: tuple[str, ...] = ()
    layer_replication: tuple[tuple[int, int], ...] = ()
    """Ranges of base layers, one after the other: the layers of the model that was trained."""
    token_rows: TokenRows | None = None
    ensure_weight_tying: bool = False
    task_type: str | None = None
    base_model: str | None = None
    peft_version: str | None = None
    notes: tuple[str, ...] = field(default=())

    def is_older_than(self, *version: int) -> bool | None:
        """Whether an older PEFT wrote the adapter; None if it does not say: then 0.17 or older."""
        if self.peft_version is None:
            return None
        numbers = []
        for part in self.peft_version.split(".")[: len(version)]:
            if not part.isdecimal():
                break
            numbers.append(int(part))
        return tuple(numbers) < version


def read_adapter_config(folder: Path, choices: Choices | None = None) -> AdapterConfig:
    """Read and check adapter_config.json.

    Args:
        folder: The adapter's folder.
        choices: What the user says of it.

    Raises:
        AdapterError: The file is damaged, or describes an adapter that cannot be merged; the
            message names the option and the way out.
    """
    path = folder / "adapter_config.json"
    options = Options(read_json_object(path, error=AdapterError), path, choices or Choices())
    tuner = _tuner(options)
    return AdapterConfig(
        path=path,
        tuner=tuner,
        settings=tuner.read(options),
        fan_in_fan_out=options.flag("fan_in_fan_out"),
        modules_to_save=options.names("modules_to_save"),
        target_parameters=options.names("target_parameters"),
        layer_replication=_layer_replication(options),
        token_rows=_token_rows(options),
        ensure_weight_tying=options.flag("ensure_weight_tying"),
        task_type=options.text("task_type"),
        base_model=options.text("base_model_name_or_path"),
        peft_version=options.text("peft_version"),
        notes=_unknown_options(options, tuner),
    )


def _tuner(options: Options) -> Tuner:
    kind = options.get("peft_type")
    tuner = find_tuner(kind) if isinstance(kind, str) and kind.isidentifier() else None
    if tuner is not None:
        return tuner
    if isinstance(kind, str) and kind in NOT_MERGEABLE:
        raise AdapterError(
            f"adapter has no merged form: {NOT_MERGEABLE[kind]}",
            where=options.path,
            got=f"peft_type {kind}",
            hint="use it unmerged, with PEFT",
        )
    raise AdapterError(
        "adapter is of a kind that is not known",
        where=options.path,
        expected=f"peft_type {', '.join(all_tuners())}",
        got=repr(kind)[:80],
        hint="merge it with PEFT, or convert it to LoRA first",
    )


def _layer_replication(options: Options) -> tuple[tuple[int, int], ...]:
    ranges = options.get("layer_replication") or []
    is_sound = isinstance(ranges, list) and all(
        isinstance(pair, list)
        and len(pair) == 2
        and all(isinstance(end, int) and not isinstance(end, bool) for end in pair)
        and 0 <= pair[0] < pair[1]
        for pair in ranges
    )
    if not is_sound:
        raise options.bad(
            "layer_replication", expected="ranges of layers, such as [[0, 4], [2, 5]]"
        )
    return tuple((pair[0], pair[1]) for pair in ranges)


def _token_rows(options: Options) -> TokenRows | None:
    """Read which rows of embeddings were trained: of LoRA, or of an adapter of nothing else."""
    for key in ("trainable_token_indices", "token_indices"):
        raw = options.get(key)
        if not raw:
            continue
        named = raw if isinstance(raw, dict) else {"": raw}
        for indices in named.values():
            is_sound = isinstance(indices, list) and all(
                isinstance(index, int) and not isinstance(index, bool) and index >= 0
                for index in indices
            )
            if not is_sound:
                raise options.bad(key, expected="lists of token ids")
        return TokenRows({name: tuple(indices) for name, indices in named.items()})
    return None


def _unknown_options(options: Options, tuner: Tuner) -> tuple[str, ...]:
    """Refuse an unknown switch that is on; note other options of a newer PEFT."""
    notes = []
    for option, value in options.raw.items():
        if option in _COMMON or option in tuner.options or not value:
            continue
        if option.startswith("use_"):
            raise AdapterError(
                "adapter uses an option that this version does not know",
                where=options.path,
                got=f"{option}: {value!r}"[:120],
                hint="it may change the formula: merge it with the PEFT version that made it",
            )
        notes.append(f"{options.path}: option '{option}' is not known here and has no effect")
    return tuple(notes)
