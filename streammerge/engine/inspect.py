"""Say what a folder holds, from headers alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from streammerge.adapters.adapter import open_adapter
from streammerge.checkpoint.index import open_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["inspect_folder"]


def inspect_folder(path: Path) -> dict[str, Any]:
    """Summarise a checkpoint or an adapter, as JSON types.

    Raises:
        InputError: The folder holds neither, or what it holds is damaged.
    """
    return _adapter(path) if (path / "adapter_config.json").exists() else _checkpoint(path)


def _checkpoint(path: Path) -> dict[str, Any]:
    """Summarise a checkpoint."""
    base = open_checkpoint(path)
    dtypes: dict[str, int] = {}
    for tensor in base.tensors.values():
        dtypes[tensor.dtype.value] = dtypes.get(tensor.dtype.value, 0) + tensor.nbytes
    return {
        "kind": "checkpoint",
        "path": str(path),
        "format": base.format,
        "model_type": base.config.get("model_type"),
        "quantization": (base.config.get("quantization_config") or {}).get("quant_method"),
        "bytes": base.total_bytes,
        "bytes_by_dtype": dtypes,
        "shards": [
            {
                "name": s.path.name,
                "tensors": len(s.tensors),
                "bytes": sum(t.nbytes for t in s.tensors),
            }
            for s in base.shards
        ],
        "tensors": [
            {"name": t.name, "dtype": t.dtype.value, "shape": list(t.shape), "bytes": t.nbytes}
            for t in base.tensors.values()
        ],
        "unused_weight_files": list(base.unused_weight_files),
    }


def _adapter(path: Path) -> dict[str, Any]:
    """Summarise an adapter."""
    adapter = open_adapter(path)
    config = adapter.config
    return {
        "kind": "adapter",
        "path": str(path),
        "base_model": config.base_model,
        "peft_version": config.peft_version,
        "task_type": config.task_type,
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
        "ranks": sorted({module.rank for module in adapter.modules}),
        "scalings": sorted({module.scaling for module in adapter.modules}),
        "tensors_total": len(adapter.keys),
        "modules": [
            {
                "name": module.module,
                "rank": module.rank,
                "scaling": module.scaling,
                "shape": [module.b.shape[0], module.a.shape[1]],
                "dtype": module.a.dtype.value,
            }
            for module in adapter.modules
        ],
        "replacements": [
            {"name": r.path, "dtype": r.tensor.dtype.value, "shape": list(r.tensor.shape)}
            for r in adapter.replacements
        ],
    }
