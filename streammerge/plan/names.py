"""What the tensors of a checkpoint are called in memory, in families that transformers renames.

Adapters carry the names that the model had in memory where they were trained; checkpoints carry
those of the hub. Both are brought to one form, the name in memory under transformers 5:

    hub, and memory before 4.52   language_model.model.layers.0, vision_tower.vision_model.encoder
    memory of 4.52 to 4.57        model.language_model.layers.0, model.vision_tower.vision_model
    memory of 5, and this form    model.language_model.layers.0, model.vision_tower.encoder

Two names of one form are one tensor. Experts that memory has fused and the checkpoint apart keep
their number and the checkpoint's own name of the projection: `mlp.experts.3.w1.weight`. The rules
hold what transformers.conversion_mapping does to the names of these families, as of 5.23.
"""

from __future__ import annotations

import re
from collections import defaultdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

__all__ = ["are_names_known", "canonical_name", "known_renames", "spell_alike"]

_Rules = tuple[tuple[re.Pattern[str], str], ...]


def _rules(*pairs: tuple[str, str]) -> _Rules:
    return tuple((re.compile(pattern), replacement) for pattern, replacement in pairs)


_TOWERS = "vision_tower|image_tower|video_tower|audio_tower|vision_model|vision_embed_tokens"
# an adapter of the language model alone, which the checkpoint has inside a larger model
_LANGUAGE = (r"^model\.(?=(?:layers|embed_tokens|norm)\.)", "model.language_model.")
# all rules of a set apply, one after the other
_SETS: dict[str, _Rules] = {
    "any": _rules(
        (r"\bLayerNorm\.gamma$", "LayerNorm.weight"),
        (r"\bLayerNorm\.beta$", "LayerNorm.bias"),
    ),
    "nested": _rules(
        (r"^(?:model\.)?language_model\.lm_head\.", "lm_head."),
        (r"^(?:model\.)?language_model\.(?:model\.)*", "model.language_model."),
        (rf"^(?=(?:{_TOWERS}|multi_modal_projector|image_newline)\b)", "model."),
        # what CLIP's and SigLIP's encoders were wrapped in before 5
        (r"^(model\.\w+_tower)\.vision_model\.", r"\1."),
        _LANGUAGE,
    ),
    "beside": _rules(
        (r"^visual\.", "model.visual."),
        (r"^(?:model\.)?language_model\.(?:model\.)*", "model.language_model."),
        (r"^model\.(?!language_model\.|visual\.)", "model.language_model."),
    ),
    "language": _rules(_LANGUAGE),
    "thinker": _rules(
        (r"^thinker\.", ""),
        (r"^(?=visual\.|audio_tower\.)", "model."),
        (r"^model\.(?!language_model\.|visual\.|audio_tower\.)", "model.language_model."),
    ),
    # the thinker is trained by itself
    "around_thinker": _rules((r"^(?=lm_head\.|model\.)", "thinker.")),
    "block_sparse": _rules((r"\.block_sparse_moe\.", ".mlp.")),
    "router": _rules((r"\.mlp\.gate\.weight$", ".mlp.router.weight")),
    "granite": _rules(
        (r"\.block_sparse_moe\.input_linear\.weight$", ".block_sparse_moe.experts.gate_up_proj"),
        (r"\.block_sparse_moe\.output_linear\.weight$", ".block_sparse_moe.experts.down_proj"),
        (r"\.block_sparse_moe\.router\.layer\.", ".block_sparse_moe.router."),
    ),
    "aria": _rules(
        (r"\.mlp\.experts\.fc1\.weight$", ".mlp.experts.gate_up_proj"),
        (r"\.mlp\.experts\.fc2\.weight$", ".mlp.experts.down_proj"),
    ),
    "statics": _rules((r"\.mlp\.moe_statics\.", ".mlp.gate.moe_statics.")),
    "backbone": _rules((r"^backbone\.", "model.")),
    "embed_out": _rules((r"^embed_out\.", "lm_head.")),
    "vit": _rules(
        (r"\bencoder\.layer\.", "layers."),
        (r"\battention\.query\.", "q_proj."),
        (r"\battention\.key\.", "k_proj."),
        (r"\battention\.value\.", "v_proj."),
        (r"\battention\.output\.dense\.", "attention.o_proj."),
        (r"\bintermediate\.dense\.", "mlp.fc1."),
        (r"\boutput\.dense\.", "mlp.fc2."),
    ),
}
# the sets of each model_type, in the order in which they apply
_FAMILIES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        """
        llava llava_next llava_next_video llava_onevision vipllava video_llava gemma3 mistral3
        paligemma aya_vision got_ocr2 internvl aria fuyu mllama qwen2_audio voxtral
        """.split(),
        ("nested",),
    ),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl"), ("beside",)),
    **dict.fromkeys(
        "qwen3_vl qwen3_vl_moe qwen3_5 qwen3_5_moe gemma3n glm4v glm4v_moe".split(), ("language",)
    ),
    "qwen2_5_omni_thinker": ("thinker",),
    "qwen2_5_omni": ("thinker", "around_thinker"),
    **dict.fromkeys(("mixtral", "minimax", "minimax_m2"), ("block_sparse",)),
    "phimoe": ("block_sparse", "router"),
    **dict.fromkeys(("granitemoe", "granitemoeshared", "granitemoehybrid"), ("granite",)),
    "aria_text": ("aria",),
    "ernie4_5_moe": ("statics",),
    "nemotron_h": ("backbone",),
    "gpt_neox": ("embed_out",),
    **dict.fromkeys(("vit", "deit", "ijepa"), ("vit",)),
}
# model types that transformers does not rename at all
_UNCHANGED = frozenset(
    """
    albert apertus arcee bart bert bloom camembert cohere cohere2 deberta deberta-v2 distilbert
    electra exaone4 falcon falcon_mamba gemma gemma2 gemma3_text glm glm4 gpt2 gpt_bigcode gpt_neo
    gpt_oss gptj granite hubert idefics2 idefics3 llama mamba mamba2 mbart mistral modernbert mpnet
    mpt mt5 olmo olmo2 olmo3 opt phi phi3 qwen2 qwen3 qwen3_vl qwen3_vl_text roberta seed_oss
    smollm3 smolvlm stablelm starcoder2 t5 wav2vec2 whisper xlm-roberta
    """.split()
)


def are_names_known(config: Mapping[str, Any]) -> bool:
    """Whether it is certain that a family has no other names in memory than those known here."""
    return _UNCHANGED.issuperset(_types_of(config))


def _types_of(config: Mapping[str, Any]) -> list[str]:
    sections = (config, config.get("text_config"))
    return [str(part.get("model_type")) for part in sections if isinstance(part, dict)]


def _rules_of(config: Mapping[str, Any]) -> _Rules:
    sets = ["any", *(name for kind in _types_of(config) for name in _FAMILIES.get(kind, ()))]
    return tuple(rule for name in sets for rule in _SETS[name])


def canonical_name(name: str, config: Mapping[str, Any]) -> str:
    """Return the one form of a tensor's name, however it is spelt.

    Args:
        name: Name in a checkpoint, or in memory under any version of transformers.
        config: The base's config.json.
    """
    return _apply(_rules_of(config), name)


def _apply(rules: _Rules, name: str) -> str:
    for pattern, replacement in rules:
        name = pattern.sub(replacement, name, count=1)
    return name


def known_renames(
    names: Iterable[str], config: Mapping[str, Any], modules: Iterable[str] = ()
) -> dict[str, str]:
    """Map names in memory to checkpoint names, where they differ.

    Args:
        names: The checkpoint's tensor names.
        config: The base's config.json, for its model types.
        modules: Paths of an adapter's modules; what is below them is also listed as they spell it.
    """
    rules = _rules_of(config)
    spelt: dict[str, list[str]] = defaultdict(list)
    for name in names:
        spelt[_apply(rules, name)].append(name)
    # two spellings side by side are two tensors, whatever they are
    found = {form: each[0] for form, each in spelt.items() if len(each) == 1}
    forms = {
        module: _apply(rules, f"{module}.weight").removesuffix(".weight") for module in modules
    }
    renames = {form: name for form, name in found.items() if form != name}
    return {**renames, **spell_alike(found, forms)}


def spell_alike(found: Mapping[str, str], forms: Mapping[str, str]) -> dict[str, str]:
    """Map names below modules that an adapter spells in its own way.

    Args:
        found: Name in memory to checkpoint name.
        forms: Path of a module as the adapter has it, to its path in memory.
    """
    spellings: dict[str, list[str]] = defaultdict(list)
    for module, form in forms.items():
        if module != form:
            spellings[form].append(module)
    return {
        module + form[len(parent) :]: name
        for form, name in (found.items() if spellings else ())
        for parent in _parents(form)
        for module in spellings.get(parent, ())
    }


def _parents(name: str) -> Iterator[str]:
    at = name.find(".")
    while at >= 0:
        yield name[:at]
        at = name.find(".", at + 1)
