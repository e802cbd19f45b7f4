"""Models whose layers transformers renames between checkpoint and memory.

Bases have the names of the hub. Adapters have the names that layers had in memory when they were
trained: PEFT writes those of transformers 5, which are then rewritten to those of older versions
(read off transformers 4.51 and 4.57).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import streammerge
from streammerge.engine import inmemory_names, renames
from streammerge.errors import PlanError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings("ignore")

Rules = tuple[tuple[str, str], ...]
TEXT: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
ROPE = {"rope_type": "default", "mrope_section": [2, 2, 2]}
ENCODER = {**TEXT, "num_key_value_heads": 4}


def gemma3() -> Any:
    config = transformers.Gemma3Config(
        text_config=transformers.Gemma3TextConfig(**TEXT, head_dim=12),
        vision_config=transformers.SiglipVisionConfig(**VISION),
        mm_tokens_per_image=4,
    )
    return transformers.Gemma3ForConditionalGeneration(config)


def llava() -> Any:
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**TEXT),
        vision_config=transformers.CLIPVisionConfig(**VISION),
    )
    return transformers.LlavaForConditionalGeneration(config)


def mistral3() -> Any:
    config = transformers.Mistral3Config(
        text_config=transformers.MistralConfig(**TEXT, head_dim=12),
        vision_config=transformers.PixtralVisionConfig(**VISION),
        tie_word_embeddings=False,
    )
    return transformers.Mistral3ForConditionalGeneration(config)


def paligemma() -> Any:
    config = transformers.PaliGemmaConfig(
        text_config=transformers.GemmaConfig(**TEXT, head_dim=12),
        vision_config=transformers.SiglipVisionConfig(**VISION, projection_dim=48),
    )
    return transformers.PaliGemmaForConditionalGeneration(config)


def internvl() -> Any:
    config = transformers.InternVLConfig(
        text_config=transformers.Qwen2Config(**TEXT),
        vision_config=transformers.InternVLVisionConfig(**VISION),
        tie_word_embeddings=False,
    )
    return transformers.InternVLForConditionalGeneration(config)


def mllama() -> Any:
    config = transformers.MllamaConfig(
        text_config={**TEXT, "cross_attention_layers": [1], "pad_token_id": 0,
                     "rope_parameters": {"rope_type": "default"}},
        vision_config={"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
                       "num_global_layers": 1, "attention_heads": 2, "image_size": 28,
                       "patch_size": 14, "vision_output_dim": 64,
                       "intermediate_layers_indices": [1], "max_num_tiles": 2,
                       "supported_aspect_ratios": [[1, 1], [1, 2]]},
    )  # fmt: skip
    return transformers.MllamaForConditionalGeneration(config)


def qwen2_vl() -> Any:
    config = transformers.Qwen2VLConfig(
        text_config={**TEXT, "rope_parameters": ROPE},
        vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 48, "num_heads": 2},
    )
    return transformers.Qwen2VLForConditionalGeneration(config)


def qwen25_vl() -> Any:
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2}
    config = transformers.Qwen2_5_VLConfig(
        text_config={**TEXT, "rope_parameters": ROPE},
        vision_config={**vision, "out_hidden_size": 48, "fullatt_block_indexes": [1]},
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def qwen3_vl() -> Any:
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2}
    config = transformers.Qwen3VLConfig(
        text_config={**TEXT, "head_dim": 12, "rope_parameters": ROPE},
        vision_config={**vision, "out_hidden_size": 48, "deepstack_visual_indexes": [0]},
    )
    return transformers.Qwen3VLForConditionalGeneration(config)


def idefics3() -> Any:
    config = transformers.Idefics3Config(
        text_config=transformers.LlamaConfig(**TEXT), vision_config=VISION
    )
    return transformers.Idefics3ForConditionalGeneration(config)


def smolvlm() -> Any:
    config = transformers.SmolVLMConfig(
        text_config=transformers.LlamaConfig(**TEXT), vision_config=VISION
    )
    return transformers.SmolVLMForConditionalGeneration(config)


def gpt2() -> Any:
    config = transformers.GPT2Config(vocab_size=96, n_embd=48, n_layer=2, n_head=4, n_positions=64)
    return transformers.GPT2LMHeadModel(config)


def gpt_neox() -> Any:
    return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**TEXT))


def mixtral() -> Any:
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**TEXT, num_local_experts=3))


def granitemoe() -> Any:
    config = transformers.GraniteMoeConfig(**TEXT, num_local_experts=3)
    return transformers.GraniteMoeForCausalLM(config)


def vit() -> Any:
    return transformers.ViTForImageClassification(transformers.ViTConfig(**VISION))


def dinov2() -> Any:
    config = transformers.Dinov2Config(**VISION, use_swiglu_ffn=True)
    return transformers.Dinov2ForImageClassification(config)


def bert() -> Any:
    sizes = {key: value for key, value in TEXT.items() if key != "num_key_value_heads"}
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(**sizes, num_labels=3)
    )


# checkpoints of the hub have a level that transformers 5 does not write any more
WITH_LEVEL: Rules = ((r"^vision_tower\.", "vision_tower.vision_model."),)
# names in memory of transformers 4.52 to 4.57, and of those before
LEVEL_457: Rules = ((r"^model\.vision_tower\.", "model.vision_tower.vision_model."),)
NESTED_451: Rules = (
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^model\.language_model\.", "language_model.model."),
    (r"^model\.(vision_tower|vision_model|multi_modal_projector)\.", r"\1."),
)
LEVEL_451: Rules = (*LEVEL_457, *NESTED_451)
BESIDE_451: Rules = (
    (r"^model\.visual\.", "visual."),
    (r"^model\.language_model\.", "model."),
)
ATTENTION = ["q_proj", "v_proj"]
LANGUAGE = [*ATTENTION, "down_proj"]
HEADS = ["embed_tokens", "lm_head"]
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
# builder, targets, from names that PEFT writes to those of the hub, to names of older versions
FAMILIES: dict[str, tuple[Callable[[], Any], list[str], Rules, tuple[Rules, ...]]] = {
    "llava": (llava, [*LANGUAGE, *HEADS, "fc1", "linear_1"], WITH_LEVEL, (LEVEL_457, LEVEL_451)),
    "gemma3": (gemma3, [*LANGUAGE, "fc1"], WITH_LEVEL, (LEVEL_457, LEVEL_451)),
    "paligemma": (
        paligemma, [*LANGUAGE, "multi_modal_projector.linear"], WITH_LEVEL, (LEVEL_457, LEVEL_451),
    ),
    "mistral3": (mistral3, [*LANGUAGE, *HEADS, "linear_1", "merging_layer"], (), (NESTED_451,)),
    "internvl": (internvl, [*LANGUAGE, *HEADS, "linear_1", "projection_layer"], (), (NESTED_451,)),
    "mllama": (mllama, [*LANGUAGE, *HEADS, "multi_modal_projector", "fc2"], (), (NESTED_451,)),
    "qwen2_vl": (qwen2_vl, [*LANGUAGE, *HEADS, "qkv", "mlp.0", "fc1"], (), (BESIDE_451,)),
    "qwen2_5_vl": (qwen25_vl, [*LANGUAGE, *HEADS, "qkv", "mlp.2"], (), (BESIDE_451,)),
    "qwen3_vl": (qwen3_vl, [*LANGUAGE, *HEADS, "qkv", "linear_fc1"], (), ()),
    "idefics3": (idefics3, [*LANGUAGE, *HEADS, "fc1", "modality_projection.proj"], (), ()),
    "smolvlm": (smolvlm, [*LANGUAGE, "lm_head", "modality_projection.proj"], (), ()),
    "gpt2": (gpt2, ["c_attn", "c_fc"], ((r"^transformer\.", ""),), (((r"^transformer\.", ""),),)),
    "gpt_neox": (
        gpt_neox, ["query_key_value", "lm_head", "embed_in"], (), (((r"^lm_head", "embed_out"),),),
    ),
    "mixtral": (mixtral, ["gate.weight", *EXPERTS], (), ()),
    "granitemoe": (granitemoe, ["router.weight", *EXPERTS], (), ()),
    "vit": (vit, ["q_proj", "o_proj", "fc2"], (), (
        ((r"\.layers\.", ".encoder.layer."), (r"\.o_proj", ".output.dense"),
         (r"\.q_proj", ".attention.query"), (r"\.mlp\.fc2", ".output.dense")),
    )),
    "bert": (bert, ["query", "value", "pooler.dense"], (), ()),
}  # fmt: skip


def rewrite(names: Rules, folder: Path, *, name: str, begin: str = "") -> None:
    """Rename the tensors of a file."""
    path = folder / name

    def renamed(key: str) -> str:
        key = key.removeprefix(begin)
        for pattern, replacement in names:
            key = re.sub(pattern, replacement, key)
        return begin + key

    save_file(
        {renamed(key): value for key, value in load_file(path).items()},
        path,
        metadata={"format": "pt"},
    )


def save_base(
    build: Callable[[], Any], names: Rules, folder: Path, *, dtype: torch.dtype = torch.bfloat16
) -> type[Any]:
    torch.manual_seed(0)
    model = build().to(dtype)
    model.save_pretrained(folder)
    rewrite(names, folder, name="model.safetensors")
    return type(model)


def store_as_in_memory(kind: type[Any], base: Path) -> None:
    """Store the tensors under their names in memory, as some tools do."""
    model = kind.from_pretrained(base)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    if getattr(model.config, "tie_word_embeddings", False):
        del state["lm_head.weight"]
    save_file(state, base / "model.safetensors", metadata={"format": "pt"})


def train(kind: type[Any], base: Path, adapter: Path, targets: list[str], **options: Any) -> None:
    parameters = [t for t in targets if t.startswith("experts.") or t.endswith(".weight")]
    modules = [target for target in targets if target not in parameters]
    options = {"target_modules": modules or ["q_proj"], "target_parameters": parameters, **options}
    options = {"r": 4, "lora_alpha": 8, "init_lora_weights": False, **options}
    torch.manual_seed(1)
    model = get_peft_model(kind.from_pretrained(base), LoraConfig(**options))
    model.save_pretrained(adapter, save_embedding_layers=False)


def merge(base: Path, adapter: Path, output: Path) -> dict[str, torch.Tensor]:
    streammerge.export(
        {
            "model_name_or_path": str(base),
            "adapter_name_or_path": str(adapter),
            "export_dir": str(output),
            "threads": 1,
        }
    )
    return load_file(output / "model.safetensors")


def peft_state(kind: type[Any], base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    merged: Any = PeftModel.from_pretrained(kind.from_pretrained(base), adapter)
    return merged.merge_and_unload().state_dict()


@pytest.fixture
def no_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave only what is known without transformers."""

    def ask(*_: Any) -> None:
        pytest.fail("transformers was asked")

    monkeypatch.setattr(renames, "transformers_names", ask)


@pytest.mark.usefixtures("no_transformers")
@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_of_any_version_merge_alike(family: str, tmp_path: Path, same_bits: Any) -> None:
    build, targets, hub_names, older = FAMILIES[family]
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    kind = save_base(build, hub_names, base)
    train(kind, base, adapter, targets)
    merged = merge(base, adapter, tmp_path / "merged")
    assert merged.keys() == load_file(base / "model.safetensors").keys()
    # what transformers makes of the output is what PEFT has in memory
    ours = kind.from_pretrained(tmp_path / "merged").state_dict()
    same_bits(ours, peft_state(kind, base, adapter))
    newest = (adapter / "adapter_model.safetensors").read_bytes()
    for number, names in enumerate(older):
        (adapter / "adapter_model.safetensors").write_bytes(newest)
        rewrite(names, adapter, name="adapter_model.safetensors", begin="base_model.model.")
        assert (adapter / "adapter_model.safetensors").read_bytes() != newest
        same_bits(merge(base, adapter, tmp_path / f"older{number}"), merged)


@pytest.mark.usefixtures("no_transformers")
@pytest.mark.parametrize("family", ["llava", "gemma3", "qwen2_vl"])
@pytest.mark.parametrize("style", ["as saved by transformers 5", "as in memory"])
def test_checkpoints_of_any_naming_merge_alike(
    family: str, style: str, tmp_path: Path, same_bits: Any
) -> None:
    build, targets, hub_names, older = FAMILIES[family]
    hub, base, adapter = tmp_path / "hub", tmp_path / "base", tmp_path / "adapter"
    kind = save_base(build, hub_names, hub)
    train(kind, hub, adapter, targets)
    merge(hub, adapter, tmp_path / "expected")
    expected = kind.from_pretrained(tmp_path / "expected").state_dict()
    save_base(build, (), base)
    if style == "as in memory":
        store_as_in_memory(kind, base)
    for names in ((), *older):
        rewrite(names, adapter, name="adapter_model.safetensors", begin="base_model.model.")
        merged = merge(base, adapter, tmp_path / f"merged{len(names)}")
        assert merged.keys() == load_file(base / "model.safetensors").keys()
        same_bits(kind.from_pretrained(tmp_path / f"merged{len(names)}").state_dict(), expected)
        train(kind, hub, adapter, targets)


@pytest.mark.usefixtures("no_transformers")
@pytest.mark.parametrize("style", ["hub", "as in memory"])
@pytest.mark.parametrize("family", ["gemma3", "qwen2_vl", "qwen3_vl"])
def test_an_adapter_of_the_language_model_alone(
    family: str, style: str, tmp_path: Path, same_bits: Any
) -> None:
    build, _, hub_names, _ = FAMILIES[family]
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    kind = save_base(build, hub_names, base)
    if style == "as in memory":
        store_as_in_memory(kind, base)
    train(kind, base, adapter, [], target_modules=r".*language_model.*\.(q_proj|down_proj)")
    expected = merge(base, adapter, tmp_path / "expected")
    same_bits(kind.from_pretrained(tmp_path / "expected").state_dict(),
              peft_state(kind, base, adapter))  # fmt: skip
    alone: Rules = ((r"^model\.language_model\.", "model."),)
    rewrite(alone, adapter, name="adapter_model.safetensors", begin="base_model.model.")
    same_bits(merge(base, adapter, tmp_path / "merged"), expected)


@pytest.mark.usefixtures("no_transformers")
def test_norms_of_old_checkpoints(tmp_path: Path, same_bits: Any) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    old: Rules = ((r"LayerNorm\.weight", "LayerNorm.gamma"), (r"LayerNorm\.bias", "LayerNorm.beta"))
    kind = save_base(bert, old, base)
    train(kind, base, adapter, ["query"], bias="all")
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    norms = [key for key in tensors if key.endswith("LayerNorm.bias")]
    assert norms
    save_file(tensors | {key: torch.randn(48) for key in norms}, path)
    merged = merge(base, adapter, tmp_path / "merged")
    assert "bert.embeddings.LayerNorm.beta" in merged
    assert merged.keys() == load_file(base / "model.safetensors").keys()
    ours = kind.from_pretrained(tmp_path / "merged").state_dict()
    same_bits(ours, peft_state(kind, base, adapter))


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model."])
def test_an_adapter_of_a_larger_model(prefix: str, workshop: Any, same_bits: Any) -> None:
    base = workshop.base("qwen3", torch.bfloat16)
    adapter = workshop.adapter(base, target_modules=["q_proj", "down_proj"])
    expected = workshop.export(base, adapter)
    inside: Rules = ((r"^model\.", prefix),)
    rewrite(inside, adapter, name="adapter_model.safetensors", begin="base_model.model.")
    same_bits(workshop.export(base, adapter), expected)
    tower: Rules = ((rf"^{re.escape(prefix)}", "model.vision_tower."),)
    rewrite(tower, adapter, name="adapter_model.safetensors", begin="base_model.model.")
    with pytest.raises(PlanError, match="no base tensor"):
        workshop.export(base, adapter)


@pytest.fixture
def transformers_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave only what transformers says, without a process of its own."""

    def ask(folder: Path, names: Any, modules: Any) -> renames.MemoryNames:
        model = inmemory_names._build_skeleton(str(folder))
        return renames.MemoryNames(**inmemory_names.name_tensors(model, names, modules))

    monkeypatch.setattr(renames, "known_renames", lambda *_: {})
    monkeypatch.setattr(renames, "transformers_names", ask)


@pytest.mark.usefixtures("transformers_alone")
@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "mllama", "mixtral", "granitemoe", "vit"])
def test_transformers_finds_what_is_not_known(family: str, tmp_path: Path, same_bits: Any) -> None:
    build, targets, hub_names, older = FAMILIES[family]
    hub, base, adapter = tmp_path / "hub", tmp_path / "base", tmp_path / "adapter"
    kind = save_base(build, hub_names, hub)
    train(kind, hub, adapter, targets)
    merge(hub, adapter, tmp_path / "merged")
    expected = peft_state(kind, hub, adapter)
    same_bits(kind.from_pretrained(tmp_path / "merged").state_dict(), expected)
    # old adapters on a checkpoint that has the names in memory
    save_base(build, (), base)
    store_as_in_memory(kind, base)
    for names in older[-1:]:
        rewrite(names, adapter, name="adapter_model.safetensors", begin="base_model.model.")
        same_bits(merge(base, adapter, tmp_path / "older"), expected)


def test_a_family_that_only_transformers_knows(tmp_path: Path, same_bits: Any) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    kind = save_base(dinov2, (), base)
    assert any(
        "attention.attention.query" in name for name in load_file(base / "model.safetensors")
    )
    train(kind, base, adapter, ["q_proj", "down_proj"])
    merge(base, adapter, tmp_path / "merged")
    ours = kind.from_pretrained(tmp_path / "merged").state_dict()
    same_bits(ours, peft_state(kind, base, adapter))


@pytest.mark.usefixtures("transformers_alone")
@pytest.mark.parametrize("target", ["gate_proj", "up_proj"])
def test_a_layer_cut_out_of_a_tensor_is_refused(target: str, tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    kind = save_base(dinov2, (), base)
    train(kind, base, adapter, ["q_proj", target])
    with pytest.raises(PlanError, match=r"mlp.weights_in.weight' by Chunk") as error:
        merge(base, adapter, tmp_path / "merged")
    assert f"mlp.{target}'" in str(error.value)
    assert not (tmp_path / "merged").exists()


@pytest.mark.usefixtures("no_transformers")
@pytest.mark.parametrize("family", ["gemma3", "qwen2_5_vl"])
@pytest.mark.parametrize(
    ("targets", "options"),
    [
        (["embed_tokens"], {}),
        (["lm_head"], {}),
        (["q_proj"], {"modules_to_save": ["lm_head"]}),
        (["q_proj"], {"trainable_token_indices": {"embed_tokens": [3, 7]}}),
    ],
    ids=["target-embedding", "target-head", "save-head", "tokens"],
)
def test_tied_ends_compute_what_was_trained(
    family: str, targets: list[str], options: dict[str, Any], tmp_path: Path
) -> None:
    build, _, hub_names, older = FAMILIES[family]
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    kind = save_base(lambda: tied(build), hub_names, base, dtype=torch.float32)
    assert not [name for name in load_file(base / "model.safetensors") if "lm_head" in name]
    train(kind, base, adapter, targets, **options)
    expected = logits(PeftModel.from_pretrained(kind.from_pretrained(base), adapter))
    assert not torch.allclose(logits(kind.from_pretrained(base)), expected, rtol=1e-3, atol=1e-3)
    for names in ((), older[-1]):
        rewrite(names, adapter, name="adapter_model.safetensors", begin="base_model.model.")
        merge(base, adapter, tmp_path / f"merged{len(names)}")
        merged = kind.from_pretrained(tmp_path / f"merged{len(names)}")
        torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)


def tied(build: Callable[[], Any]) -> Any:
    model = build()
    for config in (model.config, model.config.text_config):
        config.tie_word_embeddings = True
    return type(model)(model.config)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(3, 27).view(2, 12)).logits
