"""Open an adapter folder: its configuration and the place of every tensor, no tensor read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from streammerge.adapters.config import AdapterConfig, read_adapter_config
from streammerge.adapters.keys import Role, parse_key
from streammerge.adapters.tuners.base import AdapterModule
from streammerge.checkpoint.header import StoredTensor, read_header
from streammerge.checkpoint.torch_bin import read_torch_bin
from streammerge.errors import AdapterError

if TYPE_CHECKING:
    from pathlib import Path

    from streammerge.adapters.options import Choices

__all__ = ["Adapter", "Replacement", "RowReplacement", "open_adapter"]

_K = TypeVar("_K")
_V = TypeVar("_V")


@dataclass(frozen=True, slots=True)
class Replacement:
    """A whole tensor that takes the place of a base tensor, or is new."""

    path: str
    """Path of the parameter in memory."""
    tensor: StoredTensor
    is_base_copy: bool
    """Whether it is where the base starts from (`base_layer`), with factors still to be added."""


@dataclass(frozen=True, slots=True)
class RowReplacement:
    """Rows of an embedding, or of a head, that were trained by themselves."""

    module: str
    """Path of the module in memory."""
    tensor: StoredTensor
    """(number of tokens, dim)"""
    indices: tuple[int, ...]
    """The row that each of them replaces."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """One adapter, opened."""

    path: Path
    config: AdapterConfig
    modules: tuple[AdapterModule, ...]
    replacements: tuple[Replacement, ...] = ()
    rows: tuple[RowReplacement, ...] = ()
    shared: dict[str, StoredTensor] = field(default_factory=dict)
    """Tensors that the modules share."""
    twins: tuple[str, ...] = ()
    """Keys that repeat another one (`original_module`, `modules_to_save`)."""
    keys: tuple[str, ...] = field(repr=False, default=())
    """Every key of the file."""


def open_adapter(folder: Path, choices: Choices | None = None) -> Adapter:
    """Open an adapter.

    Args:
        folder: The adapter's folder.
        choices: What the user says of it.

    Raises:
        AdapterError: The adapter is damaged, or of a kind that cannot be merged.
        CheckpointError: The file that holds its tensors is damaged.
    """
    if not folder.is_dir():
        raise AdapterError("adapter is not a folder", where=folder)
    config = read_adapter_config(folder, choices)
    tensors = _read_tensors(folder)
    if not tensors:
        raise AdapterError("adapter holds no tensor", where=folder)
    sorter = _Sorter(config)
    for tensor in tensors:
        sorter.add(tensor)
    return sorter.adapter(folder, tuple(tensor.name for tensor in tensors))


def _read_tensors(folder: Path) -> list[StoredTensor]:
    safetensors, legacy = folder / "adapter_model.safetensors", folder / "adapter_model.bin"
    if safetensors.exists():
        return read_header(safetensors)[0]
    if legacy.exists():
        return read_torch_bin(legacy)
    raise AdapterError(
        "adapter has no tensors",
        where=folder,
        expected="adapter_model.safetensors or adapter_model.bin",
        got=", ".join(sorted(p.name for p in folder.iterdir())[:6]),
    )


class _Sorter:
    """Sorts the tensors of a file by what they are for."""

    def __init__(self, config: AdapterConfig) -> None:
        self._config = config
        self._factors: dict[tuple[str, int, bool], dict[str, StoredTensor]] = {}
        self._shared: dict[str, StoredTensor] = {}
        self._whole: dict[str, Replacement] = {}
        self._rows: dict[str, StoredTensor] = {}
        self._saved_twins: dict[str, StoredTensor] = {}
        self._twins: list[str] = []

    def add(self, tensor: StoredTensor) -> None:
        """Put a tensor where it belongs."""
        key = parse_key(tensor.name, self._config.tuner)
        if key.role is Role.FACTOR:
            place = (key.module, key.depth, key.is_inner)
            _add(self._factors.setdefault(place, {}), key.name, tensor, tensor)
        elif key.role is Role.SHARED:
            _add(self._shared, key.name, tensor, tensor)
        elif key.role is Role.TRAINED_ROWS:
            _add(self._rows, key.module, tensor, tensor)
        elif key.role is Role.SAVED_TWIN:
            _add(self._saved_twins, key.path, tensor, tensor)
        elif key.role is Role.ORIGINAL_TWIN:
            self._twins.append(tensor.name)
        else:
            is_copy = key.role is Role.BASE_COPY
            _add(self._whole, key.path, Replacement(key.path, tensor, is_copy), tensor)

    def adapter(self, folder: Path, keys: tuple[str, ...]) -> Adapter:
        """Return what has come together."""
        for path, tensor in self._saved_twins.items():
            # a resized vocabulary is saved twice; a file with the trained copy alone is just as
            # good
            if path in self._whole:
                self._twins.append(tensor.name)
            else:
                self._whole[path] = Replacement(path, tensor, is_base_copy=False)
        tuner, modules = self._config.tuner, []
        for (name, depth, is_inner), found in self._factors.items():
            for tensor in found.values():
                _check_dtype(tensor)
            where = f"module '{name}' of {folder}"
            module = AdapterModule(name, found, where, depth, is_inner)
            tuner.check(module, self._config.settings)
            modules.append(module)
        for tensor in self._shared.values():
            _check_dtype(tensor)
        return Adapter(
            folder,
            self._config,
            tuple(modules),
            tuple(self._whole.values()),
            tuple(self._row_replacement(name, tensor) for name, tensor in self._rows.items()),
            self._shared,
            tuple(self._twins),
            keys,
        )

    def _row_replacement(self, module: str, tensor: StoredTensor) -> RowReplacement:
        rows = self._config.token_rows
        indices = None
        if rows is not None:
            named = [name for name in rows.indices if name and f".{module}".endswith(f".{name}")]
            # a tied head is stored too, with the indices of the embedding
            only = next(iter(rows.indices.values())) if len(rows.indices) == 1 else None
            indices = rows.indices[max(named, key=len)] if named else only
        if indices is None or tensor.shape[:1] != (len(indices),) or len(tensor.shape) != 2:
            raise AdapterError(
                "token rows and the indices in adapter_config.json disagree",
                where=f"key '{tensor.name}' of {tensor.path}",
                expected="none" if indices is None else f"{len(indices)} rows",
                got=tensor.shape,
            )
        if len(set(indices)) != len(indices):
            raise AdapterError(
                "token indices name a row twice", where=self._config.path, got=list(indices)[:20]
            )
        _check_dtype(tensor, may_be_whole=False)
        return RowReplacement(module, tensor, indices)


def _add(into: dict[_K, _V], key: _K, value: _V, tensor: StoredTensor) -> None:
    if key in into:
        raise AdapterError(
            "two keys of the adapter mean the same tensor",
            where=f"key '{tensor.name}' of {tensor.path}",
            hint="several adapters in one file? Save one adapter per folder",
        )
    into[key] = value


def _check_dtype(tensor: StoredTensor, *, may_be_whole: bool = True) -> None:
    # some kinds of adapters store positions; which of their tensors, they check themselves
    is_whole = tensor.dtype.kind in {"int", "bool"}
    if not tensor.dtype.is_mergeable and not (is_whole and may_be_whole):
        raise AdapterError(
            "adapter tensor has a dtype that cannot be merged",
            where=f"key '{tensor.name}' of {tensor.path}",
            expected="F16, BF16, F32 or F64",
            got=tensor.dtype.value,
        )
