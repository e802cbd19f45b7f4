"""LLaMA-Factory's own export YAMLs load as they are, each to the values that it states."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from streammerge.config import load_config
from streammerge.config.model import ExportConfig

CONFIGS = Path(__file__).parent / "configs"

LLAMA = "meta-llama/Meta-Llama-3-8B-Instruct"
QWEN = "Qwen/Qwen3-4B-Instruct-2507"

EXPECTED: dict[str, dict[str, Any]] = {
    "llama3_lora_sft": {
        "model_name_or_path": LLAMA,
        "adapter_name_or_path": ("saves/llama3-8b/lora/sft",),
        "template": "llama3",
        "export_dir": Path("models/llama3_lora_sft"),
        "export_size": 2_000_000_000,
    },
    "llama3_gptq": {
        "model_name_or_path": LLAMA,
        "template": "llama3",
        "export_dir": Path("models/llama3_gptq"),
        "export_quantization_bit": 4,
        "export_quantization_dataset": "data/c4_demo.json",
        "export_size": 2_000_000_000,
    },
    "llama3_q_lora": {
        "model_name_or_path": LLAMA,
        "adapter_name_or_path": ("saves/llama3-8b/qlora/sft",),
        "template": "llama3",
        "export_dir": Path("models/llama3_q_lora"),
        "export_size": 2_000_000_000,
    },
    "qwen3_lora_sft": {
        "model_name_or_path": QWEN,
        "adapter_name_or_path": ("saves/qwen3-4b/lora/sft",),
        "template": "qwen3_nothink",
        "export_dir": Path("saves/qwen3_sft_merged"),
    },
    "qwen3_full_sft": {
        "model_name_or_path": "saves/qwen3-4b/full/sft",
        "template": "qwen3_nothink",
        "export_dir": Path("saves/qwen3_sft_merged"),
    },
    "qwen3_gptq": {
        "model_name_or_path": QWEN,
        "template": "qwen3_nothink",
        "export_dir": Path("saves/qwen3_gptq"),
        "export_quantization_bit": 4,
        "export_quantization_dataset": "data/c4_demo.jsonl",
    },
    "qwen3vl_lora_sft": {
        "model_name_or_path": "Qwen/Qwen3-VL-4B-Instruct",
        "adapter_name_or_path": ("saves/qwen3-vl-4b/lora/sft",),
        "template": "qwen3_vl_nothink",
        "export_dir": Path("saves/qwen3_vl_sft_merged"),
    },
    "mossvl_lora_sft": {
        "model_name_or_path": "OpenMOSS-Team/MOSS-VL-Instruct-0708",
        "adapter_name_or_path": ("saves/moss-vl-11b/lora/sft",),
        "template": "moss_vl",
        "export_dir": Path("saves/moss_vl_sft_merged"),
    },
}


def test_every_golden_file_has_expected_values() -> None:
    assert {path.stem for path in CONFIGS.iterdir()} == EXPECTED.keys()


@pytest.mark.parametrize("name", EXPECTED)
def test_golden_yaml_loads_to_its_values_and_defaults(name: str) -> None:
    config = load_config(CONFIGS / f"{name}.yaml")
    plain = ExportConfig(**{"export_size": 5, **EXPECTED[name], "threads": config.threads})
    size = EXPECTED[name].get("export_size", 5_000_000_000)
    expected = plain.model_dump() | {"export_size": size}
    assert config.model_dump() == expected
    assert config.max_shard_bytes == size
    assert config.finetuning_type == "lora"
    assert config.export_device == "cpu"
    assert config.export_legacy_format is False


@pytest.mark.parametrize("name", EXPECTED)
def test_golden_yaml_notes_what_has_no_effect(name: str) -> None:
    template = EXPECTED[name]["template"]
    remote = () if name.startswith("llama3") else ("trust_remote_code has no effect on an export",)
    note = f"template '{template}': the base's own tokenizer and chat template are kept"
    assert load_config(CONFIGS / f"{name}.yaml").notes == (*remote, note)
