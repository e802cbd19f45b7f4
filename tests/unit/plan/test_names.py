"""Names in memory of a checkpoint's tensors, without transformers and against it."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import pytest

from streammerge.engine.inmemory_names import name_tensors
from streammerge.plan.names import (
    _FAMILIES,
    _UNCHANGED,
    are_names_known,
    canonical_name,
    known_renames,
    spell_alike,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

Q = "self_attn.q_proj.weight"
LLAVA = {"model_type": "llava", "text_config": {"model_type": "llama"}}
QWEN = {"model_type": "qwen2_5_vl"}
MIXTRAL = {"model_type": "mixtral"}


@pytest.mark.parametrize(
    ("config", "form", "spellings"),
    [
        (LLAVA, f"model.language_model.layers.0.{Q}", [
            f"language_model.model.layers.0.{Q}", f"model.language_model.model.layers.0.{Q}",
            f"language_model.model.model.layers.0.{Q}", f"model.layers.0.{Q}",
            f"language_model.layers.0.{Q}",
        ]),
        (LLAVA, "model.language_model.norm.weight", ["language_model.model.norm.weight"]),
        (LLAVA, "lm_head.weight", ["language_model.lm_head.weight"]),
        (LLAVA, f"model.vision_tower.encoder.layers.0.{Q}", [
            f"vision_tower.vision_model.encoder.layers.0.{Q}",
            f"model.vision_tower.vision_model.encoder.layers.0.{Q}",
            f"vision_tower.encoder.layers.0.{Q}",
        ]),
        (LLAVA, "model.multi_modal_projector.linear_1.bias",
         ["multi_modal_projector.linear_1.bias"]),
        (LLAVA, "model.image_newline", ["image_newline"]),
        ({"model_type": "mllama"}, f"model.vision_model.transformer.layers.0.{Q}",
         [f"vision_model.transformer.layers.0.{Q}"]),
        (QWEN, f"model.language_model.layers.0.{Q}", [
            f"model.layers.0.{Q}", f"language_model.layers.0.{Q}",
            f"model.language_model.model.layers.0.{Q}",
        ]),
        (QWEN, "model.language_model.embed_tokens.weight", ["model.embed_tokens.weight"]),
        (QWEN, "model.visual.blocks.0.attn.qkv.weight", ["visual.blocks.0.attn.qkv.weight"]),
        (QWEN, "lm_head.weight", []),
        ({"model_type": "qwen2_5_omni"}, f"thinker.model.language_model.layers.0.{Q}", [
            f"thinker.model.layers.0.{Q}", f"model.layers.0.{Q}",
            f"model.language_model.layers.0.{Q}",
        ]),
        ({"model_type": "qwen2_5_omni"}, "thinker.model.visual.merger.mlp.0.weight",
         ["thinker.visual.merger.mlp.0.weight", "visual.merger.mlp.0.weight"]),
        ({"model_type": "qwen2_5_omni"}, f"talker.model.layers.0.{Q}", []),
        ({"model_type": "qwen3_vl"}, f"model.language_model.layers.0.{Q}", [f"model.layers.0.{Q}"]),
        ({"model_type": "qwen3_vl"}, "model.visual.blocks.0.attn.qkv.weight", []),
        (MIXTRAL, "model.layers.0.mlp.gate.weight",
         ["model.layers.0.block_sparse_moe.gate.weight"]),
        ({"model_type": "phimoe"}, "model.layers.0.mlp.router.weight",
         ["model.layers.0.block_sparse_moe.gate.weight"]),
        ({"model_type": "granitemoe"}, "model.layers.0.block_sparse_moe.router.weight",
         ["model.layers.0.block_sparse_moe.router.layer.weight"]),
        ({"model_type": "llava", "text_config": MIXTRAL},
         "model.language_model.layers.0.mlp.gate.weight",
         ["language_model.model.layers.0.block_sparse_moe.gate.weight"]),
        ({"model_type": "gpt_neox"}, "lm_head.weight", ["embed_out.weight"]),
        ({"model_type": "vit"}, "vit.layers.0.attention.q_proj.weight",
         ["vit.encoder.layer.0.attention.attention.query.weight"]),
        ({"model_type": "vit"}, "vit.layers.0.attention.o_proj.bias",
         ["vit.encoder.layer.0.attention.output.dense.bias"]),
        ({"model_type": "vit"}, "vit.layers.0.mlp.fc2.weight",
         ["vit.encoder.layer.0.output.dense.weight"]),
        ({"model_type": "bert"}, "bert.embeddings.LayerNorm.weight",
         ["bert.embeddings.LayerNorm.gamma"]),
        ({}, "bert.embeddings.LayerNorm.bias", ["bert.embeddings.LayerNorm.beta"]),
        ({"model_type": "llama"}, f"model.layers.0.{Q}", []),
    ],
)  # fmt: skip
def test_every_spelling_has_one_form(
    config: Mapping[str, Any], form: str, spellings: list[str]
) -> None:
    for name in (form, *spellings):
        assert canonical_name(name, config) == form
    for name in spellings:
        assert known_renames([name], config) == {form: name}
    assert known_renames([form], config) == {}


def test_other_families_keep_their_names() -> None:
    names = [f"language_model.model.layers.0.{Q}", "visual.merger.weight", "backbone.norm.weight",
             "embed_out.weight", "model.layers.0.block_sparse_moe.gate.weight"]  # fmt: skip
    assert known_renames(names, {"model_type": "llama"}) == {}
    assert known_renames(names, {}) == {}
    assert known_renames(names, {"model_type": 7, "text_config": None}) == {}


def test_experts_apart_on_disk_keep_number_and_projection() -> None:
    names = [f"model.layers.0.block_sparse_moe.experts.{e}.{w}.weight"
             for e in range(3) for w in ("w1", "w2", "w3")]  # fmt: skip
    expected = {name.replace("block_sparse_moe", "mlp"): name for name in names}
    assert known_renames(names, MIXTRAL) == expected


def test_experts_fused_under_other_names() -> None:
    moe = "model.layers.0.block_sparse_moe"
    assert known_renames(
        [f"{moe}.input_linear.weight", f"{moe}.output_linear.weight"],
        {"model_type": "granitemoehybrid"},
    ) == {
        f"{moe}.experts.gate_up_proj": f"{moe}.input_linear.weight",
        f"{moe}.experts.down_proj": f"{moe}.output_linear.weight",
    }


def test_two_spellings_side_by_side_are_not_taken_for_one() -> None:
    names = [f"model.layers.0.{Q}", f"model.language_model.layers.0.{Q}", "visual.norm.weight"]
    assert known_renames(names, QWEN) == {"model.visual.norm.weight": "visual.norm.weight"}


def test_modules_are_listed_as_the_adapter_spells_them() -> None:
    stored = ["model.language_model.layers.0.self_attn.q_proj.weight",
              "model.language_model.layers.0.self_attn.q_proj.bias", "lm_head.weight"]  # fmt: skip
    module = "language_model.model.layers.0.self_attn.q_proj"
    modules = [module, "language_model.lm_head", "nothing.of.this", ""]
    assert known_renames(stored, LLAVA, modules) == {
        f"{module}.weight": stored[0],
        f"{module}.bias": stored[1],
        "language_model.lm_head.weight": "lm_head.weight",
    }


def test_spellings_end_where_a_component_does() -> None:
    found = {"a.b.weight": "1", "a.bc.weight": "2", "a.b.c.d": "3"}
    assert spell_alike(found, {"x": "a.b", "y": "a.b", "a": "a"}) == {
        "x.weight": "1", "y.weight": "1", "x.c.d": "3", "y.c.d": "3",
    }  # fmt: skip
    assert spell_alike(found, {}) == {}


_SIZES: dict[str, Any] = {
    "num_hidden_layers": 2, "num_layers": 2, "depth": 2, "encoder_layers": 2,
    "num_experts": 2, "num_local_experts": 2, "n_routed_experts": 2, "moe_num_experts": 2,
}  # fmt: skip
_NEEDS_TIMM = {"gemma3n"}
_WRAPPED_BEFORE_5 = {"clip_vision_model", "siglip_vision_model"}


def _shrink(config: Any) -> None:
    for name, value in _SIZES.items():
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, value)
    for nested in list(vars(config).values()):
        if type(nested).__name__.endswith("Config"):
            _shrink(nested)


def skeleton(family: str) -> Any:
    """Build a model of a family on the meta device, as its configuration is by default."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers", minversion="5")
    config = transformers.CONFIG_MAPPING[family]()
    _shrink(config)
    if family == "aya_vision":
        # whose default does not fit its own number of heads
        config.vision_config.num_attention_heads = 16
    kinds = [
        transformers.AutoModelForMultimodalLM,
        transformers.AutoModelForCausalLM,
        transformers.AutoModelForImageClassification,
        transformers.AutoModelForTextToWaveform,
        transformers.AutoModel,
    ]
    config.architectures = config.architectures or []
    with torch.device("meta"):
        if family == "qwen2_5_omni_thinker":
            return transformers.Qwen2_5OmniThinkerForConditionalGeneration(config)
        kind = next(kind for kind in kinds if type(config) in kind._model_mapping)
        return kind.from_config(config)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", sorted(_FAMILIES.keys() - _NEEDS_TIMM))
def test_transformers_gives_the_same_names(family: str) -> None:
    model = skeleton(family)
    loading = pytest.importorskip("transformers.core_model_loading")
    stored = list(loading.revert_weight_conversion(model, model.state_dict()))
    vision = getattr(model.config, "vision_config", None)
    if getattr(vision, "model_type", "") in _WRAPPED_BEFORE_5:
        # the level that checkpoints of the hub have
        stored = [re.sub(r"^(\w+_tower)\.", r"\1.vision_model.", name) for name in stored]
    answer = name_tensors(model, stored)
    config = json.loads(model.config.to_json_string())
    assert known_renames(stored, config) == answer["renames"]
    assert not are_names_known(config) or not answer["renames"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", sorted(_UNCHANGED))
def test_transformers_does_not_rename_these(family: str) -> None:
    model = skeleton(family)
    mapping = pytest.importorskip("transformers.conversion_mapping")
    assert mapping.get_model_conversion_mapping(model, add_legacy=False) == []
    assert are_names_known(json.loads(model.config.to_json_string()))
