"""Open a checkpoint folder: every tensor's place, checked, and no weight read.

The index decides which shards there are; a folder is never globbed for weights. What lies beside
the named shards and could be mistaken for one is an error, unless it is a copy of the model in
another layout that loaders are known to ignore (`consolidated*`, `.bin` beside safetensors,
variants).
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal

from streammerge.checkpoint.header import read_header
from streammerge.checkpoint.jsonfile import read_json_object
from streammerge.checkpoint.torch_bin import read_torch_bin
from streammerge.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from streammerge.checkpoint.header import StoredTensor
    from streammerge.dtypes import Dtype

__all__ = ["Checkpoint", "CheckpointFormat", "Shard", "open_checkpoint"]

CheckpointFormat = Literal["safetensors", "torch_bin"]

_SINGLE = {"safetensors": "model.safetensors", "torch_bin": "pytorch_model.bin"}
_INDEX = {
    "safetensors": "model.safetensors.index.json",
    "torch_bin": "pytorch_model.bin.index.json",
}
# other layouts of the same weights that loaders of the hub layout do not open: Mistral's and Meta's
# `consolidated*`, hub variants (`model.fp16-00001-of-00002.safetensors`), an adapter kept beside
_OTHER_LAYOUTS = ("consolidated*", "adapter_model*", "value_head*")
MAX_NAME_BYTES = 255  # what Linux file systems take
_VARIANT = re.compile(r"model\.[A-Za-z0-9_]+(-\d{5}-of-\d{5})?\.safetensors")


@dataclass(frozen=True, slots=True)
class Shard:
    """One weight file and its tensors, in the order of their bytes."""

    path: Path
    tensors: tuple[StoredTensor, ...]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint folder, opened: its config and the place of every tensor."""

    path: Path
    format: CheckpointFormat
    shards: tuple[Shard, ...]
    config: dict[str, Any]
    """config.json as it stands; empty if there is none."""
    tensors: dict[str, StoredTensor] = field(repr=False)
    """Every tensor by name, in file order."""
    unused_weight_files: tuple[str, ...] = ()
    """Weight files of the folder that are not part of the checkpoint."""

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def main_dtype(self) -> Dtype:
        """The dtype that holds most of the bytes."""
        counted: Counter[Dtype] = Counter()
        for tensor in self.tensors.values():
            counted[tensor.dtype] += tensor.nbytes
        return counted.most_common(1)[0][0]


def open_checkpoint(path: Path, *, ignore_files: Sequence[str] = ()) -> Checkpoint:
    """Read the index and every shard's header.

    Args:
        path: The checkpoint's folder.
        ignore_files: File name patterns of stray weight files that may be ignored.

    Raises:
        CheckpointError: Something is missing, damaged, hostile, stray or there twice.
    """
    if not path.is_dir():
        raise CheckpointError(
            "checkpoint is not a folder", where=path, hint="give a folder or a hub id (owner/name)"
        )
    config_path = path / "config.json"
    try:
        next(path.iterdir(), None)
        config = _read_config(config_path) if config_path.exists() else {}
    except OSError as error:
        raise CheckpointError(f"cannot read the folder ({error.strerror})", where=path) from error
    layout, names, weight_map = _find_shards(path)
    unused = _check_strays(path, layout=layout, shards=names, ignore_files=ignore_files)
    read = _read_safetensors if layout == "safetensors" else read_torch_bin
    shards = tuple(Shard(path / name, tuple(read(path / name))) for name in names)
    tensors = _collect(shards)
    if weight_map is not None:
        _check_against_index(path / _INDEX[layout], weight_map, tensors)
    if not tensors:
        raise CheckpointError("checkpoint holds no tensor", where=path)
    return Checkpoint(path, layout, shards, config, tensors, unused)


def _read_config(path: Path) -> dict[str, Any]:
    """Read config.json; the keys that decide something must be what they are taken for."""
    config = read_json_object(path, error=CheckpointError)
    sections = [config]
    for key in ("text_config", "quantization_config"):
        value = config.get(key)
        if value is not None and not isinstance(value, dict):
            raise CheckpointError(f"bad {key}", where=path, expected="a map", got=repr(value)[:80])
        sections += [value] if value and key == "text_config" else []
    for section in sections:
        for key, kind in (
            ("tie_word_embeddings", bool),
            ("model_type", str),
            ("architectures", list),
        ):
            value = section.get(key)
            if value is not None and not isinstance(value, kind):
                raise CheckpointError(
                    f"bad {key}", where=path, expected=f"a {kind.__name__}", got=repr(value)[:80]
                )
    return config


def _read_safetensors(path: Path) -> list[StoredTensor]:
    return read_header(path)[0]


def _find_shards(path: Path) -> tuple[CheckpointFormat, list[str], dict[str, str] | None]:
    """Name the shards, from the index if there is one."""
    layouts: tuple[CheckpointFormat, ...] = ("safetensors", "torch_bin")
    for layout in layouts:
        index, single = path / _INDEX[layout], _SINGLE[layout]
        if index.exists():
            weight_map = _read_weight_map(index)
            names = list(dict.fromkeys(weight_map.values()))
            for name in names:
                if not (path / name).exists():
                    raise CheckpointError(
                        "shard is missing",
                        where=path / name,
                        hint=f"{index.name} names it: download it again",
                    )
            return layout, names, weight_map
        if (path / single).exists():
            return layout, [single], None
    present = sorted(p.name for p in path.iterdir())[:6]
    raise CheckpointError(
        "folder holds no checkpoint",
        where=path,
        expected="model.safetensors, model.safetensors.index.json or their pytorch_model.bin forms",
        got=", ".join(present) or "an empty folder",
    )


def _read_weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json_object(index, error=CheckpointError).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError("index has no weight_map", where=index)
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not _is_plain_name(name):
            raise CheckpointError(
                f"index places tensor '{tensor}' outside its folder",
                where=index,
                expected="the plain name of a file beside the index",
                got=repr(name)[:200],
                hint="do not trust this checkpoint",
            )
    return weight_map


def _is_plain_name(name: str) -> bool:
    return (
        name.isprintable()
        and len(name.encode()) <= MAX_NAME_BYTES
        and "\\" not in name
        and name not in {"", ".", ".."}
        and PurePosixPath(name).name == name
    )


def _check_strays(
    path: Path, *, layout: CheckpointFormat, shards: list[str], ignore_files: Sequence[str]
) -> tuple[str, ...]:
    """Refuse weight files that could be mistaken for a shard; name the harmless ones."""
    unused = []
    for entry in sorted(path.iterdir()):
        name = entry.name
        if name in shards or not name.endswith((".safetensors", ".bin")) or entry.is_dir():
            continue
        unused.append(name)
        if name.endswith(".bin"):
            # beside safetensors `.bin` is the legacy twin; in a `.bin` folder only its own kind is
            # stray
            harmless = layout == "safetensors" or not name.startswith("pytorch_model")
        else:
            harmless = any(fnmatch(name, pattern) for pattern in _OTHER_LAYOUTS) or bool(
                _VARIANT.fullmatch(name)
            )
        if not harmless and not any(fnmatch(name, pattern) for pattern in ignore_files):
            raise CheckpointError(
                "stray weight file: the checkpoint does not name it",
                where=entry,
                expected="only " + ", ".join(shards[:3]) + (" ..." if len(shards) > 3 else ""),
                hint=f"move it away, or accept it with ignore_files: ['{name}']",
            )
    return tuple(unused)


def _collect(shards: tuple[Shard, ...]) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    for shard in shards:
        for tensor in shard.tensors:
            if tensor.name in tensors:
                raise CheckpointError(
                    f"tensor '{tensor.name}' is stored twice",
                    where=f"{tensors[tensor.name].path} and {shard.path}",
                    hint="remove one of the two shards and mend the index",
                )
            tensors[tensor.name] = tensor
    return tensors


def _check_against_index(
    index: Path, weight_map: dict[str, str], tensors: dict[str, StoredTensor]
) -> None:
    for name, shard in weight_map.items():
        stored = tensors.get(name)
        if stored is None or stored.path.name != shard:
            raise CheckpointError(
                f"tensor '{name}' is not where the index says",
                where=index,
                expected=shard,
                got="no shard" if stored is None else stored.path.name,
                hint="download the shards and the index again",
            )
    for name, stored in tensors.items():
        if name not in weight_map:
            raise CheckpointError(
                f"tensor '{name}' is in a shard but not in the index",
                where=stored.path,
                hint="shard and index do not belong together: download both again",
            )
