"""Tiny models of several families, adapters with random factors, and PEFT as the oracle."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
)

import streammerge

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
CONFIGS = {
    "llama": lambda: LlamaConfig(**_SIZES),
    "llama-tied": lambda: LlamaConfig(**_SIZES, tie_word_embeddings=True),
    "llama-bias": lambda: LlamaConfig(**_SIZES, attention_bias=True, mlp_bias=True),
    "qwen2": lambda: Qwen2Config(**_SIZES),
    "qwen3": lambda: Qwen3Config(**_SIZES, head_dim=12),
    "gemma2": lambda: Gemma2Config(**_SIZES, head_dim=12),
    "mistral": lambda: MistralConfig(**_SIZES, head_dim=12),
    "gpt2": lambda: GPT2Config(vocab_size=96, n_embd=48, n_layer=2, n_head=4, n_positions=64),
    "phi": lambda: PhiConfig(**{**_SIZES, "num_key_value_heads": 4}),
}
ATTENTION = {"gpt2": ["c_attn"]}
ALL_LINEAR = {"gpt2": ["c_attn", "c_proj", "c_fc"]}


class Workshop:
    """Builds bases and adapters below a folder, and merges them both ways."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def base(self, family: str, dtype: torch.dtype, **edits: Any) -> Path:
        torch.manual_seed(7)
        config = CONFIGS[family]()
        for key, value in edits.items():
            setattr(config, key, value)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim == 1:
                    parameter.normal_(0.0 if name.endswith("bias") else 1.0, 0.1)
        path = self.folder / f"base-{family}-{str(dtype).removeprefix('torch.')}"
        model.save_pretrained(path, max_shard_size="60KB")
        return path

    def adapter(
        self,
        base: Path,
        name: str = "adapter",
        *,
        prepare: Callable[[Any], None] | None = None,
        save: dict[str, Any] | None = None,
        dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> Path:
        torch.manual_seed(sum(map(ord, name)))
        model = AutoModelForCausalLM.from_pretrained(base)
        if prepare is not None:
            prepare(model)
        is_conv1d = model.config.model_type == "gpt2"
        options = {"r": 4, "lora_alpha": 10, "fan_in_fan_out": is_conv1d, **options}
        peft_model = get_peft_model(model, LoraConfig(**options))
        with torch.no_grad():
            for key, parameter in peft_model.named_parameters():
                if "magnitude" in key:
                    parameter.mul_(1 + 0.2 * torch.randn_like(parameter))
                elif parameter.requires_grad:
                    parameter.add_(0.05 * torch.randn_like(parameter))
                if "lora_" in key and "magnitude" not in key:
                    parameter.data = parameter.data.to(dtype).to(parameter.dtype)
        path = self.folder / name
        peft_model.save_pretrained(path, **(save or {}))
        return path

    def export(self, base: Path, *adapters: Path, **options: Any) -> dict[str, torch.Tensor]:
        output = self.folder / options.pop("name", "merged")
        report = streammerge.export(
            {
                "model_name_or_path": str(base),
                "adapter_name_or_path": [str(path) for path in adapters],
                "export_dir": str(output),
                "overwrite": True,
                "threads": 1,
                **options,
            }
        )
        assert report.peak_rss_bytes > 0
        return load_tensors(output)

    def peft(
        self,
        base: Path,
        *adapters: Path,
        prepare: Callable[[Any], None] | None = None,
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Merge as LLaMA-Factory does: one adapter after the other; return tensors and logits."""
        model: Any = AutoModelForCausalLM.from_pretrained(base)
        if prepare is not None:
            prepare(model)
        for path in adapters:
            model = PeftModel.from_pretrained(model, path).merge_and_unload()
        folder = self.folder / "peft"
        model.save_pretrained(folder)
        return load_tensors(folder), logits(model)

    def merged_logits(self, name: str = "merged") -> torch.Tensor:
        return logits(AutoModelForCausalLM.from_pretrained(self.folder / name))


@pytest.fixture
def workshop(tmp_path: Path) -> Workshop:
    return Workshop(tmp_path)


def load_tensors(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(path))
    for path in sorted(folder.glob("*.bin")):
        tensors.update(torch.load(path, weights_only=True))
    return tensors


def logits(model: Any) -> torch.Tensor:
    model.eval()
    ids = torch.arange(3, 27).view(2, 12)
    with torch.no_grad():
        return model(input_ids=ids).logits.float()


def assert_same_bits(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        got = ours[name]
        assert got.dtype == expected.dtype, name
        assert got.shape == expected.shape, name
        assert torch.equal(got.view(torch.uint8), expected.view(torch.uint8)), name


@pytest.fixture
def same_bits() -> Callable[[dict[str, torch.Tensor], dict[str, torch.Tensor]], None]:
    return assert_same_bits


@pytest.fixture
def load_folder() -> Callable[[Path], dict[str, torch.Tensor]]:
    return load_tensors
