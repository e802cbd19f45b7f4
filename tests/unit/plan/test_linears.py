"""Which layers are linears that a quantizer replaces, against what transformers replaces."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pytest

from streammerge.checkpoint.header import TensorSpec
from streammerge.dtypes import Dtype
from streammerge.plan.linears import _KNOWN, linear_weights

# what is compared in every run; the others by `make test-slow`
_COMMON = frozenset(
    """
    llama mistral ministral3 qwen2 qwen3 qwen2_moe qwen3_moe qwen3_next qwen3_5 mixtral olmo olmo2
    olmoe phi phi3 phimoe gemma gemma2 gemma3 gemma3_text gpt2 gpt_neo gpt_neox gptj gpt_oss
    gpt_bigcode falcon bloom opt mpt cohere cohere2 stablelm starcoder2 deepseek_v2 deepseek_v3 glm
    glm4 glm4_moe granite granitemoe granitemoehybrid llama4 mamba mamba2 falcon_mamba jamba bamba
    falcon_h1 lfm2 smollm3 ernie4_5_moe minimax_m2 zamba zamba2 longcat_flash qwen2_vl qwen2_5_vl
    qwen3_vl llava llava_onevision mistral3 internvl paligemma mllama idefics3 smolvlm bert roberta
    xlm-roberta distilbert deberta-v2 electra modernbert t5 mt5 bart whisper
    """.split()
)
_SIZES: dict[str, int] = {
    "num_hidden_layers": 2, "num_layers": 2, "depth": 2, "encoder_layers": 2, "decoder_layers": 2,
    "n_layer": 2, "n_layers": 2, "first_k_dense_replace": 1,
    "num_experts": 2, "num_local_experts": 2, "n_routed_experts": 2, "moe_num_experts": 2,
}  # fmt: skip
# whose parts are placed by lists of layers
_NOT_SMALL = frozenset({"zamba", "zamba2"})
# whose default configuration has modules that the model then has no names for, or no class at all
_NOT_BUILT = frozenset({"shieldgemma2", "voxtral_realtime_text"})

pytestmark = pytest.mark.filterwarnings("ignore")


@dataclass(frozen=True)
class Answer:
    """What transformers makes of a family."""

    tensors: list[TensorSpec]
    config: dict[str, Any]
    replaced: set[str]


def shrink(config: Any) -> None:
    for name, value in _SIZES.items():
        if isinstance(getattr(config, name, None), int):
            # some count their layers by blocks
            with suppress(NotImplementedError):
                setattr(config, name, value)
    for nested in list(vars(config).values()):
        if type(nested).__name__.endswith("Config"):
            shrink(nested)


def ask(family: str, kinds: tuple[str, ...] = (), **options: bool) -> Answer:
    """Build a model, have its linears replaced, and name them as a checkpoint does."""
    torch = pytest.importorskip("torch")
    bitsandbytes = pytest.importorskip("bitsandbytes")
    transformers = pytest.importorskip("transformers", minversion="5")
    loading = pytest.importorskip("transformers.core_model_loading")
    quantizers = pytest.importorskip("transformers.quantizers.base")
    layers = pytest.importorskip("transformers.integrations.bitsandbytes")
    config = transformers.CONFIG_MAPPING[family]()
    if family not in _NOT_SMALL:
        shrink(config)
    for name, value in options.items():
        setattr(config, name, value)
        setattr(config.get_text_config(), name, value)
    ends = kinds or ("MultimodalLM", "ImageTextToText", "CausalLM", "Seq2SeqLM", "MaskedLM")
    classes = [getattr(transformers, f"AutoModelFor{end}") for end in ends]
    classes += [] if kinds else [transformers.AutoModel]
    kind = next(kind for kind in classes if type(config) in kind._model_mapping)
    with torch.device("meta"):
        model = kind.from_config(config)
    model.tie_weights()
    state = model.state_dict()
    saved = {key: state[key] for key in state.keys() - set(model.all_tied_weights_keys)}
    stored = loading.revert_weight_conversion(model, saved)
    in_memory = names_in_memory(model, list(stored))
    layers.replace_with_bnb_linear(
        model,
        modules_to_not_convert=quantizers.HfQuantizer.get_modules_to_not_convert(
            model, None, model._keep_in_fp32_modules
        ),
        quantization_config=transformers.BitsAndBytesConfig(load_in_4bit=True),
    )
    linears = {
        f"{path}.weight"
        for path, module in model.named_modules()
        if isinstance(module, bitsandbytes.nn.Linear4bit)
    }
    replaced = {name for name in stored if in_memory[name] in linears}
    tensors = [TensorSpec(name, Dtype.BF16, tuple(value.shape)) for name, value in stored.items()]
    return Answer(tensors, json.loads(model.config.to_json_string()), replaced)


def names_in_memory(model: Any, stored: list[str]) -> dict[str, str | None]:
    """Name tensors as they are in memory; None where several are made into one or one into more."""
    mapping = pytest.importorskip("transformers.conversion_mapping")
    loading = pytest.importorskip("transformers.core_model_loading")
    steps: list[Any] = mapping.get_model_conversion_mapping(model)
    renamings = [s for s in steps if isinstance(s, loading.WeightRenaming)]
    converters = [s for s in steps if isinstance(s, loading.WeightConverter)]
    state = model.state_dict()
    found: dict[str, str | None] = {}
    for name in stored:
        path, pattern = loading.rename_source_key(
            name, renamings, converters, model.base_model_prefix, state
        )
        found[name] = None if pattern else path
    return found


def check(answer: Answer) -> None:
    ours = linear_weights(answer.tensors, answer.config)
    assert ours.is_family_known
    assert set(ours.quantized) == answer.replaced
    matrices = {t.name for t in answer.tensors if len(t.shape) == 2 and t.name.endswith(".weight")}
    assert sorted((*ours.quantized, *ours.kept, *ours.experts)) == sorted(matrices)


def test_common_families_are_known() -> None:
    assert _COMMON <= _KNOWN


@pytest.mark.parametrize("family", sorted(_COMMON))
def test_transformers_replaces_the_same(family: str) -> None:
    check(ask(family))


@pytest.mark.slow
def test_transformers_replaces_the_same_in_all_known_families() -> None:
    transformers = pytest.importorskip("transformers", minversion="5")
    checked = 0
    for family in sorted((_KNOWN - _COMMON - _NOT_BUILT) & set(transformers.CONFIG_MAPPING.keys())):
        try:
            answer = ask(family)
        except StopIteration:
            continue  # the type of a part, which is no model of its own
        check(answer)
        checked += 1
    assert checked > 200


@pytest.mark.slow
def test_no_family_has_more_taken_than_transformers_replaces() -> None:
    transformers = pytest.importorskip("transformers", minversion="5")
    checked = 0
    for family in sorted(set(transformers.CONFIG_MAPPING.keys()) - _KNOWN - _NOT_BUILT):
        try:
            answer = ask(family)
        except Exception:  # noqa: BLE001 (whatever transformers says of its own defaults)
            # needs another library, has no model of its own, or no default that can be built
            continue
        ours = linear_weights(answer.tensors, answer.config)
        assert set(ours.quantized) <= answer.replaced, family
        checked += 1
    assert checked > 150


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize(
    "family", ["llama", "qwen3_moe", "gemma3", "olmo", "gpt2", "llava", "qwen2_5_vl", "t5", "bloom"]
)
def test_heads_of_their_own_and_tied_ones(family: str, is_tied: bool) -> None:
    check(ask(family, tie_word_embeddings=is_tied))


@pytest.mark.parametrize("kind", ["SequenceClassification", "TokenClassification"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "bert", "roberta", "gpt2", "gemma2"])
def test_heads_of_other_tasks(family: str, kind: str) -> None:
    check(ask(family, (kind,)))


def specs(*names: str, dtype: Dtype = Dtype.BF16) -> list[TensorSpec]:
    return [TensorSpec(name, dtype, (8, 8)) for name in names]


def test_what_is_kept_is_listed_as_it_is_in_memory() -> None:
    config = {"model_type": "llava", "text_config": {"model_type": "mixtral"}}
    ours = linear_weights(
        specs(
            "language_model.model.embed_tokens.weight",
            "language_model.model.layers.0.self_attn.q_proj.weight",
            "language_model.model.layers.0.block_sparse_moe.gate.weight",
            "language_model.model.layers.0.block_sparse_moe.experts.0.w1.weight",
            "language_model.lm_head.weight",
            "multi_modal_projector.linear_1.weight",
        ),
        config,
    )
    assert ours.quantized == (
        "language_model.model.layers.0.self_attn.q_proj.weight",
        "multi_modal_projector.linear_1.weight",
    )
    assert ours.experts == ("language_model.model.layers.0.block_sparse_moe.experts.0.w1.weight",)
    assert ours.kept_modules == (
        "model.language_model.embed_tokens",
        "model.language_model.layers.0.mlp.gate",
        "lm_head",
    )


def test_a_tied_head_is_listed_though_it_is_not_stored() -> None:
    ours = linear_weights(
        specs("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"),
        {"model_type": "llama", "tie_word_embeddings": True},
    )
    assert ours.kept == ("model.embed_tokens.weight",)
    assert ours.kept_modules == ("model.embed_tokens", "lm_head")


def test_layers_that_are_not_loaded_are_kept() -> None:
    config = {"model_type": "deepseek_v3", "num_hidden_layers": 2}
    names = [f"model.layers.{number}.self_attn.o_proj.weight" for number in range(3)]
    ours = linear_weights(specs(*names, "mtp.layers.0.self_attn.o_proj.weight"), config)
    assert ours.quantized == tuple(names[:2])


def test_of_a_family_that_nobody_knows_only_common_names_are_taken() -> None:
    layer = "model.layers.0"
    linears = [f"{layer}.self_attn.q_proj.weight", f"{layer}.mlp.down_proj.weight"]
    others = [f"{layer}.mlp.gate.weight", f"{layer}.something.weight", "down_proj.weight"]
    config = {"model_type": "of_my_own"}
    for known in (config, {}, {"model_type": "llava", "text_config": config}):
        ours = linear_weights(specs(*linears, *others), known)
        assert not ours.is_family_known
        assert ours.quantized == tuple(linears)
        assert ours.kept == tuple(others)


def test_other_dtypes_and_ranks_are_neither() -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    config = {"model_type": "llama"}
    tensors = [*specs(name, dtype=Dtype.U8), *specs(name.replace("weight", "bias")),
               TensorSpec("model.layers.0.conv.weight", Dtype.BF16, (8, 1, 4))]  # fmt: skip
    ours = linear_weights(tensors, config)
    assert (ours.quantized, ours.kept, ours.experts) == ((), (), ())
    assert ours.kept_modules == ("lm_head",)
