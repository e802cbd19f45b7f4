"""PEFT's key grammar: all its forms, the traces of wrappers, and variants that are refused."""

from __future__ import annotations

import pytest

from streammerge.adapters.keys import AdapterKey, Role, parse_key
from streammerge.errors import AdapterError

MODULE = "model.layers.0.self_attn.q_proj"
PREFIXES = [
    "base_model.model.",
    "",
    "base_model.model.base_model.model.",
    "module.base_model.model.",
    "_orig_mod.base_model.model.",
    "base_model.model._orig_mod.",
    "base_model.model.module.",
    "_fsdp_wrapped_module.base_model.model.",
]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize(
    ("rest", "role"),
    [
        ("lora_A.weight", Role.LORA_A),
        ("lora_A.default.weight", Role.LORA_A),
        ("lora_B.weight", Role.LORA_B),
        ("lora_B.my_adapter.weight", Role.LORA_B),
        ("lora_B.bias", Role.LORA_B_BIAS),
        ("lora_B.default.bias", Role.LORA_B_BIAS),
        ("lora_embedding_A", Role.EMBEDDING_A),
        ("lora_embedding_A.default", Role.EMBEDDING_A),
        ("lora_embedding_B", Role.EMBEDDING_B),
        ("lora_embedding_B.default", Role.EMBEDDING_B),
        ("lora_magnitude_vector", Role.MAGNITUDE),
        ("lora_magnitude_vector.weight", Role.MAGNITUDE),
        ("lora_magnitude_vector.default", Role.MAGNITUDE),
        ("lora_magnitude_vector.default.weight", Role.MAGNITUDE),
    ],
)
def test_factor_is_parsed(prefix: str, rest: str, role: Role) -> None:
    assert parse_key(f"{prefix}{MODULE}.{rest}") == AdapterKey(role, MODULE)


@pytest.mark.parametrize(
    ("key", "role", "path"),
    [
        ("lm_head.weight", Role.REPLACEMENT, "lm_head.weight"),
        ("model.norm.bias", Role.REPLACEMENT, "model.norm.bias"),
        ("score.dense.weight", Role.REPLACEMENT, "score.dense.weight"),
        ("weight", Role.REPLACEMENT, "weight"),
        ("model.embed_tokens.base_layer.weight", Role.BASE_COPY, "model.embed_tokens.weight"),
        ("q_proj.base_layer.bias", Role.BASE_COPY, "q_proj.bias"),
        ("base_layer.weight", Role.BASE_COPY, "weight"),
        ("lm_head.modules_to_save.weight", Role.SAVED_TWIN, "lm_head.weight"),
        ("lm_head.modules_to_save.default.weight", Role.SAVED_TWIN, "lm_head.weight"),
        ("score.modules_to_save.default.dense.weight", Role.SAVED_TWIN, "score.dense.weight"),
        ("score.modules_to_save.dense.weight", Role.SAVED_TWIN, "score.dense.weight"),
        ("lm_head.original_module.weight", Role.ORIGINAL_TWIN, "lm_head.weight"),
        ("score.original_module.dense.bias", Role.ORIGINAL_TWIN, "score.dense.bias"),
    ],
)
@pytest.mark.parametrize("prefix", PREFIXES)
def test_whole_tensor_is_parsed(prefix: str, key: str, role: Role, path: str) -> None:
    parsed = parse_key(prefix + key)
    assert (parsed.role, parsed.path) == (role, path)


def test_wrappers_inside_a_path_are_taken_away() -> None:
    key = "base_model.model._orig_mod.layers.0._checkpoint_wrapped_module.q_proj.lora_A.weight"
    assert parse_key(key) == AdapterKey(Role.LORA_A, "layers.0.q_proj")


@pytest.mark.parametrize(
    ("key", "marker"),
    [
        ("q_proj.lora_diag", "lora_diag"),
        ("embed_tokens.token_adapter.trainable_tokens_delta", "token_adapter"),
        ("embed_tokens.trainable_tokens_delta", "trainable_tokens_delta"),
        ("q_proj.hada_w1_a", "hada_w1_a"),
        ("q_proj.lokr_w1", "lokr_w1"),
        ("q_proj.lora_E", "lora_E"),
        ("q_proj.ia3_l", "ia3_l"),
        ("q_proj.oft_R.weight", "oft_R"),
        ("q_proj.oft_embedding_R.weight", "oft_embedding_R"),
        ("q_proj.boft_R", "boft_R"),
        ("q_proj.boft_s", "boft_s"),
        ("q_proj.vera_lambda_b", "vera_lambda_b"),
        ("vera_A", "vera_A"),
        ("prompt_encoder.weight", "prompt_encoder"),
        ("q_proj.lora_A_blocks.weight", "lora_A_blocks"),
        ("q_proj.lora_velora_embed", "lora_velora_embed"),
        ("q_proj.lora_monteclora_sampler.x", "lora_monteclora_sampler"),
    ],
)
def test_tensor_of_another_formula_is_refused(key: str, marker: str) -> None:
    with pytest.raises(AdapterError) as caught:
        parse_key(f"base_model.model.{key}")
    assert str(caught.value) == (
        "adapter holds a tensor of a variant that is not merged by this version, in "
        f"key 'base_model.model.{key}'; got {marker}; merge it with PEFT"
    )


@pytest.mark.parametrize(
    "key",
    [
        "q_proj.lora_A",
        "q_proj.lora_B.default",
        "q_proj.lora_A.bias",
        "q_proj.lora_embedding_B.bias",
        "q_proj.lora_magnitude_vector.bias",
        "q_proj.lora_A.v1.0.weight",
        "q_proj.base_layer.inner.weight",
    ],
)
def test_unknown_form_is_refused(key: str) -> None:
    with pytest.raises(AdapterError) as caught:
        parse_key(key)
    assert str(caught.value) == f"adapter key has an unknown form, in key '{key}'"


@pytest.mark.parametrize(
    "key",
    [
        "attn.base_layer.out_proj.lora_A.weight",
        "experts.base_layer.lora_A.weight",
        "base_layer.lora_B.weight",
        "mlp.experts.base_layer.base_layer.lora_B.weight",
    ],
)
def test_wrapped_parameter_is_refused(key: str) -> None:
    with pytest.raises(AdapterError, match="adapter wraps a parameter"):
        parse_key(f"base_model.model.{key}")
