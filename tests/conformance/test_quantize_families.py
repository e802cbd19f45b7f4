"""The layers that are quantized see what transformers' own model computes, family by family."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from streammerge.config import parse_config
from streammerge.engine.prepare import prepare
from streammerge.quantize import methods as methods_module
from streammerge.quantize.driver import Driver
from streammerge.quantize.hidden import HiddenStates
from streammerge.quantize.settings import QuantizeSettings
from streammerge.quantize.skeleton import build_skeleton
from streammerge.quantize.source import MergedSource

if TYPE_CHECKING:
    from pathlib import Path

    from streammerge.quantize.skeleton import Skeleton

pytestmark = pytest.mark.filterwarnings("ignore")

_SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_KINDS = ["sliding_attention", "full_attention", "sliding_attention"]
_MOE: dict[str, Any] = {"moe_intermediate_size": 24, "num_experts": 5, "num_experts_per_tok": 2}
_TEXT = {key: value for key, value in _SIZES.items() if key != "pad_token_id"}
_VISION: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2,
}  # fmt: skip
_MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama-tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "llama-bias": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "llama3-rope": (
        "LlamaConfig",
        {
            "rope_parameters": {
                "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
            }
        },
    ),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 8}),
    "mistral": ("MistralConfig", {"head_dim": 8, "sliding_window": 6}),
    "gemma": ("GemmaConfig", {"head_dim": 8}),
    "gemma2": ("Gemma2Config", {"head_dim": 8, "sliding_window": 6, "layer_types": _KINDS}),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 8, "sliding_window": 6, "layer_types": _KINDS}),
    "phi": ("PhiConfig", {"num_key_value_heads": 4}),
    "phi3": ("Phi3Config", {"sliding_window": 6}),
    "olmo2": ("Olmo2Config", {}),
    "gpt_neox": ("GPTNeoXConfig", {}),
    "granite": (
        "GraniteConfig",
        {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2},
    ),
    "cohere": ("CohereConfig", {}),
    "starcoder2": ("Starcoder2Config", {"sliding_window": 6}),
    "smollm3": ("SmolLM3Config", {"no_rope_layers": [1, 0, 1]}),
    "glm4": ("Glm4Config", {"head_dim": 8}),
    "opt": ("OPTConfig", {"ffn_dim": 64, "word_embed_proj_dim": 32}),
    "bloom": ("BloomConfig", {"n_layer": 3, "n_head": 4}),
    "falcon": ("FalconConfig", {}),
    "gpt2": ("GPT2Config", {"n_layer": 3, "n_head": 4, "n_positions": 64}),
    # one tensor per expert on disk
    "mixtral": ("MixtralConfig", {**_MOE, "num_local_experts": 5}),
    "qwen2_moe": ("Qwen2MoeConfig", {**_MOE, "shared_expert_intermediate_size": 24}),
    "qwen3_moe": ("Qwen3MoeConfig", {**_MOE, "head_dim": 8, "mlp_only_layers": [0]}),
    "olmoe": ("OlmoeConfig", _MOE),
    "phimoe": ("PhimoeConfig", {**_MOE, "num_local_experts": 5}),
    "deepseek_v3": (
        "DeepseekV3Config",
        {
            **_MOE, "n_routed_experts": 4, "n_group": 2, "topk_group": 1,
            "first_k_dense_replace": 1,
            "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8,
            "v_head_dim": 8, "num_key_value_heads": 4,
        },
    ),
    "glm4_moe": ("Glm4MoeConfig", {**_MOE, "n_routed_experts": 4, "head_dim": 8, "n_group": 1,
                                   "topk_group": 1, "first_k_dense_replace": 1}),
    # fused on disk as in memory
    "qwen3_5_moe": (
        "Qwen3_5MoeTextConfig",
        {**_MOE, "head_dim": 8, "shared_expert_intermediate_size": 24,
         "layer_types": ["full_attention"] * 3},
    ),
    # the text towers of models that see
    "gemma3-vision": (
        "Gemma3Config",
        {
            "text_config": {**_TEXT, "head_dim": 8, "sliding_window": 6, "layer_types": _KINDS},
            "vision_config": {**_VISION, "image_size": 16, "patch_size": 4},
            "mm_tokens_per_image": 4,
        },
    ),
    "llava": (
        "LlavaConfig",
        {
            "text_config": {**_TEXT, "model_type": "llama"},
            "vision_config": {**_VISION, "model_type": "clip_vision_model", "image_size": 16,
                              "patch_size": 4},
        },
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VLConfig",
        {
            "text_config": {**_TEXT, "rope_parameters": _MROPE},
            "vision_config": {"hidden_size": 16, "depth": 3, "num_heads": 2, "out_hidden_size": 32,
                              "intermediate_size": 24},
        },
    ),
    "qwen3_vl_moe": (
        "Qwen3VLMoeConfig",
        {
            "text_config": {**_TEXT, **_MOE, "head_dim": 8, "rope_parameters": _MROPE},
            "vision_config": {"hidden_size": 16, "depth": 3, "num_heads": 2, "out_hidden_size": 32,
                              "intermediate_size": 24, "deepstack_visual_indexes": [0, 1, 2]},
        },
    ),
    # the same as it was first published: experts the other way round
    "qwen3_vl_moe-turned": (
        "Qwen3VLMoeConfig",
        {
            "text_config": {**_TEXT, **_MOE, "head_dim": 8, "rope_parameters": _MROPE},
            "vision_config": {"hidden_size": 16, "depth": 3, "num_heads": 2, "out_hidden_size": 32,
                              "intermediate_size": 24, "deepstack_visual_indexes": [0, 1, 2]},
        },
    ),
    "mistral3": (
        "Mistral3Config",
        {
            "text_config": {**_TEXT, "model_type": "mistral", "head_dim": 8},
            "vision_config": {**_VISION, "model_type": "pixtral", "image_size": 16,
                              "patch_size": 4, "head_dim": 8},
        },
    ),
    # scales what it looks up by a plain number
    "biogpt": ("BioGptConfig", {"scale_embedding": True}),
}  # fmt: skip


def save_model(folder: Path, name: str, options: dict[str, Any]) -> Any:
    torch.manual_seed(7)
    sizes = _SIZES if not name.startswith("GPT2") else {"vocab_size": 96, "n_embd": 32}
    config = getattr(transformers, name)(**{**sizes, **options})
    sees = "vision_config" in options
    auto = AutoModelForImageTextToText if sees else AutoModelForCausalLM
    if sees:
        config = getattr(transformers, name)(**options)
    model = auto.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.normal_(0.0 if key.endswith("bias") else 1.0, 0.1)
    model.save_pretrained(folder)
    return model.eval()


def open_skeleton(base: Path, output: Path) -> tuple[Skeleton, MergedSource]:
    config = parse_config({"model_name_or_path": str(base), "export_dir": str(output)})
    plan = prepare(config)
    skeleton = build_skeleton(
        plan.base,
        config_edits=plan.contents.config_edits,
        tensors={tensor.name: tensor for tensor in plan.tensors},
    )
    return skeleton, MergedSource(plan)


def run(
    base: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, ids: torch.Tensor
) -> tuple[list[torch.Tensor], list[str]]:
    """Drive the layers with codes that lose nothing; return the states before each and after all.

    Returns:
        The states, and the names of what was quantized.
    """
    seen: list[torch.Tensor] = []
    write = HiddenStates.write

    def note(self: HiddenStates, layer: int, sample: int, states: torch.Tensor) -> None:
        if sample == 0:
            seen.append(states.clone())
        write(self, layer, sample, states)

    class Exact:
        relative_error = 0.0

        def __init__(self, weight: torch.Tensor) -> None:
            self.weight = weight.clone()

        def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
            return self.weight.to(dtype)

    monkeypatch.setattr(HiddenStates, "write", note)
    monkeypatch.setattr(methods_module, "quantize_rtn", lambda weight, *_, **__: Exact(weight))
    monkeypatch.setattr(methods_module, "relative_error", lambda *_: 0.0)
    monkeypatch.setattr(
        methods_module, "pack_gptq", lambda exact, *_: {"qweight": exact.weight.contiguous()}
    )
    skeleton, source = open_skeleton(base, folder / "out")
    folder.mkdir(exist_ok=True)
    with source:
        reports = Driver(skeleton, source, QuantizeSettings("rtn"), ids, folder).run()
    assert len(reports) == 3
    return seen, [name for report in reports for name in report.errors]


@pytest.mark.parametrize("family", FAMILIES)
def test_states_before_each_layer_are_those_of_the_model(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_model(tmp_path / "base", *FAMILIES[family])
    if family.endswith("-turned"):
        turn_experts(tmp_path / "base" / "model.safetensors")
    ids = torch.randint(3, 96, (2, 20), generator=torch.Generator().manual_seed(1))
    states, quantized = run(tmp_path / "base", tmp_path / "work", monkeypatch, ids)
    with torch.no_grad():
        skeleton, _ = open_skeleton(tmp_path / "base", tmp_path / "out")
        inputs, outputs = [], []
        for layer in model.get_submodule(skeleton.layers_name):
            layer.register_forward_pre_hook(
                lambda _, args, kwargs: inputs.append(args[0]), with_kwargs=True
            )
            layer.register_forward_hook(
                lambda _, args, out: outputs.append(out[0] if isinstance(out, tuple) else out)
            )
        model(input_ids=ids[:1], use_cache=False)
        layers = [*inputs, outputs[-1]]
    assert len(states) == len(layers) == 4
    for number, (got, expected) in enumerate(zip(states, layers, strict=True)):
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4, msg=f"layer {number}")
    # every linear of every layer has its codes
    assert sorted(quantized) == sorted(linears_of(tmp_path / "base"))


def turn_experts(path: Path) -> None:
    tensors = load_file(path)
    for name, values in tensors.items():
        if values.ndim == 3 and ".experts." in name:
            tensors[name] = values.transpose(1, 2).contiguous()
    save_file(tensors, path, metadata={"format": "pt"})


def linears_of(base: Path) -> list[str]:
    """Return the linears of the layers as the checkpoint's own headers have them."""
    found = []
    for file in base.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (no mapping)
                shape = opened.get_slice(name).get_shape()
                module = name.removesuffix(".weight")
                is_inside = re.search(r"\b(layers|h)\.\d+\.", name) and "visi" not in name
                if not is_inside or module.rpartition(".")[2] in {"gate", "shared_expert_gate"}:
                    continue
                if len(shape) == 2:
                    found.append(module)
                elif name.endswith("gate_up_proj"):
                    found += _names_of_experts(module, shape[0], ["gate_proj", "up_proj"])
                elif name.endswith("down_proj"):
                    found += _names_of_experts(module, shape[0], ["down_proj"])
    return found


def _names_of_experts(module: str, count: int, names: list[str]) -> list[str]:
    experts = module.rpartition(".")[0]
    return [f"{experts}.{number}.{name}" for number in range(count) for name in names]
