"""Layers that are there several times, and what config.json says of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from streammerge.errors import PlanError
from streammerge.plan.replicate import replicate_layers, replication_edits

BASE = Path("base")


def stack(count: int, before: str = "model.layers") -> dict[str, str]:
    """Tensors of a model: each stands for itself."""
    layers = [f"{before}.{n}.{rest}" for n in range(count) for rest in ("q.weight", "norm.weight")]
    names = ["model.embed_tokens.weight", *layers, "model.norm.weight", "lm_head.weight"]
    return {name: name for name in names}


def replicate(tensors: dict[str, str], *ranges: tuple[int, int]) -> dict[str, str]:
    return replicate_layers(tensors, ranges, where=BASE)


def test_layers_come_in_the_order_of_the_ranges() -> None:
    found = replicate(stack(3), (0, 2), (1, 3), (1, 2))
    order = [0, 1, 1, 2, 1]
    assert list(found.items()) == [
        ("model.embed_tokens.weight", "model.embed_tokens.weight"),
        *(
            (f"model.layers.{number}.{rest}", f"model.layers.{layer}.{rest}")
            for number, layer in enumerate(order)
            for rest in ("q.weight", "norm.weight")
        ),
        ("model.norm.weight", "model.norm.weight"),
        ("lm_head.weight", "lm_head.weight"),
    ]


def test_layers_may_be_left_out() -> None:
    found = replicate(stack(4), (2, 4))
    assert found["model.layers.0.q.weight"] == "model.layers.2.q.weight"
    assert found["model.layers.1.q.weight"] == "model.layers.3.q.weight"
    assert "model.layers.2.q.weight" not in found


def test_the_whole_stack_once_is_the_model_itself() -> None:
    tensors = stack(3)
    assert replicate(tensors, (0, 3)) == tensors
    assert replicate(tensors, (0, 1), (1, 3)) == tensors


@pytest.mark.parametrize(
    "before", ["layers", "model.layers", "transformer.h", "h", "encoder.layer", "model.blocks"]
)
def test_stacks_are_found_under_the_names_that_models_use(before: str) -> None:
    found = replicate(stack(2, before), (0, 2), (0, 1))
    assert found[f"{before}.2.q.weight"] == f"{before}.0.q.weight"
    assert len(found) == 3 + 6


def test_layers_need_not_stand_side_by_side_or_be_alike() -> None:
    tensors = {name: name for name in ("layers.1.b", "norm", "layers.0.a", "layers.1.a", "head")}
    assert list(replicate(tensors, (1, 2), (0, 1)).items()) == [
        ("layers.0.b", "layers.1.b"),
        ("layers.0.a", "layers.1.a"),
        ("layers.1.a", "layers.0.a"),
        ("norm", "norm"),
        ("head", "head"),
    ]


def test_numbers_inside_a_layer_are_its_own() -> None:
    # the stack is the outermost one: experts are inside a layer
    tensors = {f"layers.{n}.experts.{e}.w": f"{n}/{e}" for n in range(2) for e in range(3)}
    found = replicate(tensors, (1, 2), (0, 2))
    assert found == {
        f"layers.{n}.experts.{e}.w": f"{layer}/{e}"
        for n, layer in enumerate((1, 0, 1))
        for e in range(3)
    }
    inner = {f"layers.{n}.layers.{e}.w": f"{n}/{e}" for n in range(2) for e in range(2)}
    assert replicate(inner, (1, 2))["layers.0.layers.1.w"] == "1/1"


@pytest.mark.parametrize(
    ("tensors", "got"),
    [
        ({}, "none"),
        ({"model.norm.weight": ""}, "none"),
        ({"layers.a.q.weight": "", "layers.weight": ""}, "none"),
        ({"encoder.layers.0.q": "", "decoder.layers.0.q": ""}, "encoder.layers, decoder.layers"),
    ],
)
def test_no_stack_or_several_are_an_error(tensors: dict[str, str], got: str) -> None:
    with pytest.raises(PlanError, match="needs a base with one stack of layers") as caught:
        replicate(tensors, (0, 1))
    assert (caught.value.where, caught.value.got) == ("base", got)


@pytest.mark.parametrize(("ranges", "got"), [(((0, 5),), "4"), (((0, 2), (4, 9)), "4")])
def test_a_layer_that_is_not_there_is_an_error(
    ranges: tuple[tuple[int, int], ...], got: str
) -> None:
    with pytest.raises(PlanError, match="a layer that the base does not have") as caught:
        replicate(stack(4), *ranges)
    assert (caught.value.expected, caught.value.got) == ("0 to 3", got)


@pytest.mark.parametrize(
    ("config", "edits"),
    [
        ({"num_hidden_layers": 3}, {"num_hidden_layers": 5}),
        ({"n_layer": 3, "vocab_size": 3}, {"n_layer": 5}),
        ({"num_layers": 3, "num_hidden_layers": 3}, {"num_layers": 5, "num_hidden_layers": 5}),
        # lists with an entry per layer
        (
            {"num_hidden_layers": 3, "layer_types": ["a", "b", "c"], "mlp_layer": [1, 2, 3]},
            {
                "num_hidden_layers": 5,
                "layer_types": ["a", "b", "b", "c", "b"],
                "mlp_layer": [1, 2, 2, 3, 2],
            },
        ),
        # lists of something else
        (
            {"num_hidden_layers": 3, "layer_types": ["a", "b"], "eos_token_id": [1, 2, 3]},
            {"num_hidden_layers": 5},
        ),
        ({}, {}),
        # lists of layers' numbers
        (
            {"num_hidden_layers": 3, "mlp_only_layers": [1], "moe_layers": [0, 2, 1]},
            {"num_hidden_layers": 5, "mlp_only_layers": [1, 2, 4], "moe_layers": [0, 1, 2, 3, 4]},
        ),
    ],
)
def test_the_configuration_counts_the_layers_that_there_are(
    config: dict[str, Any], edits: dict[str, Any]
) -> None:
    assert replication_edits(config, [(0, 2), (1, 3), (1, 2)]) == edits


@pytest.mark.parametrize(
    ("config", "got"),
    [
        ({"vocab_size": 3}, "no num_hidden_layers, no n_layer, no num_layers, no n_layers"),
        (
            {"num_hidden_layers": "3"},
            "no num_hidden_layers, no n_layer, no num_layers, no n_layers",
        ),
        ({"num_hidden_layers": 3, "first_k_dense_replace": 1}, "first_k_dense_replace: 1"),
        ({"num_hidden_layers": 3, "decoder_sparse_step": 2}, "decoder_sparse_step: 2"),
        ({"num_hidden_layers": 3, "sliding_window_pattern": 6}, "sliding_window_pattern: 6"),
        ({"num_hidden_layers": 3, "use_sliding_window": True}, "use_sliding_window: True"),
        ({"num_hidden_layers": 3, "model_type": "gemma2"}, "model_type: gemma2"),
    ],
)
def test_a_configuration_that_tells_layers_by_their_numbers_is_refused(
    config: dict[str, Any], got: str
) -> None:
    with pytest.raises(PlanError, match="cannot be written into this base's config") as caught:
        replication_edits(config, [(0, 2), (1, 3)])
    assert caught.value.got == got


@pytest.mark.parametrize(
    "config",
    [
        {"first_k_dense_replace": 0, "decoder_sparse_step": 1, "moe_layer_freq": 1},
        {"use_sliding_window": False, "sliding_window_pattern": None},
        {"use_sliding_window": True, "layer_types": ["a", "b", "c"]},
        {"model_type": "gemma2", "layer_types": ["a", "b", "c"]},
        {"moe_layer_freq": [0, 1, 1]},
    ],
)
def test_a_rule_for_all_layers_or_a_list_of_their_kinds_passes(config: dict[str, Any]) -> None:
    edits = replication_edits({"num_hidden_layers": 3, **config}, [(0, 2), (1, 3)])
    assert edits["num_hidden_layers"] == 4
