"""Read a configuration: a file, overrides, validation.

Nothing but the configuration file is opened here, so every fault of a configuration is reported
before any weight file is touched.
"""

from __future__ import annotations

import difflib
import json
import reprlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import ValidationError

from streammerge.config.keys import LEGACY_NAMES, NO_EFFECT_KEYS, REFUSED_KEYS, TRAINING_KEYS
from streammerge.config.model import ExportConfig, field_names
from streammerge.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["load_config", "parse_config", "parse_overrides"]

MAX_CONFIG_BYTES = 10_000_000
# keys of which at least one shows that a file means to export
_EXPORT_MARKS = ("export_dir", "export_size", "export_device", "export_legacy_format")


class _UniqueKeyLoader(yaml.SafeLoader):
    """Refuse a key that is written twice, of which YAML would drop the first in silence."""


def _unique_mapping(loader: _UniqueKeyLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node)
        if not isinstance(key, str):
            raise ConfigError("a key is not text", where=f"line {key_node.start_mark.line + 1}")
        if key in seen:
            raise ConfigError(
                f"key '{key}' is given twice", where=f"line {key_node.start_mark.line + 1}"
            )
        seen.add(key)
    return dict(loader.construct_mapping(node, deep=True))


_UniqueKeyLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_mapping)


def _unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ConfigError(f"key '{key}' is given twice", where="its JSON")
        found[key] = value
    return found


def load_config(path: Path | str | None, overrides: Sequence[str] = ()) -> ExportConfig:
    """Load a configuration file and apply overrides.

    Args:
        path: A `.yaml`, `.yml` or `.json` file; None takes everything from the overrides.
        overrides: `key=value`, or `--key value` as two items; values are read as YAML.

    Raises:
        ConfigError: The file or a value cannot be used; the message names the key.
    """
    values = {} if path is None else _read_file(Path(path))
    values.update(parse_overrides(overrides))
    return parse_config(values, where=None if path is None else str(path))


def parse_config(values: Mapping[str, Any], *, where: str | None = None) -> ExportConfig:
    """Validate the keys and values of a configuration.

    Args:
        values: Keys and values as YAML gives them.
        where: Name of the file, for messages.

    Raises:
        ConfigError: A key or a value cannot be used; the message names it.
    """
    named = _rename_legacy(values, where)
    _check_training(named, where)
    notes = []
    kept = {}
    for key, value in named.items():
        if key in field_names():
            kept[key] = value
        elif key in NO_EFFECT_KEYS:
            notes.append(f"{key} has no effect on an export")
        elif key in REFUSED_KEYS:
            default, hint = REFUSED_KEYS[key]
            if value != default:
                raise ConfigError(
                    f"{key} is not supported", where=where, got=reprlib.repr(value), hint=hint
                )
        else:
            raise _unknown_key(key, where)
    # LLaMA-Factory's null is "not given"
    kept = {key: value for key, value in kept.items() if value is not None}
    if kept.get("template"):
        notes.append(
            f"template '{kept['template']}': the base's own tokenizer and chat template are kept"
        )
    try:
        return ExportConfig(**kept, notes=tuple(notes))
    except ValidationError as error:
        raise _from_pydantic(error, where) from error


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """Parse `key=value`, `--key=value`, `--key value` and the bare switch `--key`.

    Raises:
        ConfigError: An item is none of these.
    """
    values: dict[str, Any] = {}
    items = list(overrides)
    while items:
        item = items.pop(0)
        key, equals, text = item.removeprefix("--").partition("=")
        if not equals and item.startswith("--"):
            is_switch = not items or items[0].startswith("--") or _is_assignment(items[0])
            text = "true" if is_switch else items.pop(0)
        elif not equals:
            raise ConfigError(
                "override is not understood", got=repr(item), expected="key=value or --key value"
            )
        try:
            values[key.replace("-", "_")] = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise ConfigError(f"value of '{key}' is not valid YAML", got=repr(text)) from error
    return values


def _is_assignment(item: str) -> bool:
    return "=" in item and item.partition("=")[0].isidentifier()


def _read_file(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ConfigError("configuration file is too large", where=path)
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"cannot read the configuration ({error.strerror})", where=path
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError("configuration is not UTF-8 text", where=path) from error
    try:
        values = (
            json.loads(text, object_pairs_hook=_unique_pairs)
            if path.suffix == ".json"
            else yaml.load(text, _UniqueKeyLoader)  # noqa: S506 (a SafeLoader)
        )
    except ConfigError as error:
        raise ConfigError(error.what, where=f"{path}, {error.where}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        kind = "JSON" if path.suffix == ".json" else "YAML"
        raise ConfigError(
            f"configuration is not valid {kind}", where=path, got=" ".join(str(error).split())
        ) from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConfigError(
            "configuration is not a map of keys", where=path, got=type(values).__name__
        )
    return values


def _rename_legacy(values: Mapping[str, Any], where: str | None) -> dict[str, Any]:
    renamed = {}
    for key, value in values.items():
        name = LEGACY_NAMES.get(key, key)
        if name in renamed or (name != key and name in values):
            raise ConfigError(f"'{key}' and '{name}' are the same key", where=where)
        renamed[name] = value
    return renamed


def _check_training(values: Mapping[str, Any], where: str | None) -> None:
    found = [key for key in values if key in TRAINING_KEYS]
    if not found:
        return
    if any(key in values for key in _EXPORT_MARKS):
        raise ConfigError(
            f"'{found[0]}' belongs to training, not to an export", where=where, hint="remove it"
        )
    raise ConfigError(
        f"this is a training configuration ({', '.join(found[:3])}), not an export configuration",
        where=where,
        hint="an export needs model_name_or_path, adapter_name_or_path (the training's output_dir"
        + (f", '{values['output_dir']}'" if values.get("output_dir") else "")
        + ") and export_dir",
    )


def _unknown_key(key: str, where: str | None) -> ConfigError:
    known = sorted(field_names() | NO_EFFECT_KEYS | REFUSED_KEYS.keys())
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return ConfigError(
        f"unknown key '{key}'",
        where=where,
        hint=f"did you mean '{near[0]}'?" if near else "see `streammerge export --help`",
    )


def _from_pydantic(error: ValidationError, where: str | None) -> ConfigError:
    # one fault a message: the first, and how many follow
    faults = error.errors(include_url=False)
    first = faults[0]
    key = str(first["loc"][0]) if first["loc"] else None
    more = f"{len(faults) - 1} more after this one" if len(faults) > 1 else None
    if first["type"] == "missing":
        return ConfigError(f"'{key}' is missing", where=where, hint=more)
    message = str(first["msg"]).removeprefix("Value error, ")
    if key is None:
        return ConfigError(message, where=where, hint=more)
    return ConfigError(
        f"bad value for '{key}'",
        where=where,
        expected=message[0].lower() + message[1:],
        got=reprlib.repr(first["input"]),
        hint=more,
    )
