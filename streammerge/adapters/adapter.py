"""Open an adapter folder: its configuration and the place of every tensor, no tensor read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from streammerge.adapters.config import AdapterConfig, read_adapter_config
from streammerge.adapters.keys import Role, parse_key
from streammerge.checkpoint.header import StoredTensor, read_header
from streammerge.checkpoint.torch_bin import read_torch_bin
from streammerge.errors import AdapterError

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Adapter", "LoraModule", "Replacement", "open_adapter"]

_K = TypeVar("_K")
_V = TypeVar("_V")


@dataclass(frozen=True, slots=True)
class LoraModule:
    """One module's low-rank factors.

    Shapes: `a` (R, K) and `b` (N, R); on an embedding `a` (R, vocabulary) and `b` (dim, R).
    """

    module: str
    """Path of the module in memory."""
    a: StoredTensor
    b: StoredTensor
    scaling: float
    is_embedding: bool
    magnitude: StoredTensor | None = None
    """(N,), if the module was trained with DoRA."""
    b_bias: StoredTensor | None = None
    """(N,), if the module was trained with `lora_bias`."""

    @property
    def rank(self) -> int:
        """R."""
        return self.a.shape[0]


@dataclass(frozen=True, slots=True)
class Replacement:
    """A whole tensor that takes the place of a base tensor, or is new."""

    path: str
    """Path of the parameter in memory."""
    tensor: StoredTensor
    is_base_copy: bool
    """Whether it is where the base starts from (`base_layer`), with factors still to be added."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """One adapter, opened."""

    path: Path
    config: AdapterConfig
    modules: tuple[LoraModule, ...]
    replacements: tuple[Replacement, ...]
    twins: tuple[str, ...]
    """Keys that repeat another one (`original_module`, `modules_to_save`)."""
    keys: tuple[str, ...] = field(repr=False, default=())
    """Every key of the file."""


def open_adapter(folder: Path) -> Adapter:
    """Open an adapter.

    Raises:
        AdapterError: The adapter is damaged, or of a kind that cannot be merged.
        CheckpointError: The file that holds its tensors is damaged.
    """
    if not folder.is_dir():
        raise AdapterError("adapter is not a folder", where=folder)
    config = read_adapter_config(folder)
    tensors = _read_tensors(folder)
    if not tensors:
        raise AdapterError("adapter holds no tensor", where=folder)
    factors: dict[str, dict[Role, StoredTensor]] = {}
    whole: dict[str, Replacement] = {}
    saved_twins: dict[str, StoredTensor] = {}
    twins = []
    for tensor in tensors:
        key = parse_key(tensor.name)
        if key.role in {Role.REPLACEMENT, Role.BASE_COPY}:
            _add(whole, key.path, Replacement(key.path, tensor, key.role is Role.BASE_COPY), tensor)
        elif key.role is Role.SAVED_TWIN:
            _add(saved_twins, key.path, tensor, tensor)
        elif key.role is Role.ORIGINAL_TWIN:
            twins.append(tensor.name)
        else:
            _add(factors.setdefault(key.module, {}), key.role, tensor, tensor)
    for path, tensor in saved_twins.items():
        # a resized vocabulary is saved twice; a file with the trained copy alone is just as good
        if path in whole:
            twins.append(tensor.name)
        else:
            whole[path] = Replacement(path, tensor, is_base_copy=False)
    modules = tuple(_build_module(name, found, config) for name, found in factors.items())
    keys = tuple(tensor.name for tensor in tensors)
    return Adapter(folder, config, modules, tuple(whole.values()), tuple(twins), keys)


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


def _add(into: dict[_K, _V], key: _K, value: _V, tensor: StoredTensor) -> None:
    if key in into:
        raise AdapterError(
            "two keys of the adapter mean the same tensor",
            where=f"key '{tensor.name}' of {tensor.path}",
            hint="several adapters in one file? Save one adapter per folder",
        )
    into[key] = value


def _build_module(name: str, found: dict[Role, StoredTensor], config: AdapterConfig) -> LoraModule:
    where = f"module '{name}' of {config.path.parent}"
    is_embedding = Role.EMBEDDING_A in found or Role.EMBEDDING_B in found
    if is_embedding and not found.keys().isdisjoint({Role.LORA_A, Role.LORA_B}):
        raise AdapterError("module has the factors of an embedding and of a layer", where=where)
    wanted = (Role.EMBEDDING_A, Role.EMBEDDING_B) if is_embedding else (Role.LORA_A, Role.LORA_B)
    missing = [role.value for role in wanted if role not in found]
    if missing:
        raise AdapterError(f"module has no {' and no '.join(missing)}", where=where)
    a, b = found[wanted[0]], found[wanted[1]]
    _check_factors(a, b, where=where, rank=config.rank_of(name))
    magnitude, b_bias = found.get(Role.MAGNITUDE), found.get(Role.LORA_B_BIAS)
    if config.use_dora != (magnitude is not None):
        raise AdapterError(
            "adapter's use_dora and its tensors disagree",
            where=where,
            expected=f"{'a' if config.use_dora else 'no'} lora_magnitude_vector",
        )
    for vector in (magnitude, b_bias):
        if vector is not None:
            _check_dtype(vector)
        if vector is not None and vector.shape != (b.shape[0],):
            raise AdapterError(
                "vector does not fit lora_B",
                where=f"key '{vector.name}' of {vector.path}",
                expected=(b.shape[0],),
                got=vector.shape,
            )
    return LoraModule(name, a, b, config.scaling_of(name), is_embedding, magnitude, b_bias)


def _check_factors(a: StoredTensor, b: StoredTensor, *, where: str, rank: int) -> None:
    for tensor in (a, b):
        if 0 in tensor.shape or len(tensor.shape) == 1:
            raise AdapterError(
                "adapter tensor is empty or flat: ZeRO-3 or FSDP shards were not gathered",
                where=f"key '{tensor.name}' of {tensor.path}",
                got=f"shape {tensor.shape}",
                hint="consolidate the training checkpoint (zero_to_fp32), save the adapter again",
            )
        _check_dtype(tensor)
    if len(a.shape) != 2 or len(b.shape) != 2:
        raise AdapterError(
            "adapter is on a convolution, which is not merged by this version",
            where=where,
            got=f"lora_A {a.shape}, lora_B {b.shape}",
            hint="merge it with PEFT",
        )
    if a.shape[0] != b.shape[1] or a.shape[0] != rank:
        raise AdapterError(
            "rank of the tensors and of adapter_config.json disagree",
            where=where,
            expected=f"r = {rank}",
            got=f"lora_A {a.shape}, lora_B {b.shape}",
            hint="adapter_config.json belongs to another adapter?",
        )


def _check_dtype(tensor: StoredTensor) -> None:
    if not tensor.dtype.is_mergeable:
        raise AdapterError(
            "adapter tensor has a dtype that cannot be merged",
            where=f"key '{tensor.name}' of {tensor.path}",
            expected="F16, BF16, F32 or F64",
            got=tensor.dtype.value,
        )
