"""Which base tensor an adapter's path means."""

from __future__ import annotations

import pytest

from streammerge.plan.match import Match, NameResolver

Q = "self_attn.q_proj.weight"


def resolver(*names: str, **renames: str) -> NameResolver:
    return NameResolver(frozenset(names), renames)


def test_exact_name_wins_over_a_prefix() -> None:
    found = resolver(f"model.layers.0.{Q}", f"layers.0.{Q}")
    assert found.find(f"layers.0.{Q}") == Match(f"layers.0.{Q}", "exact")
    assert found.find(f"model.layers.0.{Q}") == Match(f"model.layers.0.{Q}", "exact")


@pytest.mark.parametrize(
    "prefix",
    ["model", "transformer", "base_model", "bert", "roberta", "gpt_neox", "decoder",
     "language_model", "backbone", "vit", "wav2vec2"],
)  # fmt: skip
def test_one_prefix_is_added_or_removed(prefix: str) -> None:
    bare, wrapped = f"layers.0.{Q}", f"{prefix}.layers.0.{Q}"
    assert resolver(wrapped).find_direct(bare) == Match(wrapped, "prefix")
    assert resolver(bare).find_direct(wrapped) == Match(bare, "prefix")


def test_other_first_components_are_not_prefixes() -> None:
    assert resolver(f"layers.0.{Q}").find_direct(f"visual.layers.0.{Q}") is None


def test_ambiguous_prefix_is_no_match() -> None:
    found = resolver(f"model.layers.0.{Q}", f"decoder.layers.0.{Q}")
    assert found.find_direct(f"layers.0.{Q}") is None
    assert found.find(f"layers.0.{Q}") is None


def test_removed_and_added_prefix_are_ambiguous_together() -> None:
    assert resolver("norm.weight", "model.model.norm.weight").find_direct("model.norm.weight") is (
        None
    )


@pytest.mark.parametrize("rival", ["encoder", "visual", "text_model"])
def test_prefix_is_not_added_beside_another_part(rival: str) -> None:
    found = resolver(f"decoder.layers.0.{Q}", f"{rival}.layers.0.{Q}")
    assert found.find_direct(f"layers.0.{Q}") is None
    assert found.find(f"layers.0.{Q}") is None
    assert found.find(f"decoder.layers.0.{Q}") == Match(f"decoder.layers.0.{Q}", "exact")


def test_a_deeper_part_is_no_rival_of_a_prefix() -> None:
    found = resolver(f"model.layers.0.{Q}", f"model.visual.layers.0.{Q}")
    assert found.find_direct(f"layers.0.{Q}") == Match(f"model.layers.0.{Q}", "prefix")


def test_renames_are_found_by_one_prefix_too() -> None:
    stored = "layers.0.block_sparse_moe.gate.weight"
    found = NameResolver(frozenset({stored}), {"layers.0.mlp.gate.weight": stored})
    for path in ("layers.0.mlp.gate.weight", "model.layers.0.mlp.gate.weight"):
        assert found.find_known(path) == Match(stored, "renamed")
    assert found.find_known("visual.layers.0.mlp.gate.weight") is None
    both = {f"{prefix}.a.b.weight": f"{prefix}.weight" for prefix in ("model", "decoder")}
    assert NameResolver(frozenset(both.values()), both).find_known("a.b.weight") is None


def test_a_rename_to_what_is_not_there_is_none() -> None:
    found = NameResolver(frozenset({"a.b.weight"}), {"x.y.weight": "z.weight"})
    assert found.find_known("x.y.weight") is None


def test_modules_are_there_if_anything_is_below_them() -> None:
    found = NameResolver(
        frozenset({"model.layers.0.mlp.experts.0.w1.weight", "lm_head.weight"}),
        {"model.layers.0.moe.0.w1.weight": "model.layers.0.mlp.experts.0.w1.weight"},
    )
    for path in ("model.layers.0.mlp.experts", "layers.0.mlp", "model.layers.0.moe", "lm_head"):
        assert found.has_module(path)
    for path in ("model.layers.0.mlp.experts.0.w1.weight", "model.layers.1", "layers.0.mlp.exp"):
        assert not found.has_module(path)


def test_renames_come_before_suffixes() -> None:
    path = f"vlm.model.layers.0.{Q}"
    base = ("a.weight", f"other.layers.0.{Q}")
    assert NameResolver(frozenset(base), {path: "a.weight"}).find(path) == (
        Match("a.weight", "renamed")
    )
    assert NameResolver(frozenset(base), {}).find(path) == Match(f"other.layers.0.{Q}", "suffix")


def test_unique_suffix_with_its_layer_number_matches() -> None:
    name = f"model.language_model.layers.3.{Q}"
    assert resolver(name, f"model.language_model.layers.4.{Q}").find(
        f"language_model.model.layers.3.{Q}"
    ) == Match(name, "suffix")


def test_ambiguous_suffix_is_no_match() -> None:
    names = (f"vision.layers.0.{Q}", f"text.layers.0.{Q}")
    assert resolver(*names).find(f"other.thing.layers.0.{Q}") is None


def test_longer_suffix_is_preferred() -> None:
    names = (f"a.text.layers.0.{Q}", f"a.vision.layers.0.{Q}")
    assert resolver(*names).find(f"model.text.layers.0.{Q}") == Match(names[0], "suffix")


@pytest.mark.parametrize("layers", [1, 2, 35])
@pytest.mark.parametrize("start", ["", "model.", "base.model.", "model.language_model."])
def test_layer_beyond_the_base_never_matches(layers: int, start: str) -> None:
    names = [f"model.layers.{n}.{Q}" for n in range(layers)]
    assert resolver(*names).find(f"{start}layers.35.{Q}") is None


def test_a_layer_number_is_not_matched_by_its_last_digits() -> None:
    assert resolver(f"model.layers.15.{Q}").find(f"x.y.layers.5.{Q}") is None
    assert resolver(f"model.layers.5.{Q}").find(f"x.y.layers.15.{Q}") is None


def test_every_number_of_a_nested_path_counts() -> None:
    found = resolver("m.layers.0.experts.1.w1.weight")
    assert found.find("model.layers.3.experts.1.w1.weight") is None
    assert found.find("model.layers.0.experts.2.w1.weight") is None
    assert found.find("model.layers.0.experts.1.w1.weight") is not None


@pytest.mark.parametrize(
    ("path", "name"),
    [
        # a wrapper of the trainer's, whatever it is called
        ("student.model.layers.0", "model.layers.0"),
        ("policy.net.model.layers.0", "model.layers.0"),
        ("layers.0", "some.family.layers.0"),
        ("model.layers.0", "my_family.language_model.layers.0"),
        ("model.language_model.layers.0", "model.layers.0"),
        ("model.vision_tower.encoder.layers.0", "visual.encoder.layers.0"),
        ("model.vision_tower.vision_model.layers.0", "model.visual.layers.0"),
        ("thinker.model.audio_tower.layers.0", "model.audio_tower.layers.0"),
        ("base_model.model.decoder.layers.0", "decoder.layers.0"),
    ],
)
def test_suffix_may_differ_in_words_that_mean_nothing(path: str, name: str) -> None:
    assert resolver(f"{name}.{Q}").find(f"{path}.{Q}") == Match(f"{name}.{Q}", "suffix")


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("model.vision_tower.layers.0", "model.layers.0"),
        ("model.visual.layers.0", "language_model.model.layers.0"),
        ("model.language_model.layers.0", "model.visual.layers.0"),
        ("model.audio_tower.layers.0", "model.vision_tower.layers.0"),
        ("talker.model.layers.0", "model.layers.0"),
        ("mtp.layers.0", "model.layers.0"),
        ("model.encoder.layers.0", "model.decoder.layers.0"),
        ("model.encoder.layers.0", "model.layers.0"),
        ("encoder.layers.0", "vision_tower.vision_model.encoder.layers.0"),
        # two families' own words, and a word inside another tower
        ("one.layers.0", "other.layers.0"),
        ("model.vision_tower.sam.layers.0", "model.vision_model.layers.0"),
    ],
)
def test_suffix_does_not_lead_into_another_part(path: str, name: str) -> None:
    assert resolver(f"{name}.{Q}").find(f"{path}.{Q}") is None


def test_suffix_without_layers_needs_two_modules_or_a_name_that_is_unique() -> None:
    found = resolver("model.visual.merger.mlp.weight", "a.b.embed_tokens.weight")
    mlp = Match("model.visual.merger.mlp.weight", "suffix")
    assert found.find("vlm.vision.merger.mlp.weight") == mlp
    assert found.find("vlm.visual.mlp.weight") is None
    assert found.find("merger.weight") is None
    embedding = Match("a.b.embed_tokens.weight", "suffix")
    assert found.find("model.language_model.embed_tokens.weight") == embedding
    assert found.find("model.talker.embed_tokens.weight") is None


def test_a_path_without_a_layer_never_matches_a_tensor_of_a_layer() -> None:
    assert resolver("roberta.encoder.layer.0.dense.weight").find("classifier.dense.weight") is None


@pytest.mark.parametrize("path", ["35.weight", "weight", "0.self_attn.weight", ""])
def test_short_paths_match_nothing(path: str) -> None:
    assert resolver(f"model.layers.0.{Q}").find(path) is None


def test_nearest_names_have_the_same_end() -> None:
    found = resolver(*(f"model.layers.{n}.{Q}" for n in range(3)), "model.norm.weight")
    assert found.nearest(f"model.layers.1x.{Q}", count=1) == [f"model.layers.1.{Q}"]
    assert set(found.nearest(f"model.layers.9.{Q}")) == {f"model.layers.{n}.{Q}" for n in range(3)}


def test_nearest_names_fall_back_to_all_names() -> None:
    assert resolver("a.weight", "b.bias").nearest("a.wait", count=1) == ["a.weight"]
    assert len(resolver("a.weight", "b.bias").nearest("zzz", count=5)) == 2
