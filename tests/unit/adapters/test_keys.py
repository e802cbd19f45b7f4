"""PEFT's key grammar: all its forms, the traces of wrappers, and other kinds' tensors."""

from __future__ import annotations

import pytest

from streammerge.adapters.keys import AdapterKey, Role, parse_key
from streammerge.adapters.tuners import all_tuners, foreign_factors
from streammerge.adapters.tuners.lora import Lora
from streammerge.errors import AdapterError

LORA = all_tuners()["LORA"]
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


class Numbered(Lora):
    """Factors with parts of their own, numbered ones, and one that all modules share."""

    factors = frozenset({"made_up"})
    parts = frozenset({"Xd", "Xu"})
    shared = frozenset({"common"})
    replaces = frozenset({"in_its_place"})


class Free(Lora):
    """Anything may follow its factor."""

    factors = frozenset({"made_up"})
    has_free_parts = True


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize(
    ("rest", "name"),
    [
        ("lora_A", "lora_A"),
        ("lora_A.weight", "lora_A"),
        ("lora_A.default", "lora_A"),
        ("lora_A.default.weight", "lora_A"),
        ("lora_B.weight", "lora_B"),
        ("lora_B.my_adapter.weight", "lora_B"),
        ("lora_B.bias", "lora_B.bias"),
        ("lora_B.default.bias", "lora_B.bias"),
        ("lora_embedding_A", "lora_embedding_A"),
        ("lora_embedding_A.default", "lora_embedding_A"),
        ("lora_embedding_B", "lora_embedding_B"),
        ("lora_embedding_B.default", "lora_embedding_B"),
        ("lora_magnitude_vector", "lora_magnitude_vector"),
        ("lora_magnitude_vector.weight", "lora_magnitude_vector"),
        ("lora_magnitude_vector.default", "lora_magnitude_vector"),
        ("lora_magnitude_vector.default.weight", "lora_magnitude_vector"),
        ("lora_diag", "lora_diag"),
    ],
)
def test_factor_is_parsed(prefix: str, rest: str, name: str) -> None:
    expected = AdapterKey(Role.FACTOR, MODULE, name)
    assert parse_key(f"{prefix}{MODULE}.{rest}", LORA) == expected


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
    parsed = parse_key(prefix + key, LORA)
    assert (parsed.role, parsed.path) == (role, path)


@pytest.mark.parametrize(
    "rest",
    [
        "trainable_tokens_delta",
        "trainable_tokens_delta.default",
        "token_adapter.trainable_tokens_delta",
        "token_adapter.trainable_tokens_delta.default",
    ],
)
@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("kind", ["LORA", "TRAINABLE_TOKENS"])
def test_rows_of_tokens_are_parsed(kind: str, prefix: str, rest: str) -> None:
    parsed = parse_key(f"{prefix}model.embed_tokens.{rest}", all_tuners()[kind])
    assert (parsed.role, parsed.module) == (Role.TRAINED_ROWS, "model.embed_tokens")


def test_rows_of_a_bare_embedding_have_no_module() -> None:
    parsed = parse_key("token_adapter.trainable_tokens_delta", LORA)
    assert (parsed.role, parsed.module) == (Role.TRAINED_ROWS, "")


def test_wrappers_inside_a_path_are_taken_away() -> None:
    key = "base_model.model._orig_mod.layers.0._checkpoint_wrapped_module.q_proj.lora_A.weight"
    assert parse_key(key, LORA) == AdapterKey(Role.FACTOR, "layers.0.q_proj", "lora_A")


@pytest.mark.parametrize(
    ("key", "module", "depth", "is_inner"),
    [
        ("experts.lora_A.weight", "experts", 0, False),
        ("mlp.experts.base_layer.lora_A.weight", "mlp.experts", 1, False),
        ("mlp.experts.base_layer.base_layer.lora_A.weight", "mlp.experts", 2, False),
        ("attn.base_layer.out_proj.lora_A.weight", "attn.out_proj", 0, True),
        ("attn.base_layer.out_proj.base_layer.lora_A.default.weight", "attn.out_proj", 1, True),
    ],
)
@pytest.mark.parametrize("prefix", PREFIXES)
def test_wrapped_layers_are_counted(
    prefix: str, key: str, module: str, depth: int, is_inner: bool
) -> None:
    assert parse_key(prefix + key, LORA) == AdapterKey(
        Role.FACTOR, module, "lora_A", depth, is_inner
    )


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("q.made_up.Xd", "made_up.Xd"),
        ("q.made_up.default.Xd", "made_up.Xd"),
        ("q.made_up.0.weight", "made_up.0"),
        ("q.made_up.3.default.bias", "made_up.3.bias"),
        ("q.made_up.Xd.1", "made_up.Xd.1"),
    ],
)
def test_parts_and_numbers_belong_to_a_factor(key: str, name: str) -> None:
    expected = AdapterKey(Role.FACTOR, "q", name)
    assert parse_key(f"base_model.model.{key}", Numbered()) == expected


def test_free_parts_are_kept_as_they_stand() -> None:
    key = parse_key("q.made_up.inner.0.another.weight", Free())
    assert (key.role, key.module, key.name) == (Role.FACTOR, "q", "made_up.inner.0.another")


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("base_model.common", "common"),
        ("base_model.common.default", "common"),
        ("base_model.common.Xu", "common.Xu"),
        ("base_model.model.common.default.weight", "common.weight"),
    ],
)
def test_shared_tensors_have_no_module(key: str, name: str) -> None:
    assert parse_key(key, Numbered()) == AdapterKey(Role.SHARED, "", name)


class Copying(Numbered):
    """Each module has copies of what all modules share."""

    factors = frozenset({"made_up", "common"})


def test_a_copy_of_a_shared_tensor_is_its_module_s() -> None:
    shared = AdapterKey(Role.SHARED, "", "common")
    assert parse_key("base_model.common", Copying()) == shared
    assert parse_key("base_model.model.common.default", Copying()) == shared
    copy = AdapterKey(Role.FACTOR, "layers.0.q", "common")
    assert parse_key("base_model.model.layers.0.q.common", Copying()) == copy
    assert parse_key("layers.0.q.common.default", Copying()) == copy


def test_a_module_may_be_called_as_a_shared_tensor() -> None:
    assert parse_key("model.common.weight", Numbered()).path == "model.common.weight"


def test_what_stands_in_place_of_a_layer_is_no_part_of_the_path() -> None:
    key = parse_key("base_model.model.layers.0.norm.in_its_place.weight", Numbered())
    assert (key.role, key.path) == (Role.REPLACEMENT, "layers.0.norm.weight")


@pytest.mark.parametrize("kind", all_tuners())
def test_factors_of_another_kind_are_refused(kind: str) -> None:
    tuner = all_tuners()[kind]
    # words that two kinds have in common are this kind's own
    for part in sorted(foreign_factors(kind)):
        assert part not in tuner.factors | tuner.shared | tuner.replaces
        for key in (f"q_proj.{part}", f"q_proj.{part}.default", f"{part}.weight"):
            with pytest.raises(AdapterError) as caught:
                parse_key(f"base_model.model.{key}", tuner)
            assert str(caught.value) == (
                "adapter holds a tensor of another kind of adapter than its peft_type says, in "
                f"key 'base_model.model.{key}'; got {part}; "
                "adapter_config.json belongs to another adapter?"
            )


def test_lora_s_factors_are_foreign_to_others() -> None:
    with pytest.raises(AdapterError, match="another kind of adapter"):
        parse_key("q_proj.lora_diag.weight", all_tuners()["TRAINABLE_TOKENS"])


@pytest.mark.parametrize(
    "key",
    [
        "q_proj.lora_A.one.other.weight",
        "lora_A.weight",
        "base_layer.lora_B.weight",
        "q_proj.base_layer.inner.weight",
        "q_proj.base_layer.base_layer.weight",
        "base_layer.q_proj.base_layer.weight",
    ],
)
def test_unknown_form_is_refused(key: str) -> None:
    with pytest.raises(AdapterError) as caught:
        parse_key(key, LORA)
    assert str(caught.value) == f"adapter key has an unknown form, in key '{key}'"


def test_too_many_names_after_a_shared_tensor_are_refused() -> None:
    with pytest.raises(AdapterError, match="unknown form"):
        parse_key("base_model.common.one.other", Numbered())
