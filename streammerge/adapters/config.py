"""adapter_config.json: what of it changes a merge, and what makes a merge impossible."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from streammerge.checkpoint.jsonfile import read_json_object
from streammerge.errors import AdapterError

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["AdapterConfig", "read_adapter_config"]

# of ranks and alphas; NaN and Inf are above it too
MAX_NUMBER = 1e9
# options of LoRA that need more than W + scaling * B @ A, each with the way out
_UNSUPPORTED_OPTIONS = {
    "alora_invocation_tokens": "an activated LoRA depends on the prompt and has no merged form",
    "arrow_config": "an Arrow router chooses per token and has no merged form",
    "use_bdlora": "block-diagonal LoRA is not merged by this version",
    "use_qalora": "QA-LoRA is not merged by this version",
    "kasa_config": "KaSA changes the base weights by an SVD: not merged by this version",
    "monteclora_config": "MonteCLoRA is not merged by this version",
    "velora_config": "VeLoRA is not merged by this version",
    "layer_replication": "replicated layers are not written by this version",
    "target_parameters": "LoRA on parameters (fused experts) is not merged by this version",
    "trainable_token_indices": "trained token rows are not merged by this version",
}
# these change the base at training time, so the adapter alone does not hold the difference to it
_BASE_CHANGING_INITS = ("pissa", "olora", "loftq", "corda", "lora_ga")
_PLAIN_INITS = ("true", "false", "gaussian", "orthogonal", "eva")
# options of LoraConfig that leave the formula as it is, or that this project implements
_KNOWN = frozenset(
    """
    alpha_pattern auto_mapping base_model_name_or_path bias corda_config ensure_weight_tying
    eva_config exclude_modules fan_in_fan_out inference_mode init_lora_weights layers_pattern
    layers_to_transform loftq_config lora_alpha lora_bias lora_dropout lora_ga_config
    megatron_config megatron_core modules_to_save peft_type peft_version qalora_group_size r
    rank_pattern revision runtime_config target_modules task_type use_dora use_rslora
    """.split()
) | frozenset(_UNSUPPORTED_OPTIONS)


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """The part of a LoRA adapter's configuration that a merge depends on."""

    path: Path
    rank: int
    lora_alpha: float
    use_rslora: bool
    use_dora: bool
    fan_in_fan_out: bool
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    modules_to_save: tuple[str, ...]
    ensure_weight_tying: bool
    task_type: str | None
    base_model: str | None
    peft_version: str | None
    notes: tuple[str, ...] = field(default=())

    def rank_of(self, module: str) -> int:
        """Return the rank that a module was trained with."""
        rank: int = _first_match(self.rank_pattern, module, self.rank)
        return rank

    def scaling_of(self, module: str) -> float:
        """Return the factor of `B @ A` for a module.

        It is `lora_alpha / r`, or `lora_alpha / sqrt(r)` for rsLoRA.

        Args:
            module: Path of the module in memory, without the `base_model.model.` prefix.
        """
        rank = self.rank_of(module)
        alpha: float = _first_match(self.alpha_pattern, module, self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def read_adapter_config(folder: Path) -> AdapterConfig:
    """Read and check adapter_config.json.

    Raises:
        AdapterError: The file is damaged, or describes an adapter that cannot be merged; the
            message
            names the option and the way out.
    """
    path = folder / "adapter_config.json"
    raw = read_json_object(path, error=AdapterError)
    kind = raw.get("peft_type")
    if kind != "LORA":
        raise AdapterError(
            "adapter is of a kind that is not merged by this version",
            where=path,
            expected="peft_type LORA",
            got=repr(kind),
            hint="merge it with PEFT, or convert it to LoRA first",
        )
    _check_init(raw.get("init_lora_weights", True), path)
    for option, reason in _UNSUPPORTED_OPTIONS.items():
        if raw.get(option):
            raise AdapterError(reason, where=path, got=f"{option}: {raw[option]!r}"[:120])
    return AdapterConfig(
        path=path,
        rank=_number(raw, "r", path, whole=True, default=None),
        lora_alpha=_number(raw, "lora_alpha", path, whole=False, default=8),
        use_rslora=_flag(raw, "use_rslora", path),
        use_dora=_flag(raw, "use_dora", path),
        fan_in_fan_out=_flag(raw, "fan_in_fan_out", path),
        rank_pattern=_pattern(raw, "rank_pattern", path, whole=True),
        alpha_pattern=_pattern(raw, "alpha_pattern", path, whole=False),
        modules_to_save=_names(raw, "modules_to_save", path),
        ensure_weight_tying=_flag(raw, "ensure_weight_tying", path),
        task_type=_text(raw, "task_type", path),
        base_model=_text(raw, "base_model_name_or_path", path),
        peft_version=_text(raw, "peft_version", path),
        notes=_unknown_options(raw, path),
    )


def _check_init(init: object, path: Path) -> None:
    name = str(init).lower()
    if name.startswith(_BASE_CHANGING_INITS):
        raise AdapterError(
            f"adapter starts from changed base weights (init_lora_weights: {init!r})",
            where=path,
            hint="save it once with path_initial_model_for_weight_conversion (LLaMA-Factory: use "
            "the pissa_converted folder), or merge it onto the saved residual base with "
            "init_lora_weights: true",
        )
    if name not in _PLAIN_INITS:
        raise AdapterError(
            "adapter uses an initialisation that is not known to leave the base as it is",
            where=path,
            expected="true, false, gaussian, orthogonal or eva",
            got=f"init_lora_weights: {init!r}",
            hint="merge it with PEFT",
        )


def _unknown_options(raw: dict[str, Any], path: Path) -> tuple[str, ...]:
    """Refuse an unknown switch that is on; note other options of a newer PEFT."""
    notes = []
    for option, value in raw.items():
        if option in _KNOWN or not value:
            continue
        if option.startswith("use_"):
            raise AdapterError(
                "adapter uses an option that this version does not know",
                where=path,
                got=f"{option}: {value!r}"[:120],
                hint="it may change the formula: merge it with the PEFT version that made it",
            )
        notes.append(f"{path}: option '{option}' is not known here and has no effect")
    return tuple(notes)


# PEFT's rule (peft.utils.other.get_pattern_key): a pattern matches the whole path, or its end after
# a dot; the first one in the order of the file wins
MAX_PATTERN_CHARACTERS = 1000
_NESTED_QUANTIFIERS = re.compile(r"[+*}]\)+[+*{]")
_PATTERN = r"(.*\.)?({})$"


def _first_match(patterns: dict[str, Any], module: str, default: Any) -> Any:
    for pattern, value in patterns.items():
        if re.match(_PATTERN.format(pattern), module):
            return value
    return default


def _flag(raw: dict[str, Any], key: str, path: Path) -> bool:
    value = raw.get(key)
    if value is not None and not isinstance(value, bool):
        raise AdapterError(f"bad {key}", where=path, expected="true or false", got=repr(value)[:80])
    return bool(value)


def _text(raw: dict[str, Any], key: str, path: Path) -> str | None:
    value = raw.get(key)
    if value is not None and not isinstance(value, str):
        raise AdapterError(f"bad {key}", where=path, expected="text", got=repr(value)[:80])
    return value


def _number(raw: dict[str, Any], key: str, path: Path, *, whole: bool, default: int | None) -> Any:
    value = raw.get(key, default)
    kinds = (int,) if whole else (int, float)
    is_number = isinstance(value, kinds) and not isinstance(value, bool)
    if value is None or not is_number or not abs(value) <= MAX_NUMBER or (whole and value < 1):
        raise AdapterError(
            f"bad {key}",
            where=path,
            expected="a positive whole number" if whole else "a number",
            got=repr(value),
        )
    return value


def _pattern(raw: dict[str, Any], key: str, path: Path, *, whole: bool) -> dict[str, Any]:
    patterns = raw.get(key) or {}
    if not isinstance(patterns, dict):
        raise AdapterError(f"bad {key}", where=path, expected="a map", got=repr(patterns)[:80])
    for pattern in patterns:
        if len(pattern) > MAX_PATTERN_CHARACTERS or _NESTED_QUANTIFIERS.search(pattern):
            raise AdapterError(
                f"{key} holds a pattern that could take for ever to match",
                where=path,
                got=pattern[:80],
                hint="write the names of the modules instead",
            )
        try:
            re.compile(_PATTERN.format(pattern))
        except (re.error, OverflowError, RecursionError) as error:
            raise AdapterError(f"bad {key}", where=path, got=f"{pattern!r}: {error}") from error
        _number(patterns, pattern, path, whole=whole, default=None)
    return patterns


def _names(raw: dict[str, Any], key: str, path: Path) -> tuple[str, ...]:
    names = raw.get(key) or []
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise AdapterError(f"bad {key}", where=path, expected="a list of names", got=repr(names))
    return tuple(names)
