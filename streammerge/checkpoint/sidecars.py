"""The files beside the weights: which of them a merged model needs, and how they change."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import TYPE_CHECKING, Any

from streammerge.checkpoint.jsonfile import read_json_object
from streammerge.checkpoint.writer import writing
from streammerge.errors import CheckpointError, InputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

__all__ = ["Sidecar", "Sidecars", "added_tokens", "find_sidecars", "write_sidecars"]

# weights in any format, and what trainers leave behind: never carried into a merged model
_LEFT_OUT = (
    "*.safetensors", "*.bin", "*.pth", "*.ckpt", "*.gguf", "*.ggml", "*.h5", "*.msgpack", "*.ot",
    "*.onnx", "*.onnx_data", "*.tflite", "*.mlmodel", "*.engine", "*.index.json", "*.index.*.json",
    "pytorch_model*", "consolidated*", "model*.pt", "optimizer*.pt", "scheduler*.pt", "rng_state*",
    "trainer_state.json", "training_args.bin", "adapter_config.json", "params.json",
    "*.incomplete", "*.lock", "*.partial",
)  # fmt: skip
_FOLDERS_LEFT_OUT = ("original", "metal", "onnx", "openvino", "coreml", "checkpoint-*", "runs",
                     "global_step*", "__pycache__", ".*")  # fmt: skip
# what makes up a tokenizer, whatever its kind
_TOKENIZER_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*", "vocab.*",
    "merges.txt", "*.tiktoken", "*.model", "spiece.*", "sentencepiece.*", "tekken.json",
)  # fmt: skip


COPY_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Sidecar:
    """One file to copy."""

    name: str
    """Path inside the output folder."""
    source: Path


@dataclass(frozen=True, slots=True)
class Sidecars:
    """What goes beside the merged weights, and what does not."""

    files: tuple[Sidecar, ...]
    left_out: tuple[str, ...]
    """Files of the base that are not carried over."""


def find_sidecars(
    base: Path, *, tokenizer_from: Path | None, extra: Iterable[Path] = ()
) -> Sidecars:
    """Choose the files to copy.

    Args:
        base: The base checkpoint's folder.
        tokenizer_from: Folder whose tokenizer files replace the base's, if any.
        extra: Further files to copy into the top of the output.
    """
    chosen: dict[str, Path] = {}
    left_out = []
    for name, path in _walk(base, ""):
        if _is_left_out(name) or path.is_dir() or not _is_inside(path, base):
            left_out.append(name)
        elif not (tokenizer_from is not None and _is_tokenizer_file(name)):
            chosen[name] = path
    if tokenizer_from is not None:
        for path in sorted(tokenizer_from.iterdir()):
            if (
                _is_inside(path, tokenizer_from)
                and _is_tokenizer_file(path.name)
                and not _is_left_out(path.name)
            ):
                chosen[path.name] = path
    for path in extra:
        chosen[path.name] = path
    chosen.pop("config.json", None)
    for path in chosen.values():
        if not os.access(path, os.R_OK):
            raise CheckpointError("file cannot be read", where=path, hint="check its permissions")
    files = tuple(Sidecar(name, source) for name, source in sorted(chosen.items()))
    return Sidecars(files, tuple(sorted(left_out)))


def added_tokens(folder: Path) -> dict[str, int]:
    """Tokens that a tokenizer has beyond its model's vocabulary, with their ids.

    Raises:
        CheckpointError: A tokenizer file is damaged.
    """
    found: dict[str, int] = {}
    tokenizer, legacy = folder / "tokenizer.json", folder / "added_tokens.json"
    if tokenizer.exists():
        entries = read_json_object(tokenizer, error=CheckpointError).get("added_tokens") or []
        if not isinstance(entries, list) or not all(map(_is_token, entries)):
            raise CheckpointError("added_tokens is malformed", where=tokenizer)
        found.update({entry["content"]: entry["id"] for entry in entries})
    if legacy.exists():
        found.update(read_json_object(legacy, error=CheckpointError))
    return found


def _is_token(entry: object) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("content"), str)
        and isinstance(entry.get("id"), int)
    )


def write_sidecars(
    folder: Path,
    sidecars: Sidecars,
    *,
    config_source: Path,
    config_edits: dict[str, Any],
    config: dict[str, Any],
) -> None:
    """Copy the sidecars, and config.json with its edits.

    A config.json without edits is copied byte for byte; otherwise the order of its keys is kept.

    Raises:
        InputError: A file vanished or became unreadable during the run.
    """
    for sidecar in sidecars.files:
        _copy_durably(sidecar.source, folder / sidecar.name)
    if config_edits:
        write_durably(folder / "config.json", _to_json(_merge_edits(config, config_edits)))
    elif config_source.exists():
        _copy_durably(config_source, folder / "config.json")


def _copy_durably(source: Path, target: Path) -> None:
    try:
        reading = source.open("rb")
    except OSError as error:
        raise InputError(f"cannot read the file ({error.strerror})", where=source) from error
    with reading, writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("wb") as file:
            shutil.copyfileobj(reading, file, COPY_BYTES)
            file.flush()
            os.fsync(file.fileno())


def write_durably(path: Path, text: str) -> int:
    """Write a small text file and wait for the disk; return its size in bytes."""
    raw = text.encode()
    with writing(path), path.open("wb") as file:
        file.write(raw)
        file.flush()
        os.fsync(file.fileno())
    return len(raw)


def _to_json(value: dict[str, Any]) -> str:
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    # half a surrogate pair, which JSON may hold as an escape, has no UTF-8 form
    return text if text.isascii() or _is_encodable(text) else json.dumps(value, indent=2) + "\n"


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _merge_edits(config: dict[str, Any], edits: dict[str, Any]) -> dict[str, Any]:
    """Apply edits; a nested edit goes into the nested section, None removes the key."""
    merged = dict(config)
    for key, value in edits.items():
        if value is None:
            merged.pop(key, None)
        elif isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = _merge_edits(merged[key], value)
        else:
            merged[key] = value
    return merged


def _walk(folder: Path, prefix: str) -> Iterator[tuple[str, Path]]:
    """Yield files, and the folders that are not entered, by their path below the base."""
    for path in sorted(folder.iterdir()):
        name = prefix + path.name
        if not path.is_dir():
            if not path.name.startswith("."):
                yield name, path
        elif path.is_symlink() or any(fnmatch(path.name, p) for p in _FOLDERS_LEFT_OUT):
            yield name + "/", path
        else:
            yield from _walk(path, name + "/")


def _is_inside(path: Path, folder: Path) -> bool:
    """Whether a path is a regular file of its folder, or of the hub cache it links to."""
    target = path.resolve()
    # a snapshot of the hub's cache is <repository>/snapshots/<revision>, its files are in blobs
    roots = [folder.resolve(), folder.resolve().parent.parent / "blobs"]
    return target.is_file() and any(root in target.parents for root in roots)


def _is_left_out(name: str) -> bool:
    last = name.rstrip("/").rpartition("/")[2]
    return any(fnmatch(last, pattern) for pattern in _LEFT_OUT)


def _is_tokenizer_file(name: str) -> bool:
    return "/" not in name and any(fnmatch(name, pattern) for pattern in _TOKENIZER_FILES)
