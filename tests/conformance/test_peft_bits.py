"""Every tensor of an export equals `PeftModel.from_pretrained(...).merge_and_unload()` bit for
bit.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from importlib import import_module
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from streammerge.config.tuning import ComputeTuning, DiskTuning
from streammerge.engine import machine
from streammerge.plan import memory

if TYPE_CHECKING:
    from collections.abc import Callable

    from streammerge.plan.memory import MemoryPlan

export_module: Any = import_module("streammerge.engine.export")
# PEFT warns of its own features (lora_bias, unmatched patterns); only our warnings are errors
pytestmark = pytest.mark.filterwarnings("ignore")

FAMILIES = ["llama", "llama-tied", "qwen2", "qwen3", "gemma2", "mistral", "gpt2", "phi"]
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TARGETS = {
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "phi": ["q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"],
}
FIRST = {"gpt2": "c_attn", "phi": "q_proj"}

OPTIONS: dict[str, Callable[[str], dict[str, Any]]] = {
    "plain": lambda family: {"target_modules": TARGETS.get(family, LINEAR)},
    "rslora": lambda family: {"target_modules": TARGETS.get(family, LINEAR), "use_rslora": True},
    "patterns": lambda family: {
        "target_modules": TARGETS.get(family, LINEAR),
        "rank_pattern": {FIRST.get(family, "q_proj"): 7, r"layers\.1\.mlp\.\w+": 2},
        "alpha_pattern": {r"^.*\.0\..*": 3, "v_proj": 17},
    },
    "one-rank": lambda family: {"target_modules": [FIRST.get(family, "q_proj")], "r": 1},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_linear_adapters(family: str, dtype: torch.dtype, workshop: Any, same_bits: Any) -> None:
    base = workshop.base(family, dtype)
    for name, options in OPTIONS.items():
        adapter = workshop.adapter(base, name, **options(family))
        expected, logits = workshop.peft(base, adapter)
        merged = workshop.export(base, adapter, export_size="50KB")
        same_bits(merged, expected)
        assert torch.equal(workshop.merged_logits(), logits), name


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "mistral", "phi"])
def test_dora(family: str, dtype: torch.dtype, workshop: Any, same_bits: Any) -> None:
    base = workshop.base(family, dtype)
    adapter = workshop.adapter(base, target_modules=TARGETS.get(family, LINEAR), use_dora=True)
    expected, logits = workshop.peft(base, adapter)
    same_bits(workshop.export(base, adapter), expected)
    assert torch.equal(workshop.merged_logits(), logits)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
@pytest.mark.parametrize("family", ["llama-bias", "qwen2", "gpt2", "phi"])
def test_trained_biases(family: str, bias: str, workshop: Any, same_bits: Any) -> None:
    base = workshop.base(family, torch.bfloat16)
    adapter = workshop.adapter(base, target_modules=TARGETS.get(family, ["q_proj"]), bias=bias)
    expected, _ = workshop.peft(base, adapter)
    same_bits(workshop.export(base, adapter), expected)


@pytest.mark.parametrize("family", ["llama-bias", "gpt2"])
def test_lora_bias(family: str, workshop: Any, same_bits: Any) -> None:
    base = workshop.base(family, torch.bfloat16)
    adapter = workshop.adapter(
        base, target_modules=TARGETS.get(family, ["q_proj", "down_proj"]), lora_bias=True
    )
    expected, _ = workshop.peft(base, adapter)
    same_bits(workshop.export(base, adapter), expected)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen2", "phi", "mistral"])
def test_embedding_and_head_adapters(
    family: str, dtype: torch.dtype, workshop: Any, same_bits: Any
) -> None:
    base = workshop.base(family, dtype, tie_word_embeddings=False)
    adapter = workshop.adapter(base, target_modules=["embed_tokens", "lm_head", "q_proj"])
    expected, logits = workshop.peft(base, adapter)
    same_bits(workshop.export(base, adapter), expected)
    assert torch.equal(workshop.merged_logits(), logits)


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
def test_modules_to_save(family: str, workshop: Any, same_bits: Any) -> None:
    base = workshop.base(family, torch.bfloat16, tie_word_embeddings=False)
    embedding = "wte" if family == "gpt2" else "embed_tokens"
    adapter = workshop.adapter(
        base, target_modules=TARGETS.get(family, LINEAR), modules_to_save=[embedding, "lm_head"]
    )
    expected, logits = workshop.peft(base, adapter)
    same_bits(workshop.export(base, adapter), expected)
    assert torch.equal(workshop.merged_logits(), logits)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_two_adapters_one_after_the_other(
    dtype: torch.dtype, workshop: Any, same_bits: Any
) -> None:
    base = workshop.base("llama", dtype)
    first = workshop.adapter(base, "first", target_modules=["q_proj", "down_proj", "embed_tokens"])
    second = workshop.adapter(base, "second", target_modules=LINEAR, use_rslora=True)
    third = workshop.adapter(base, "third", target_modules=["q_proj"], use_dora=True)
    expected, logits = workshop.peft(base, first, second, third)
    same_bits(workshop.export(base, first, second, third), expected)
    assert torch.equal(workshop.merged_logits(), logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_adapter_files(dtype: torch.dtype, workshop: Any, same_bits: Any) -> None:
    base = workshop.base("llama", torch.bfloat16)
    adapter = workshop.adapter(base, target_modules=LINEAR)
    path = adapter / "adapter_model.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in load_file(path).items()}, path)
    expected, _ = workshop.peft(base, adapter)
    same_bits(workshop.export(base, adapter), expected)


def test_resized_vocabulary(workshop: Any, same_bits: Any) -> None:
    def resize(model: Any) -> None:
        model.resize_token_embeddings(101, mean_resizing=False)

    for name, family, options in (
        (
            "saved",
            "llama",
            {"target_modules": LINEAR, "modules_to_save": ["embed_tokens", "lm_head"]},
        ),
        ("targets", "llama", {"target_modules": ["embed_tokens", "lm_head"]}),
        ("plain", "llama", {"target_modules": LINEAR}),
        ("tied", "llama-tied", {"target_modules": LINEAR}),
    ):
        base = workshop.base(family, torch.bfloat16)
        adapter = workshop.adapter(base, name, prepare=resize, **options)
        expected, logits = workshop.peft(base, adapter, prepare=resize)
        same_bits(workshop.export(base, adapter), expected)
        config = json.loads((workshop.folder / "merged" / "config.json").read_text())
        assert config["vocab_size"] == 101
        assert torch.equal(workshop.merged_logits(), logits)


@pytest.mark.parametrize("io", ["direct", "buffered", "mmap", "auto"])
def test_bits_do_not_depend_on_memory_or_reader(
    io: str, workshop: Any, same_bits: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # blocks of a few rows and products of four
    tiny = functools.partial(DiskTuning, block_bytes=4096)
    monkeypatch.setattr(machine, "DiskTuning", tiny)
    monkeypatch.setattr(
        machine, "BUFFERED", dataclasses.replace(machine.BUFFERED, block_bytes=4096)
    )
    monkeypatch.setattr(
        machine, "ComputeTuning", functools.partial(ComputeTuning, ((1 << 30, 1024),))
    )
    monkeypatch.setenv("STREAMMERGE_PROFILE", "")
    monkeypatch.setattr(memory, "MIN_SLAB_BYTES", 4096)
    monkeypatch.setattr(memory, "BASELINE_BYTES", 10**7)
    monkeypatch.setattr("streammerge.engine.export.rss_bytes", lambda: 10**7)
    # of the process that runs the tests, which may be above the ceiling already
    monkeypatch.setattr("streammerge.engine.export.peak_rss_bytes", lambda: 10**7)
    plans: list[MemoryPlan] = []
    real = export_module.plan_memory

    def plan_memory(*arguments: Any, **options: Any) -> MemoryPlan:
        plans.append(real(*arguments, **options))
        return plans[-1]

    monkeypatch.setattr(export_module, "plan_memory", plan_memory)
    base = workshop.base("llama", torch.bfloat16)
    adapter = workshop.adapter(base, target_modules=[*LINEAR, "embed_tokens"])
    expected, _ = workshop.peft(base, adapter)
    for threads in (1, 3):
        for max_memory in ("340MB", "4GB"):
            merged = workshop.export(base, adapter, max_memory=max_memory, io=io, threads=threads)
            same_bits(merged, expected)
    # whole runs of tiles, not one block: the largest tensor is 96 x 48
    assert {plan.slab_bytes for plan in plans} == {4096}
    assert {plan.workers for plan in plans} == {1, 3}


def test_legacy_format_in_and_out(workshop: Any, same_bits: Any) -> None:
    base = workshop.base("qwen2", torch.bfloat16)
    adapter = workshop.adapter(base, target_modules=LINEAR)
    expected, _ = workshop.peft(base, adapter)
    written = workshop.export(
        base, adapter, name="legacy", export_legacy_format=True, export_size="60KB"
    )
    same_bits(written, expected)
    assert (workshop.folder / "legacy" / "pytorch_model.bin.index.json").exists()
    again = workshop.export(workshop.folder / "legacy", name="again")
    same_bits(again, expected)


def test_weighted_sum_is_one_rounding_of_the_fp64_sum(workshop: Any) -> None:
    base = workshop.base("llama", torch.bfloat16)
    first = workshop.adapter(base, "first", target_modules=["q_proj"])
    second = workshop.adapter(base, "second", target_modules=["q_proj"], use_rslora=True)
    merged = workshop.export(base, first, second, adapter_weights=[0.7, 0.3])
    name = "model.layers.1.self_attn.q_proj"
    total = workshop.export(base, name="copy")[f"{name}.weight"].double()
    for path, factor in ((first, 0.7 * 10 / 4), (second, 0.3 * 10 / 2)):
        tensors = load_file(path / "adapter_model.safetensors")
        a, b = (tensors[f"base_model.model.{name}.lora_{end}.weight"].double() for end in "AB")
        total += factor * (b @ a)
    wrong = merged[f"{name}.weight"] != total.to(torch.bfloat16)
    # where the fp64 sum lies within fp32 noise of a tie, one rounding may go the other way
    assert wrong.float().mean() < 0.001
