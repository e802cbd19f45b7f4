"""What a folder holds, as JSON."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from streammerge.engine.inspect import inspect_folder
from streammerge.errors import AdapterError, CheckpointError

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
        "peft_type": "LORA",
        "is_mergeable": True,
        "formula": "W + scaling * B @ A",
        "variants": [],
        "ranks": [2],
        "scalings": [1.5],
        "target_parameters": [],
        "layer_replication": [],
        "tensors_total": 3,
        "modules": [{"name": Q, "rank": 2, "scaling": 1.5, "shape": [8, 8], "dtype": "F32"}],
        "token_rows": [],
        "shared": {},
        "replacements": [{"name": "model.norm.weight", "dtype": "F32", "shape": [8]}],
    }


def configure(adapter: Path, **options: object) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **options}))


def test_what_is_beside_the_plain_formula(folders: tuple[Path, Path]) -> None:
    _, adapter = folders
    configure(
        adapter,
        use_rslora=True,
        target_parameters=["experts.gate_up_proj"],
        layer_replication=[[0, 2], [1, 3]],
        trainable_token_indices={"embed_tokens": [7, 3]},
        base_model_name_or_path="owner/base",
        peft_version="0.19.0",
    )
    tensors = load_file(adapter / "adapter_model.safetensors")
    key = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    tensors[key] = np.zeros((2, 8), np.float32)
    save_file(tensors, adapter / "adapter_model.safetensors")
    found = json.loads(json.dumps(inspect_folder(adapter)))
    assert found["variants"] == ["rsLoRA"]
    assert found["scalings"] == [3 / 2**0.5]
    assert found["target_parameters"] == ["experts.gate_up_proj"]
    assert found["layer_replication"] == [[0, 2], [1, 3]]
    assert found["token_rows"] == [{"name": "model.embed_tokens", "tokens": [7, 3]}]
    assert (found["base_model"], found["peft_version"]) == ("owner/base", "0.19.0")
    assert found["tensors_total"] == 4


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"peft_type": "PREFIX_TUNING"}, "adapter has no merged form"),
        ({"peft_type": "TOMORROW"}, "adapter is of a kind that is not known"),
        ({"use_dora": True}, "use_dora and its tensors disagree"),
    ],
)
def test_an_adapter_that_cannot_be_merged_says_why(
    options: dict[str, object], reason: str, folders: tuple[Path, Path]
) -> None:
    _, adapter = folders
    configure(adapter, **options)
    found = json.loads(json.dumps(inspect_folder(adapter)))
    assert reason in found.pop("reason")
    assert found == {
        "kind": "adapter",
        "path": str(adapter),
        "peft_type": options.get("peft_type", "LORA"),
        "is_mergeable": False,
    }


@pytest.mark.parametrize("kind", [None, 5, ["LORA"]])
def test_what_is_no_adapter_at_all_is_an_error(kind: object, folders: tuple[Path, Path]) -> None:
    _, adapter = folders
    configure(adapter, peft_type=kind)
    with pytest.raises(AdapterError, match="of a kind that is not known"):
        inspect_folder(adapter)


def test_a_damaged_adapter_is_an_error(folders: tuple[Path, Path]) -> None:
    _, adapter = folders
    (adapter / "adapter_model.safetensors").write_bytes(b"damaged file")
    with pytest.raises(CheckpointError):
        inspect_folder(adapter)
    (adapter / "adapter_config.json").write_text("{")
    with pytest.raises(AdapterError, match="not valid JSON"):
        inspect_folder(adapter)


def test_neither_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        inspect_folder(tmp_path)
    with pytest.raises(CheckpointError, match="not a folder"):
        inspect_folder(tmp_path / "absent")
