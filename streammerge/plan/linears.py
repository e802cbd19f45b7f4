"""Which stored tensors are weights of linear layers that a quantizer without data replaces.

The rules are those by which transformers 5 puts layers of bitsandbytes into a model that it loads
(`get_keys_to_not_convert` and `replace_with_bnb_linear`, as of 5.23): a module is replaced if it is
an `nn.Linear`, no subclass of it, or a `Conv1D`; and neither an output head, nor tied to another
module, nor the last one of the model, nor one that the family keeps in 32 bits. Towers for images
and sound are replaced as well. No header says what class a module has. What the families have in
common is in the names of their modules; what they have not is here as data. In a family that nobody
compared with transformers, only layers under names are taken that are linears everywhere.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from streammerge.plan.family import find_embeddings
from streammerge.plan.names import canonical_name

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from streammerge.dtypes import Dtype

__all__ = ["LinearWeights", "Shaped", "linear_weights"]


class Shaped(Protocol):
    """What is known of a tensor without reading it."""

    @property
    def name(self) -> str:
        """Name in the checkpoint."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape as stored."""

    @property
    def dtype(self) -> Dtype:
        """Dtype as stored."""


@dataclass(frozen=True, slots=True)
class LinearWeights:
    """The matrices of a checkpoint that are stored in 16 bits or more, by what they are.

    The tensors are in the order in which they were given.
    """

    quantized: tuple[str, ...]
    """Weights (N, K) of linears, (K, N) where the module is a Conv1D (`family.is_conv1d`)."""
    kept: tuple[str, ...]
    """Other matrices called `.weight`: embeddings, heads, routers, and what is not known."""
    experts: tuple[str, ...]
    """Matrices of single experts. transformers fuses them in memory, where they are no linears."""
    kept_modules: tuple[str, ...]
    """Modules of `kept`, and of a head that is tied, by their paths in memory under transformers 5:
    what a configuration lists as not converted. Single experts and fused ones are not listed."""
    is_family_known: bool
    """Whether the rules were compared with transformers for models of this type, and for those of
    the language model inside it."""


_EXPERT = re.compile(r"\bexperts\.\d+\.")
_EMBEDDING = re.compile(
    r"(?:^|_)(?<!patch_)(?:embeddings?|embedder|embed|embeds|emb)(?:_?\d+)?$"
    r"|^(?:shared|wte|wpe|w|tokens_embed|positions_embed|codebook|ngram_embeddings)$"
    r"|^embed_(?:tokens|positions|in)|^embed_\w*tokens\w*$|_tokens?$"
    r"|relative_attention_bias$|^position_embedding_table$|^embed_global$"
)
_HEAD = re.compile(
    r"(?:^|\.)(?:lm_head|embed_out|output_layer|unembed|output_projection|vocab_projector|lm_loss"
    r"|generator_lm_head|audio_lm_head|(?:lm_head|\w*predictions|head)\.decoder|lm_head\.out_proj"
    r"|pred_layer\.proj)$|^(?:decoder|proj_out)$"
)
_ROUTER = re.compile(r"(?:^|\.)(?:gate|router|router\.layer)$")
# with a bias it is the bias that is a model's last parameter, and the module is replaced
_TASK_HEAD = re.compile(r"(?:^|\.)(?:score|classifier|qa_outputs)$")
_LAYER = re.compile(r"(?:model\.)?(?:language_model\.)?layers\.(\d+)\.")
# predictors of further tokens, which transformers does not load
_NOT_LOADED = re.compile(r"(?:^|\.)mtp\.")
# names of linears in every family that transformers has
_COMMON = frozenset(
    """
    q_proj k_proj v_proj o_proj gate_proj up_proj down_proj gate_up_proj qkv_proj fc1 fc2 c_attn
    c_fc c_proj query_key_value dense_h_to_4h dense_4h_to_h q_a_proj q_b_proj kv_a_proj_with_mqa
    kv_b_proj in_proj out_proj linear_fc1 linear_fc2
    """.split()
)
# families whose layers are of a class of their own, so that none is replaced
_OWN_CLASSES = frozenset({"falcon"})
# linears whose names say otherwise
_REPLACED: dict[str, re.Pattern[str]] = {
    "afmoe": re.compile(r"\.router\.gate$"),
    "jetmoe": re.compile(r"\.router\.layer$"),
    "fuyu": re.compile(r"vision_embed_tokens$"),
    "prophetnet": re.compile(r"\.relative_pos_embeddings$"),
    **dict.fromkeys(("longcat_flash", "switch_transformers"), re.compile(r"\.router\.classifier$")),
}
# what a family keeps in 32 bits, ties together or makes parts of when it loads a checkpoint
_KEPT: dict[str, re.Pattern[str]] = {
    **dict.fromkeys(("t5", "mt5", "umt5", "udop"), re.compile(r"\.wo$")),
    **dict.fromkeys(("deepseek_v32", "glm_moe_dsa", "axk2"), re.compile(r"indexer\.weights_proj$")),
    **dict.fromkeys(("zamba", "zamba2"), re.compile(r"\.shared_transf(?:ormer)?\.")),
    **dict.fromkeys(("nomic_bert", "jina_embeddings_v3"), re.compile(r"\.Wqkv$")),
    "blip-2": re.compile(r"^qformer\."),
    "git": re.compile(r"^output$"),
    "gte": re.compile(r"\.(?:qkv_proj|up_gate_proj)$"),
    "hrm_text": re.compile(r"\.(?:gqkv_proj|gate_up_proj)$"),
    "ibert": re.compile(r"^ibert\.encoder\."),
    "kimi_k25": re.compile(r"\.wqkv$"),
    "minimax_m3_vl": re.compile(r"\.shared_experts\.(?:gate|up)_proj$"),
    "mobilebert": re.compile(r"\.predictions\.dense$"),
    "phi4_multimodal": re.compile(r"\.bias_values$"),
    "qianfan_ocr": re.compile(r"vision_model\..+\.qkv$"),
    "rwkv": re.compile(r"^head$"),
    "unlimited_ocr": re.compile(r"vision_model\..+\.qkv_proj$"),
    "voxtral_realtime": re.compile(r"multi_modal_projector\.linear_2$"),
    "gradium_phonon_tts": re.compile(r"\.self_attn\.in_proj$"),
}
# what comes last in a model that has no head of its own, where no norm with a weight follows; of
# layers it is the last one
_LAST: dict[str, re.Pattern[str]] = {
    "olmo": re.compile(r"\blayers\.(\d+)\.mlp\.down_proj$"),
    "nanochat": re.compile(r"\blayers\.(\d+)\.mlp\.fc2$"),
    "muse_glimmer": re.compile(r"\bvision_projection$"),
    **dict.fromkeys(
        ("qwen4_exp", "qwen4_exp_text"), re.compile(r"hyper_connection_mixer\.input_mix_weight_up$")
    ),
}
# model types of which transformers' answer is known to be that of these rules
_KNOWN = frozenset(
    """
    afmoe albert apertus arcee aria aria_text audioflamingo3 axk1 axk2 bailing_hybrid bamba bart
    beam bert bert-generation big_bird bigbird_pegasus biogpt bitnet blenderbot blenderbot-small
    blip blip-2 blip_text_model bloom blt camembert codegen cohere cohere2 cohere2_moe
    cohere2_vision convbert cosmos3_edge cosmos3_edge_text cosmos3_omni cpmant ctrl cwm
    data2vec-text deberta deberta-v2 deepseek_v2 deepseek_v3 deepseek_v32 deepseek_vl
    deepseek_vl_hybrid diffllama distilbert doge dots3_note_text electra encoder-decoder ernie
    ernie4_5 ernie4_5_moe ernie4_5_vl_moe ernie4_5_vl_moe_text esmc eurobert exaone4 exaone4_5
    exaone_moe falcon falcon_h1 falcon_mamba flaubert flex_olmo flint florence2 fnet fsmt
    fun_asr_nano funnel fuyu gemma gemma2 gemma3 gemma3_text gemma4 gemma4_text gemma4_unified
    gemma4_unified_text git glm glm4 glm46v glm4_moe glm4_moe_lite glm4v glm4v_moe
    glm4v_moe_text glm4v_text glm5_next glm5_next_text glm_moe_dsa glm_ocr glm_ocr_text glmasr
    glmga got_ocr2 gpt-sw3 gpt2 gpt_bigcode gpt_neo gpt_neox gpt_neox_japanese gpt_oss gptj
    granite granite_docling granite_docling_text granite_speech granite_speech_plus granite_swa
    granitemoe granitemoe_swa granitemoehybrid granitemoeshared gte helium hrm_text hy_v3 hy_v4
    hyperclovax hyperclovax_vision_v2 ibert idefics idefics2 idefics3 inkling2 inkling2_text
    inkling_text instructblip instructblipvideo internlm3 internvl iquestcoder jais2 jamba janus
    jetmoe jina_embeddings_v3 kimi_k25 kimi_linear kolibri1 kosmos-2 kosmos-2.5
    kosmos_2_5_text_model kosmos_2_text_model kyutai_speech_to_text laguna layoutlm led lfm2
    lfm2_vl lfm3 lfm3_vl lighton_ocr llama llama4 llama4_text llava llava_next llava_next_video
    llava_onevision longcat_flash longformer longt5 luke m2m_100 mamba mamba2 marian mbart
    megatron-bert mellum mimo_v2_flash minicpm3 minicpm_ocr minicpmv4_6 minicpmv4_7 minimax
    minimax_m2 minimax_m3_vl minimax_m3_vl_text ministral3 mistral mistral3 mistral4 mixtral
    mllama mllama_text_model mobilebert modernbert modernbert-decoder modernvbert moshi
    moss_transcribe_diarize mpnet mpt mra mt5 muse_glimmer muse_glimmer_text muse_spark
    muse_spark_text musicflamingo mvp nanochat nemotron_h nllb-moe nomic_bert nystromformer olmo
    olmo2 olmo3 olmo_hybrid olmoe openai-gpt opt paddleocr_vl paddleocr_vl_text paligemma
    pegasus pegasus_x perceiver persimmon phi phi3 phi4_multimodal phimoe pi0 pix2struct
    pix2struct_text_model plbart pp_chart2table pp_formulanet pp_formulanet_text prophetnet
    qianfan_ocr qwen2 qwen2_5_omni_text qwen2_5_omni_thinker qwen2_5_vl qwen2_5_vl_text
    qwen2_audio qwen2_moe qwen2_vl qwen2_vl_text qwen3 qwen3_5 qwen3_5_moe qwen3_5_moe_text
    qwen3_5_text qwen3_asr qwen3_moe qwen3_next qwen3_omni_moe_text qwen3_omni_moe_thinker
    qwen3_vl qwen3_vl_moe qwen3_vl_moe_text qwen3_vl_text qwen4_exp qwen4_exp_text
    recurrent_gemma rembert roberta roberta-prelayernorm roc_bert roformer rwkv seamless_m4t
    seamless_m4t_v2 seed_oss smollm3 smolvlm solar_open squeezebert stablelm starcoder2 step3p5
    switch_transformers t5 t5gemma t5gemma2 tapas trocr udop umt5 unlimited_ocr
    unlimited_ocr_text vaultgemma vibevoice_asr video_llama_3 video_llava vipllava
    vision-encoder-decoder voxtral voxtral_realtime voxtral_realtime_text whisper xglm xlm
    xlm-roberta xlm-roberta-xl xlnet xlstm xmod yoso youtu zamba zamba2 zaya
    """.split()
)


def linear_weights(tensors: Iterable[Shaped], config: Mapping[str, Any]) -> LinearWeights:
    """Tell the linears of a checkpoint from its other matrices.

    Args:
        tensors: All tensors of the checkpoint.
        config: The checkpoint's config.json.
    """
    tensors = list(tensors)
    names = frozenset(tensor.name for tensor in tensors)
    embeddings = find_embeddings(names, config=config)
    has_head = embeddings.output in names and not embeddings.is_tied
    rules = _rules_of(names, config, has_head=has_head)
    quantized: list[str] = []
    kept: list[str] = []
    experts: list[str] = []
    for tensor in tensors:
        is_matrix = len(tensor.shape) == 2 and tensor.dtype.is_mergeable
        if not is_matrix or not tensor.name.endswith(".weight"):
            continue
        if _EXPERT.search(tensor.name):
            experts.append(tensor.name)
        elif rules.is_replaced(
            tensor.name.removesuffix(".weight"), canonical_name(tensor.name, config)
        ):
            quantized.append(tensor.name)
        else:
            kept.append(tensor.name)
    modules = dict.fromkeys(
        canonical_name(name, config).removesuffix(".weight") for name in (*kept, embeddings.output)
    )
    return LinearWeights(
        tuple(quantized), tuple(kept), tuple(experts), tuple(modules), rules.is_known
    )


@dataclass(frozen=True, slots=True)
class _Rules:
    """What holds for one checkpoint."""

    names: frozenset[str]
    types: frozenset[str]
    """The types of the model and of all its parts."""
    layers: int | None
    """How many layers the model has; a checkpoint may store more."""
    has_head: bool
    """Whether there is a head of its own after all other modules."""
    is_known: bool

    def is_replaced(self, module: str, form: str) -> bool:
        """Whether the module of a matrix is a linear that is replaced.

        Args:
            module: Its path in the checkpoint.
            form: Its path in memory.
        """
        if self._is_not_loaded(form) or not self.types.isdisjoint(_OWN_CLASSES):
            return False
        if any(_matches(_REPLACED, kind, module) for kind in self.types):
            return True
        if any(_matches(_KEPT, kind, module) for kind in self.types) or self._is_special(module):
            return False
        if not self.has_head and any(self._is_last(kind, module) for kind in self.types):
            return False
        return self.is_known or (_last(module) in _COMMON and bool(re.search(r"\.\d+\.", module)))

    def _is_special(self, module: str) -> bool:
        """Whether a module is no linear, or one that is kept, by what any family calls it."""
        beside = f"{module.rpartition('.')[0]}.in_proj_weight"
        return bool(
            _EMBEDDING.search(_last(module))
            or _HEAD.search(module)
            or _ROUTER.search(module)
            or (_TASK_HEAD.search(module) and f"{module}.bias" not in self.names)
            # of nn.MultiheadAttention, where it is of a subclass
            or (_last(module) == "out_proj" and beside in self.names)
        )

    def _is_last(self, kind: str, module: str) -> bool:
        pattern = _LAST.get(kind)
        match = pattern.search(module) if pattern is not None else None
        if match is None:
            return False
        return not match.groups() or self.layers is None or int(match[1]) == self.layers - 1

    def _is_not_loaded(self, form: str) -> bool:
        layer = _LAYER.match(form)
        is_beyond = layer is not None and self.layers is not None and int(layer[1]) >= self.layers
        return is_beyond or _NOT_LOADED.search(form) is not None


def _rules_of(names: frozenset[str], config: Mapping[str, Any], *, has_head: bool) -> _Rules:
    nested = config.get("text_config")
    text = nested if isinstance(nested, dict) else {}
    layers = (text or config).get("num_hidden_layers")
    # the parts that see images or hear follow the rules whatever they are
    main = {str(part["model_type"]) for part in (config, text) if "model_type" in part}
    return _Rules(
        names,
        frozenset(_model_types(config)),
        layers if isinstance(layers, int) else None,
        has_head=has_head,
        is_known=bool(main) and main <= _KNOWN,
    )


def _matches(table: Mapping[str, re.Pattern[str]], kind: str, module: str) -> bool:
    pattern = table.get(kind)
    return pattern is not None and pattern.search(module) is not None


def _last(module: str) -> str:
    """Return the last component that is no number of a list."""
    return next((part for part in reversed(module.split(".")) if not part.isdigit()), module)


def _model_types(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield the types of a model and of all its parts."""
    yield str(config.get("model_type"))
    for key, value in config.items():
        if key.endswith("_config") and isinstance(value, dict) and "model_type" in value:
            yield from _model_types(value)
