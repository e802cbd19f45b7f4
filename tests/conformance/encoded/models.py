"""Tiny models, adapters for them, and what PEFT makes of both."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3MoeConfig

import streammerge

if TYPE_CHECKING:
    from pathlib import Path

_SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}  # fmt: skip
# every size is odd, or a multiple of nothing that shares a scale
_ODD = {"vocab_size": 97, "hidden_size": 100, "intermediate_size": 77, "head_dim": 26}
MODELS: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**_SIZES),
    "tied": lambda: LlamaConfig(**{**_SIZES, "tie_word_embeddings": True}),
    "bias": lambda: LlamaConfig(**_SIZES, attention_bias=True, mlp_bias=True),
    "odd": lambda: LlamaConfig(**{**_SIZES, **_ODD}, mlp_bias=True),
    "moe": lambda: Qwen3MoeConfig(**_SIZES, head_dim=32, num_experts=3, num_experts_per_tok=2,
                                  moe_intermediate_size=128),
}  # fmt: skip
ADAPTERS: dict[str, list[dict[str, Any]]] = {
    "lora": [{"target_modules": "all-linear"}],
    # on few modules, and none of the embeddings
    "few": [{"target_modules": ["q_proj", "down_proj"]}],
    "dora": [{"target_modules": "all-linear", "use_dora": True}],
    "two": [{"target_modules": "all-linear"}, {"target_modules": ["q_proj", "up_proj"], "r": 8}],
}


class Merge:
    """A base, its adapters, and the model that PEFT makes of them."""

    def __init__(self, folder: Path, model: str, dtype: str, adapters: str) -> None:
        self.folder, self.base, self.merged = folder, folder / "base", folder / "peft"
        torch.manual_seed(11)
        kind = getattr(torch, dtype)
        original: Any = AutoModelForCausalLM.from_config(MODELS[model](), dtype=kind)
        with torch.no_grad():
            for name, parameter in original.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_(0, 0.1)
        original.save_pretrained(self.base)
        self.adapters = []
        for number, options in enumerate(ADAPTERS[adapters]):
            self.adapters.append(folder / f"adapter{number}")
            save_adapter(self.base, self.adapters[-1], **options)
        merged = merge_by_peft(AutoModelForCausalLM.from_pretrained(self.base), self.adapters)
        merged.save_pretrained(self.merged)
        self.linears = [
            f"{name}.weight"
            for name, module in merged.named_modules()
            if type(module) is nn.Linear and name != "lm_head"
        ]
        self.tensors = load_folder(self.merged)

    def export(self, output: Path, **settings: Any) -> Any:
        return streammerge.export(
            {
                "model_name_or_path": str(self.base),
                "adapter_name_or_path": [str(path) for path in self.adapters],
                "export_dir": str(output),
                "max_memory": "4GB",
                "threads": 1,
                **settings,
            }
        )


def save_adapter(base: Path, path: Path, **options: Any) -> None:
    """Save an adapter with random factors, and away from where DoRA starts."""
    torch.manual_seed(sum(map(ord, path.name)))
    model = AutoModelForCausalLM.from_pretrained(base)
    settings = {"r": 4, "lora_alpha": 8, "init_lora_weights": False, **options}
    tuned: Any = get_peft_model(model, LoraConfig(**settings))
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1 + 0.2 * torch.randn_like(parameter))
            elif parameter.requires_grad:
                # small against the weights, as deltas are
                parameter.mul_(0.2)
    tuned.save_pretrained(path)


def merge_by_peft(model: Any, adapters: list[Path]) -> Any:
    for path in adapters:
        model = PeftModel.from_pretrained(model, path).merge_and_unload()
    return model.eval()


def load_folder(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found.update(load_file(path))
    return found


def section_in(folder: Path) -> dict[str, Any]:
    section: dict[str, Any] = json.loads((folder / "config.json").read_text())[
        "quantization_config"
    ]
    return section


def raw(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().flatten().clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8).numpy().tobytes()


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Demand the same names, dtypes, shapes and bytes; of JSON, the same values."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        got = found[name]
        assert got.dtype == tensor.dtype, name
        if ".quant_state." in name:
            # its length is planned before the numbers in it are known
            assert json.loads(raw(got)) == json.loads(raw(tensor)), name
            continue
        assert got.shape == tensor.shape, name
        assert raw(got) == raw(tensor), name


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(3, 27).view(2, 12)
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=ids).logits.float()
    return found
