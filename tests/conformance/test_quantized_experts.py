"""Merges onto quantized experts have the bits of PEFT's onto what their codes stand for."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GptOssConfig, Qwen3MoeConfig
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import streammerge

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings("ignore")

_SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 64,
}  # fmt: skip
BLOCK = 128


def tuned(config: Any, folder: Path) -> None:
    """Save an adapter on all experts, and the model that it belongs to."""
    torch.manual_seed(5)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder / "plain")
    lora = LoraConfig(
        r=4, target_modules=["q_proj"], init_lora_weights=False,
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )  # fmt: skip
    adapter: Any = get_peft_model(model.float(), lora)
    for name, value in adapter.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(value, std=0.1)
    adapter.save_pretrained(folder / "adapter")


def write_base(folder: Path, stored: dict[str, torch.Tensor], section: dict[str, Any]) -> None:
    """Write the base in two shards: a weight's parts are in either."""
    base = folder / "base"
    base.mkdir()
    names = list(stored)
    weight_map = {}
    for number, half in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: stored[name].contiguous().clone() for name in half}, base / file)
        weight_map.update(dict.fromkeys(half, file))
    (base / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    config = json.loads((folder / "plain" / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": section}))


def check(folder: Path, decoded: dict[str, torch.Tensor], *, coded: int) -> None:
    """Merge, and compare with PEFT's merge onto the decoded model."""
    report = streammerge.export({
        "model_name_or_path": str(folder / "base"), "export_dir": str(folder / "out"),
        "adapter_name_or_path": str(folder / "adapter"),
    })  # fmt: skip
    save_file(decoded, folder / "plain" / "model.safetensors", metadata={"format": "pt"})
    model: Any = AutoModelForCausalLM.from_pretrained(folder / "plain", dtype=torch.bfloat16)
    merged: Any = PeftModel.from_pretrained(model, folder / "adapter").merge_and_unload()
    merged.save_pretrained(folder / "expected")
    found = load_file(folder / "out" / "model.safetensors")
    expected = load_file(folder / "expected" / "model.safetensors")
    assert found.keys() == expected.keys()
    changed = 0
    for name, value in found.items():
        assert value.dtype == expected[name].dtype, name
        assert torch.equal(value, expected[name]), name
        changed += ".experts." in name and not torch.equal(value, decoded[name])
    assert changed == coded
    assert any("base is quantized" in note for note in report.notes)


def test_single_experts_in_fp8(tmp_path: Path) -> None:
    """Blocks of 128 x 128 with scales in another shard, as DeepSeek-V3 stores its experts."""
    config = Qwen3MoeConfig(
        **_SIZES, intermediate_size=128, moe_intermediate_size=256, num_experts=3,
        num_experts_per_tok=2,
    )  # fmt: skip
    tuned(config, tmp_path)
    stored, decoded = {}, {}
    for name, value in load_file(tmp_path / "plain" / "model.safetensors").items():
        if not name.endswith("_proj.weight") or ".experts." not in name:
            stored[name] = decoded[name] = value
            continue
        rows, columns = value.shape
        tiles = value.float().view(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
        scales = tiles.abs().amax(dim=(1, 3)) / 448
        codes = (tiles / scales[:, None, :, None]).to(torch.float8_e4m3fn).view(rows, columns)
        stored[name], stored[f"{name}_scale_inv"] = codes, scales
        wide = scales.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
        decoded[name] = (codes.float() * wide).bfloat16()
    write_base(tmp_path, stored, {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]})
    check(tmp_path, decoded, coded=9)


def test_fused_experts_in_mxfp4(tmp_path: Path) -> None:
    """Blocks and exponents, as gpt-oss stores its experts."""
    config = GptOssConfig(
        **_SIZES, intermediate_size=64, num_local_experts=3, num_experts_per_tok=2,
        layer_types=["full_attention"],
    )  # fmt: skip
    tuned(config, tmp_path)
    stored, decoded = {}, {}
    generator = torch.Generator().manual_seed(3)
    for name, value in load_file(tmp_path / "plain" / "model.safetensors").items():
        if not name.endswith((".experts.gate_up_proj", ".experts.down_proj")):
            stored[name] = decoded[name] = value
            continue
        experts, inputs, outputs = value.shape
        shape = (experts, outputs, inputs // 32)
        blocks = torch.randint(256, (*shape, 16), dtype=torch.uint8, generator=generator)
        scales = torch.randint(118, 123, shape, dtype=torch.uint8, generator=generator)
        stored[f"{name}_blocks"], stored[f"{name}_scales"] = blocks, scales
        decoded[name] = convert_moe_packed_tensors(blocks, scales).contiguous()
    write_base(tmp_path, stored, {"quant_method": "mxfp4"})
    check(tmp_path, decoded, coded=2)
