"""What differs between model families."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from streammerge.plan.family import (
    Embeddings,
    are_experts_fused_in_memory,
    are_experts_in_out_on_disk,
    are_experts_interleaved,
    are_experts_transposed_in_memory,
    are_experts_transposed_on_disk,
    find_embeddings,
    is_conv1d,
    is_declared_tied,
)

if TYPE_CHECKING:
    from collections.abc import Callable

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, None),
        ({"tie_word_embeddings": True}, True),
        ({"tie_word_embeddings": False}, False),
        ({"tie_word_embeddings": None}, None),
        ({"text_config": {"tie_word_embeddings": True}}, True),
        ({"text_config": {"tie_word_embeddings": False}}, False),
        ({"text_config": {}}, None),
        ({"text_config": None}, None),
        ({"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": True}}, False),
    ],
)
def test_declared_ties(config: dict[str, Any], expected: bool | None) -> None:
    assert is_declared_tied(config) is expected


@pytest.mark.parametrize(
    ("names", "config", "is_tied"),
    [
        ([EMBED, HEAD], {"model_type": "llama"}, False),
        ([EMBED], {"model_type": "llama"}, True),
        ([EMBED], {"tie_word_embeddings": False}, False),
        ([EMBED, HEAD], {"tie_word_embeddings": True}, True),
        ([EMBED, HEAD], {"tie_word_embeddings": False}, False),
        ([EMBED], {"text_config": {"tie_word_embeddings": False}}, False),
    ],
)
def test_tied_if_declared_or_without_a_head(
    names: list[str], config: dict[str, Any], is_tied: bool
) -> None:
    found = find_embeddings(names, config=config)
    assert found == Embeddings(EMBED, HEAD, is_tied=is_tied, is_known=True)


def test_without_a_configuration_nothing_is_tied() -> None:
    for names in ([EMBED], [EMBED, HEAD]):
        found = find_embeddings(names, config={})
        assert found == Embeddings(EMBED, HEAD, is_tied=False, is_known=True)


@pytest.mark.parametrize(
    "config",
    [
        {"architectures": ["LlamaForSequenceClassification"]},
        {"architectures": ["BertForQuestionAnswering"], "tie_word_embeddings": True},
    ],
)
def test_a_model_without_a_head_has_nothing_to_tie(config: dict[str, Any]) -> None:
    assert not find_embeddings([EMBED], config=config).is_tied


@pytest.mark.parametrize(
    ("config", "is_known"),
    [
        ({"model_type": "llama"}, True),
        ({"model_type": "biogpt"}, False),
        ({"model_type": "biogpt", "tie_word_embeddings": False}, True),
        ({"model_type": "biogpt", "architectures": ["BioGptForTokenClassification"]}, True),
        ({"model_type": "t5", "is_encoder_decoder": True}, False),
        ({"model_type": "t5", "is_encoder_decoder": True, "tie_word_embeddings": False}, False),
    ],
)
def test_where_it_is_known_what_shares_storage(config: dict[str, Any], is_known: bool) -> None:
    assert find_embeddings([EMBED], config=config).is_known is is_known


def test_a_model_without_an_embedding_is_not_tied() -> None:
    found = find_embeddings(["a.weight"], config={"tie_word_embeddings": True})
    assert found == Embeddings(None, "lm_head.weight", is_tied=False, is_known=False)


@pytest.mark.parametrize(
    ("names", "source", "head"),
    [
        (["transformer.wte.weight", "transformer.wpe.weight"], "transformer.wte.weight", HEAD),
        (["wte.weight"], "wte.weight", HEAD),
        (
            ["gpt_neox.embed_in.weight", "embed_out.weight"],
            "gpt_neox.embed_in.weight",
            "embed_out.weight",
        ),
        (["transformer.word_embeddings.weight"], "transformer.word_embeddings.weight", HEAD),
        (["tok_embeddings.weight", "output_layer.weight"], "tok_embeddings.weight",
         "output_layer.weight"),
        (
            ["language_model.model.embed_tokens.weight"],
            "language_model.model.embed_tokens.weight",
            "language_model.lm_head.weight",
        ),
        (
            ["language_model.model.embed_tokens.weight", "language_model.lm_head.weight"],
            "language_model.model.embed_tokens.weight",
            "language_model.lm_head.weight",
        ),
        (
            ["model.language_model.embed_tokens.weight", "model.visual.embed_tokens.weight"],
            "model.language_model.embed_tokens.weight",
            HEAD,
        ),
    ],
)  # fmt: skip
def test_embeddings_of_families(names: list[str], source: str, head: str) -> None:
    found = find_embeddings(names, config={})
    assert (found.input, found.output) == (source, head)


@pytest.mark.parametrize(
    "tower", ["vision_tower", "visual", "audio_tower", "encoder", "talker", "mtp", "speech"]
)
def test_other_towers_are_not_the_language_model(tower: str) -> None:
    other = f"{tower}.embed_tokens.weight"
    assert find_embeddings([other], config={}).input is None
    assert find_embeddings([other, f"model.{EMBED}"], config={}).input == f"model.{EMBED}"


def test_the_outermost_embedding_is_meant() -> None:
    names = ["model.a.b.embed_tokens.weight", EMBED, "model.aa.embed_tokens.weight"]
    assert find_embeddings(names, config={}).input == EMBED


def test_names_that_only_end_alike_are_not_embeddings() -> None:
    assert find_embeddings(["model.my_embed_tokens.weight"], config={}).input is None


@pytest.mark.parametrize(
    ("model_type", "module", "expected"),
    [
        ("gpt2", "transformer.h.0.attn.c_attn", True),
        ("gpt2", "c_proj", True),
        ("imagegpt", "h.0.mlp.c_fc", True),
        ("decision_transformer", "h.0.q_attn", True),
        ("gpt2", "lm_head", False),
        ("gpt2", "h.0.attn.c_attn.inner", False),
        ("gpt_bigcode", "h.0.attn.c_attn", False),
        ("llama", "c_attn", False),
        (None, "c_attn", False),
    ],
)
def test_conv1d(model_type: str | None, module: str, expected: bool) -> None:
    assert is_conv1d(module, config={"model_type": model_type}) is expected


@pytest.mark.parametrize(
    ("asked", "model_type", "sees_inside"),
    [
        (are_experts_transposed_in_memory, "gpt_oss", True),
        (are_experts_transposed_in_memory, "aria", True),
        (are_experts_in_out_on_disk, "gpt_oss", True),
        (are_experts_in_out_on_disk, "llama4", True),
        (are_experts_in_out_on_disk, "qwen3_vl_moe", True),
        (are_experts_interleaved, "gpt_oss", True),
        (are_experts_fused_in_memory, "mixtral", False),
        (are_experts_fused_in_memory, "qwen3_moe", False),
    ],
)
def test_experts_of_a_family(
    asked: Callable[..., bool], model_type: str, sees_inside: bool
) -> None:
    assert asked({"model_type": model_type})
    inside = {"model_type": "some_vlm", "text_config": {"model_type": model_type}}
    assert asked(inside) is sees_inside
    for other in ({}, {"model_type": "llama"}, {"text_config": None}, {"text_config": "odd"}):
        assert not asked(other)


def test_no_config_no_conv1d() -> None:
    assert is_conv1d("c_attn", config={}) is False


@pytest.mark.parametrize(
    ("model_type", "name", "shape", "expected"),
    [
        ("qwen3_vl_moe", "gate_up_proj", (4, 32, 48), True),
        ("qwen3_vl_moe", "down_proj", (4, 24, 32), True),
        # as transformers writes them
        ("qwen3_vl_moe", "gate_up_proj", (4, 48, 32), False),
        ("qwen3_vl_moe", "down_proj", (4, 32, 24), False),
        ("mixtral", "gate_up_proj", (4, 32, 48), False),
    ],
)
def test_experts_that_are_stored_the_other_way_round(
    model_type: str, name: str, shape: tuple[int, ...], expected: bool
) -> None:
    config = {"model_type": model_type, "hidden_size": 32}
    assert are_experts_transposed_on_disk(config, name, shape) is expected
    inside = {"model_type": "some_vlm", "text_config": config}
    assert are_experts_transposed_on_disk(inside, name, shape) is expected
