"""What a folder holds, as JSON."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from streammerge.engine.inspect import inspect_folder
from streammerge.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

Q = "model.layers.0.self_attn.q_proj"


def test_checkpoint(folders: tuple[Path, Path]) -> None:
    base, _ = folders
    (base / "consolidated.safetensors").write_bytes(b"x")
    found = json.loads(json.dumps(inspect_folder(base)))
    tensors = found.pop("tensors")
    assert found == {
        "kind": "checkpoint",
        "path": str(base),
        "format": "safetensors",
        "model_type": "llama",
        "quantization": None,
        "bytes": 512 + 256 + 16 + 512,
        "bytes_by_dtype": {"F32": 1280, "F16": 16},
        "shards": [{"name": "model.safetensors", "tensors": 4, "bytes": 1296}],
        "unused_weight_files": ["consolidated.safetensors"],
    }
    assert sorted(tensors, key=lambda t: str(t["name"]))[1:3] == [
        {"name": "model.embed_tokens.weight", "dtype": "F32", "shape": [16, 8], "bytes": 512},
        {"name": f"{Q}.weight", "dtype": "F32", "shape": [8, 8], "bytes": 256},
    ]


@pytest.mark.parametrize("section", [{"quant_method": "awq"}, {}, None])
def test_quantization_is_named(folders: tuple[Path, Path], section: dict[str, str] | None) -> None:
    base, _ = folders
    (base / "config.json").write_text(json.dumps({"quantization_config": section}))
    assert inspect_folder(base)["quantization"] == (section or {}).get("quant_method")


def test_adapter(folders: tuple[Path, Path]) -> None:
    _, adapter = folders
    assert json.loads(json.dumps(inspect_folder(adapter))) == {
        "kind": "adapter",
        "path": str(adapter),
        "base_model": None,
        "peft_version": None,
        "task_type": "CAUSAL_LM",
        "use_rslora": False,
        "use_dora": False,
        "ranks": [2],
        "scalings": [1.5],
        "tensors_total": 3,
        "modules": [{"name": Q, "rank": 2, "scaling": 1.5, "shape": [8, 8], "dtype": "F32"}],
        "replacements": [{"name": "model.norm.weight", "dtype": "F32", "shape": [8]}],
    }


def test_neither_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        inspect_folder(tmp_path)
    with pytest.raises(CheckpointError, match="not a folder"):
        inspect_folder(tmp_path / "absent")
