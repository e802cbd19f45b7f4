"""Traces that trainers leave in an adapter's keys change nothing of what is merged."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from streammerge.errors import AdapterError, PlanError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings("ignore")

PREFIX = "base_model.model."
_FACTOR = re.compile(
    r"\.(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|trainable_tokens_delta)(?=\.|$)"
)


def named(adapter: str) -> Callable[[str], str]:
    """Leave the adapter's name in, as `get_peft_model_state_dict` takes it out."""
    return lambda key: _FACTOR.sub(rf".\1.{adapter}", key)


def inside(wrapper: str) -> Callable[[str], str]:
    """Wrap every layer, and the whole model."""
    return lambda key: key.replace("layers.", f"{wrapper}.layers.").replace(
        PREFIX, f"{PREFIX}{wrapper}."
    )


TRACES: dict[str, Callable[[str], str]] = {
    "name-default": named("default"),
    "name-of-its-own": named("my-adapter_v2"),
    "name-like-a-module": named("q_proj"),
    "compiled": lambda key: key.replace(PREFIX, f"{PREFIX}_orig_mod."),
    "compiled-outside": lambda key: f"_orig_mod.{key}",
    "compiled-layers": lambda key: re.sub(r"layers\.(\d+)", r"layers.\1._orig_mod", key),
    "fsdp": inside("_fsdp_wrapped_module"),
    "fsdp-outside": lambda key: f"_fsdp_wrapped_module.{key}",
    "checkpointed": inside("_checkpoint_wrapped_module"),
    "parallel": lambda key: f"module.{key}",
    "parallel-inside": lambda key: key.replace(PREFIX, f"{PREFIX}module."),
    "parallel-and-compiled": lambda key: f"module._orig_mod.{key}",
    "doubled": lambda key: PREFIX + key,
    "doubled-in-part": lambda key: f"base_model.{key}",
    "missing": lambda key: key.removeprefix(PREFIX),
    "missing-in-part": lambda key: key.removeprefix("base_model."),
    "everything": lambda key: f"module.{PREFIX}" + named("other")(inside("_orig_mod")(key)),
}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "dora": ("llama-bias", {"target_modules": ["q_proj", "down_proj"], "use_dora": True}),
    "biases": ("llama-bias", {"target_modules": ["v_proj"], "bias": "all", "lora_bias": True}),
    "vocabulary": ("qwen2", {
        "target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"],
    }),
    "tokens": ("qwen2", {
        "target_modules": ["o_proj"], "trainable_token_indices": {"embed_tokens": [3, 30]},
    }),
}  # fmt: skip


def rewrite(adapter: Path, change: Callable[[str], str]) -> None:
    path = adapter / "adapter_model.safetensors"
    before = load_file(path)
    after = {change(key): tensor for key, tensor in before.items()}
    assert len(after) == len(before)
    assert after.keys() != before.keys()
    save_file(after, path)


@pytest.mark.parametrize("kind", KINDS)
def test_traces_in_keys_change_no_bit(kind: str, workshop: Any, same_bits: Any) -> None:
    family, options = KINDS[kind]
    base = workshop.base(family, torch.bfloat16)
    adapter = workshop.adapter(base, **options)
    clean = (adapter / "adapter_model.safetensors").read_bytes()
    expected = workshop.export(base, adapter)
    same_bits(expected, workshop.peft(base, adapter)[0])
    for change in TRACES.values():
        (adapter / "adapter_model.safetensors").write_bytes(clean)
        rewrite(adapter, change)
        same_bits(workshop.export(base, adapter), expected)


@pytest.mark.parametrize("trace", ["name-default", "fsdp", "missing"])
def test_a_bare_model_takes_traces_too(trace: str, workshop: Any, same_bits: Any) -> None:
    base = workshop.base("gpt2", torch.float32)
    # as the hub has it
    for path in base.glob("*.safetensors"):
        tensors = {k.removeprefix("transformer."): v for k, v in load_file(path).items()}
        save_file(tensors, path, metadata={"format": "pt"})
    index = base / "model.safetensors.index.json"
    if index.exists():
        index.write_text(index.read_text().replace('"transformer.', '"'))
    adapter = workshop.adapter(base, target_modules=["c_attn", "c_fc"])
    expected = workshop.export(base, adapter)
    peft = workshop.peft(base, adapter)[0]
    same_bits(expected, {k.removeprefix("transformer."): v for k, v in peft.items()})
    rewrite(adapter, TRACES[trace])
    same_bits(workshop.export(base, adapter), expected)


def test_two_adapters_in_one_file_are_refused(workshop: Any) -> None:
    base = workshop.base("llama", torch.bfloat16)
    adapter = workshop.adapter(base, target_modules=["q_proj"])
    path = adapter / "adapter_model.safetensors"
    both = load_file(path)
    both |= {named("other")(key): tensor.clone() for key, tensor in both.items()}
    save_file(both, path)
    with pytest.raises(AdapterError, match="two keys of the adapter mean the same tensor"):
        workshop.export(base, adapter)


@pytest.mark.parametrize(
    "change",
    [
        lambda key: key.replace("layers.1.", "layers.2."),
        lambda key: key.replace("q_proj", "qproj"),
        lambda key: key.replace("self_attn", "cross_attn"),
        lambda key: key.replace("model.layers", "model.vision_tower.layers"),
        lambda key: key.replace("model.layers", "mtp.layers"),
    ],
)
def test_other_names_are_no_traces(change: Callable[[str], str], workshop: Any) -> None:
    base = workshop.base("llama", torch.bfloat16)
    adapter = workshop.adapter(base, target_modules=["q_proj"])
    rewrite(adapter, change)
    with pytest.raises(PlanError, match=r"no base tensor, the first is .*nearest"):
        workshop.export(base, adapter)
