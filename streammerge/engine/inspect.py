"""Say what a folder holds, from headers alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from streammerge.adapters.adapter import open_adapter
from streammerge.checkpoint.index import open_checkpoint
from streammerge.checkpoint.jsonfile import read_json_object
from streammerge.errors import AdapterError

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
    """Summarise an adapter, or say why it cannot be merged."""
    try:
        adapter = open_adapter(path)
    except AdapterError as error:
        kind = read_json_object(path / "adapter_config.json", error=AdapterError).get("peft_type")
        if not isinstance(kind, str):
            # not an adapter at all
            raise
        return {
            "kind": "adapter",
            "path": str(path),
            "peft_type": kind,
            "is_mergeable": False,
            "reason": str(error),
        }
    config, tuner = adapter.config, adapter.config.tuner
    modules = [
        {"name": module.module, **tuner.describe(module, config.settings)}
        for module in adapter.modules
    ]
    return {
        "kind": "adapter",
        "path": str(path),
        "base_model": config.base_model,
        "peft_version": config.peft_version,
        "task_type": config.task_type,
        "peft_type": tuner.peft_type,
        "is_mergeable": True,
        "formula": tuner.formula,
        "variants": list(tuner.variants(config.settings)),
        "ranks": sorted({m["rank"] for m in modules if "rank" in m}),
        "scalings": sorted({m["scaling"] for m in modules if "scaling" in m}),
        "target_parameters": list(config.target_parameters),
        "layer_replication": [list(pair) for pair in config.layer_replication],
        "tensors_total": len(adapter.keys),
        "modules": modules,
        "token_rows": [
            {"name": rows.module, "tokens": list(rows.indices)} for rows in adapter.rows
        ],
        "shared": {name: list(tensor.shape) for name, tensor in adapter.shared.items()},
        "replacements": [
            {"name": r.path, "dtype": r.tensor.dtype.value, "shape": list(r.tensor.shape)}
            for r in adapter.replacements
        ],
    }
