"""adapter_config.json: scaling, and refusals that name the option."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from typing import TYPE_CHECKING, Any, Protocol

import pytest

from streammerge.adapters import config as config_module
from streammerge.adapters.config import AdapterConfig, TokenRows, read_adapter_config
from streammerge.adapters.options import Choices
from streammerge.adapters.tuners import NOT_MERGEABLE, all_tuners
from streammerge.adapters.tuners.lora import BlockDiagonal, LoraSettings
from streammerge.errors import AdapterError

if TYPE_CHECKING:
    from pathlib import Path

    class MakeAdapter(Protocol):
        def __call__(self, tensors: Any = None, **options: Any) -> Path: ...


WITHOUT_MERGED_FORM = {
    "alora_invocation_tokens": ([1, 2], "an activated LoRA depends on the prompt"),
    "arrow_config": ({"top_k": 2}, "an Arrow router chooses per token"),
}
ABSENT = [None, False, [], {}]


def settings_of(folder: Path, choices: Choices | None = None) -> LoraSettings:
    settings = read_adapter_config(folder, choices).settings
    assert isinstance(settings, LoraSettings)
    return settings


def fault_of(folder: Path) -> AdapterError:
    with pytest.raises(AdapterError) as caught:
        read_adapter_config(folder)
    assert caught.value.exit_code == 3
    assert len(str(caught.value).splitlines()) == 1
    assert caught.value.where == str(folder / "adapter_config.json")
    return caught.value


def test_least_config_has_pefts_defaults(make_adapter: MakeAdapter) -> None:
    folder = make_adapter()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    config = read_adapter_config(folder)
    assert config == AdapterConfig(
        folder / "adapter_config.json", all_tuners()["LORA"], config.settings
    )
    assert (config.settings.rank, config.settings.lora_alpha) == (8, 8)
    assert settings_of(folder).scaling_of("q_proj") == 1.0
    assert (config.settings.use_rslora, config.settings.use_dora) == (False, False)


def test_every_option_that_matters_is_read(make_adapter: MakeAdapter) -> None:
    folder = make_adapter(
        r=16,
        lora_alpha=0.5,
        use_rslora=True,
        use_dora=True,
        fan_in_fan_out=True,
        rank_pattern={"q_proj": 4},
        alpha_pattern={"q_proj": 1.5},
        modules_to_save=["lm_head"],
        target_parameters=["experts.gate_up_proj"],
        layer_replication=[[0, 4], [2, 5]],
        trainable_token_indices={"embed_tokens": [5, 3]},
        ensure_weight_tying=True,
        task_type="CAUSAL_LM",
        base_model_name_or_path="owner/base",
        peft_version="0.18.0",
        init_lora_weights="gaussian",
        lora_bias=True,
        target_modules=["q_proj"],
    )
    config = read_adapter_config(folder)
    assert config == AdapterConfig(
        path=folder / "adapter_config.json",
        tuner=all_tuners()["LORA"],
        settings=config.settings,
        fan_in_fan_out=True,
        modules_to_save=("lm_head",),
        target_parameters=("experts.gate_up_proj",),
        layer_replication=((0, 4), (2, 5)),
        token_rows=TokenRows({"embed_tokens": (5, 3)}),
        ensure_weight_tying=True,
        task_type="CAUSAL_LM",
        base_model="owner/base",
        peft_version="0.18.0",
    )
    settings = settings_of(folder)
    assert (settings.rank, settings.lora_alpha) == (16, 0.5)
    assert (settings.use_rslora, settings.use_dora) == (True, True)
    assert settings.rank_pattern == {"q_proj": 4}
    assert settings.alpha_pattern == {"q_proj": 1.5}


@pytest.mark.parametrize(("rslora", "expected"), [(False, 24 / 9), (True, 24 / 3)])
def test_scaling_divides_by_rank_or_its_root(
    make_adapter: MakeAdapter, *, rslora: bool, expected: float
) -> None:
    config = settings_of(make_adapter(r=9, lora_alpha=24, use_rslora=rslora))
    assert config.scaling_of("model.layers.0.q_proj") == expected


def test_patterns_change_rank_and_alpha_separately(make_adapter: MakeAdapter) -> None:
    config = settings_of(
        make_adapter(
            r=8,
            lora_alpha=16,
            rank_pattern={"layers.0.q_proj": 2, "q_proj": 4},
            alpha_pattern={r"layers\.[01]\.v_proj": 6.0, "^model.layers.2.q_proj": 3},
            use_rslora=True,
        )
    )
    expected = {
        "model.layers.0.q_proj": (2, 16 / math.sqrt(2)),
        "model.layers.10.q_proj": (4, 16 / 2),
        "model.layers.2.q_proj": (4, 3 / 2),
        "model.layers.1.v_proj": (8, 6 / math.sqrt(8)),
        "model.layers.2.v_proj": (8, 16 / math.sqrt(8)),
        "q_proj": (4, 16 / 2),
        "xq_proj": (8, 16 / math.sqrt(8)),
        "q_proj.inner": (8, 16 / math.sqrt(8)),
    }
    for module, (rank, scaling) in expected.items():
        assert (config.rank_of(module), config.scaling_of(module)) == (rank, scaling)


def test_first_matching_pattern_of_the_file_wins(make_adapter: MakeAdapter) -> None:
    first = settings_of(make_adapter(rank_pattern={"q_proj": 4, "model.q_proj": 2}))
    assert first.rank_of("model.q_proj") == 4
    second = settings_of(make_adapter(rank_pattern={"model.q_proj": 2, "q_proj": 4}))
    assert second.rank_of("model.q_proj") == 2


@pytest.mark.parametrize("option", WITHOUT_MERGED_FORM)
def test_what_has_no_merged_form_is_refused_by_name(make_adapter: MakeAdapter, option: str) -> None:
    value, reason = WITHOUT_MERGED_FORM[option]
    fault = fault_of(make_adapter(**{option: value}))
    assert fault.what.startswith(reason)
    assert fault.got == f"{option}: {value!r}"


@pytest.mark.parametrize("option", WITHOUT_MERGED_FORM)
@pytest.mark.parametrize("value", ABSENT)
def test_what_is_off_passes(make_adapter: MakeAdapter, option: str, value: object) -> None:
    assert read_adapter_config(make_adapter(**{option: value})).notes == ()


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *itertools.product(
            ["kasa_config", "monteclora_config", "velora_config", "use_bdlora",
             "layer_replication", "target_parameters", "trainable_token_indices"],
            ABSENT,
        ),
        *itertools.product(["use_qalora", "use_dora", "use_rslora"], [None, False]),
    ],
)  # fmt: skip
def test_a_variant_that_is_off_is_plain(
    make_adapter: MakeAdapter, option: str, value: object
) -> None:
    plain = read_adapter_config(make_adapter())
    assert read_adapter_config(make_adapter(**{option: value})) == plain


def test_a_block_diagonal_adapter_names_its_factors(make_adapter: MakeAdapter) -> None:
    blocks = {"nblocks": 4, "target_modules_bd_a": ["q_proj"], "target_modules_bd_b": "o_proj"}
    settings = settings_of(make_adapter(use_bdlora=blocks))
    assert settings.block_diagonal == BlockDiagonal(4, ("q_proj",), ("o_proj",))


@pytest.mark.parametrize(
    ("value", "what"),
    [(True, "bad use_bdlora"), ([4], "bad use_bdlora"), ({"nblocks": 0}, "bad nblocks")],
)
def test_a_bad_block_diagonal_adapter_is_refused(
    make_adapter: MakeAdapter, value: object, what: str
) -> None:
    assert fault_of(make_adapter(use_bdlora=value)).what == what


def test_the_pool_of_qalora_is_read(make_adapter: MakeAdapter) -> None:
    assert settings_of(make_adapter(qalora_group_size=32)).pool == 1
    assert settings_of(make_adapter(use_qalora=True)).pool == 16
    assert settings_of(make_adapter(use_qalora=True, qalora_group_size=32)).pool == 32
    fault = fault_of(make_adapter(use_qalora=True, qalora_group_size=0))
    assert fault.what == "bad qalora_group_size"


@pytest.mark.parametrize("init", ["pissa", "PiSSA", "olora", "OLoRA"])
def test_an_init_that_is_found_again_is_taken_off_the_base(
    make_adapter: MakeAdapter, init: str
) -> None:
    folder = make_adapter(init_lora_weights=init)
    assert settings_of(folder).residual == init.lower()
    assert settings_of(folder, Choices(base_is_residual=True)).residual is None


@pytest.mark.parametrize("init", ["pissa_niter_16", "loftq", "corda", "lora_ga"])
def test_base_changing_init_is_refused(make_adapter: MakeAdapter, init: str) -> None:
    folder = make_adapter(init_lora_weights=init)
    fault = fault_of(folder)
    start = f"adapter starts from changed base weights (init_lora_weights: {init!r}): "
    assert fault.what.startswith(start)
    assert "path_initial_model_for_weight_conversion" in str(fault.hint)
    # the base may be the one that it started from
    assert settings_of(folder, Choices(base_is_residual=True)).residual is None


@pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "orthogonal", "mica", "true"])
def test_init_that_leaves_the_base_alone_passes(make_adapter: MakeAdapter, init: object) -> None:
    assert settings_of(make_adapter(init_lora_weights=init)).residual is None


@pytest.mark.parametrize("init", ["dreamed_up", "", 5, None, []])
def test_unknown_init_is_refused(make_adapter: MakeAdapter, init: object) -> None:
    fault = fault_of(make_adapter(init_lora_weights=init))
    assert fault.got == f"init_lora_weights: {str(init)!r}"


@pytest.mark.parametrize("kind", ["lora", "NEW_KIND", None, 5, ["LORA"], {"LORA": 1}])
def test_unknown_kinds_of_adapter_are_refused(make_adapter: MakeAdapter, kind: object) -> None:
    fault = fault_of(make_adapter(peft_type=kind))
    assert fault.what == "adapter is of a kind that is not known"
    assert fault.expected == f"peft_type {', '.join(all_tuners())}"
    assert fault.got == repr(kind)


@pytest.mark.parametrize("kind", NOT_MERGEABLE)
def test_kinds_without_a_merged_form_are_refused_by_name(
    make_adapter: MakeAdapter, kind: str
) -> None:
    fault = fault_of(make_adapter(peft_type=kind))
    assert fault.what == f"adapter has no merged form: {NOT_MERGEABLE[kind]}"
    assert fault.got == f"peft_type {kind}"
    assert fault.hint == "use it unmerged, with PEFT"


@pytest.mark.parametrize(
    "value",
    [5, "0-4", {"0": 4}, [4], [[0]], [[0, 4, 8]], [["0", 4]], [[0, True]], [[4, 4]], [[5, 2]],
     [[-1, 3]], [[0.0, 4]], [[0, 4], None]],
)  # fmt: skip
def test_bad_layer_replication_is_refused(make_adapter: MakeAdapter, value: object) -> None:
    fault = fault_of(make_adapter(layer_replication=value))
    assert fault.what == "bad layer_replication"
    assert fault.expected == "ranges of layers, such as [[0, 4], [2, 5]]"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"trainable_token_indices": [7, 1]}, {"": (7, 1)}),
        ({"trainable_token_indices": {"wte": [7], "lm_head": [1, 2]}},
         {"wte": (7,), "lm_head": (1, 2)}),
        ({"peft_type": "TRAINABLE_TOKENS", "token_indices": [0]}, {"": (0,)}),
    ],
)  # fmt: skip
def test_token_rows_are_read(
    make_adapter: MakeAdapter, options: dict[str, Any], expected: dict[str, tuple[int, ...]]
) -> None:
    assert read_adapter_config(make_adapter(**options)).token_rows == TokenRows(expected)


@pytest.mark.parametrize(
    "value", [5, "5", [5.0], ["5"], [-1], [True], {"embed": 5}, {"embed": [5], "head": [None]}]
)
@pytest.mark.parametrize("kind", ["LORA", "TRAINABLE_TOKENS"])
def test_bad_token_rows_are_refused(make_adapter: MakeAdapter, kind: str, value: object) -> None:
    key = "trainable_token_indices" if kind == "LORA" else "token_indices"
    fault = fault_of(make_adapter(peft_type=kind, **{key: value}))
    assert (fault.what, fault.expected) == (f"bad {key}", "lists of token ids")


@pytest.mark.parametrize("value", [None, [], {}])
def test_trainable_tokens_without_tokens_are_refused(
    make_adapter: MakeAdapter, value: object
) -> None:
    fault = fault_of(make_adapter(peft_type="TRAINABLE_TOKENS", token_indices=value))
    assert fault.what == "adapter names no tokens"


@pytest.mark.parametrize(
    ("version", "bound", "expected"),
    [
        (None, (0, 16), None),
        ("0.15.2", (0, 16), True),
        ("0.16.0", (0, 16), False),
        ("0.9.1", (0, 16), True),
        ("0.18.1.dev0@0123abc", (0, 19), True),
        ("0.19.0.dev0", (0, 19), False),
        ("1.0", (0, 19), False),
        ("0.19", (0, 19), False),
        ("0.19.1", (0, 19, 2), True),
        ("0.19.0rc1", (0, 19), False),
        ("0.19.0rc1", (0, 19, 0), True),
    ],
)
def test_versions_are_compared_as_numbers(
    make_adapter: MakeAdapter, version: str | None, bound: tuple[int, ...], expected: bool | None
) -> None:
    config = read_adapter_config(make_adapter(peft_version=version))
    assert config.is_older_than(*bound) is expected


@pytest.mark.parametrize(
    "key",
    ["fan_in_fan_out", "ensure_weight_tying", "use_dora", "use_rslora", "use_qalora"],
)
@pytest.mark.parametrize("value", [1, "true", [True]])
def test_a_switch_is_true_or_false(make_adapter: MakeAdapter, key: str, value: object) -> None:
    fault = fault_of(make_adapter(**{key: value}))
    assert (fault.what, fault.expected) == (f"bad {key}", "true or false")


@pytest.mark.parametrize("key", ["task_type", "base_model_name_or_path", "peft_version"])
def test_a_name_is_text(make_adapter: MakeAdapter, key: str) -> None:
    fault = fault_of(make_adapter(**{key: ["x"]}))
    assert (fault.what, fault.expected) == (f"bad {key}", "text")


def test_unknown_switch_that_is_on_is_refused(make_adapter: MakeAdapter) -> None:
    fault = fault_of(make_adapter(use_hyperlora=True))
    assert fault.what == "adapter uses an option that this version does not know"
    assert fault.got == "use_hyperlora: True"


def test_unknown_options_that_change_nothing_are_noted(make_adapter: MakeAdapter) -> None:
    folder = make_adapter(use_hyperlora=False, new_thing=5, empty_thing=None)
    path = folder / "adapter_config.json"
    assert read_adapter_config(folder).notes == (
        f"{path}: option 'new_thing' is not known here and has no effect",
    )


@pytest.mark.parametrize("value", [0, -1, 1.5, 2.0, "8", True, [8], 10**400])
def test_bad_rank_is_refused(make_adapter: MakeAdapter, value: object) -> None:
    fault = fault_of(make_adapter(r=value))
    assert (fault.what, fault.expected, fault.got) == (
        "bad r", "a positive whole number", repr(value)[:80],
    )  # fmt: skip


@pytest.mark.parametrize("value", ["8", True, [8], math.nan, math.inf, 10**400])
def test_bad_alpha_is_refused(make_adapter: MakeAdapter, value: object) -> None:
    fault = fault_of(make_adapter(lora_alpha=value))
    assert (fault.what, fault.got) == ("bad lora_alpha", repr(value)[:80])


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("value", [5, ["q_proj"], "q_proj", {"(": 4}, {"*": 4}])
def test_bad_pattern_is_refused(make_adapter: MakeAdapter, key: str, value: object) -> None:
    assert fault_of(make_adapter(**{key: value})).what == f"bad {key}"


@pytest.mark.parametrize(
    "pattern", ["(?i)q_proj", "a{99999999999999999999}", "(" * 3000 + ")" * 3000]
)
def test_pattern_that_cannot_be_used_is_an_adapter_error(
    make_adapter: MakeAdapter, pattern: str
) -> None:
    fault_of(make_adapter(rank_pattern={pattern: 4}))


@pytest.mark.parametrize("value", [0, 1.5, "4", None, True])
def test_bad_rank_of_a_pattern_is_refused(make_adapter: MakeAdapter, value: object) -> None:
    assert fault_of(make_adapter(rank_pattern={"q_proj": value})).what == "bad q_proj"


@pytest.mark.parametrize(
    ("value", "expected"),
    [(None, ()), ([], ()), ("lm_head", ("lm_head",)), (["a", "b"], ("a", "b"))],
)
def test_modules_to_save_is_a_name_or_a_list(
    make_adapter: MakeAdapter, value: object, expected: tuple[str, ...]
) -> None:
    assert read_adapter_config(make_adapter(modules_to_save=value)).modules_to_save == expected


@pytest.mark.parametrize("value", [5, [5], {"a": 1}])
def test_bad_modules_to_save_is_refused(make_adapter: MakeAdapter, value: object) -> None:
    fault = fault_of(make_adapter(modules_to_save=value))
    assert (fault.what, fault.got) == ("bad modules_to_save", repr(value))


@pytest.mark.parametrize(
    ("text", "what"),
    [("{", "file is not valid JSON"), ("[]", "JSON file does not hold an object")],
)
def test_damaged_file_is_refused(make_adapter: MakeAdapter, text: str, what: str) -> None:
    folder = make_adapter()
    (folder / "adapter_config.json").write_text(text)
    assert fault_of(folder).what == what


def test_missing_file_is_named(tmp_path: Path) -> None:
    assert fault_of(tmp_path).what == "file is missing"


def test_config_that_peft_saves_is_read(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    saved = peft.LoraConfig(
        r=3,
        lora_alpha=7,
        target_modules=["q_proj"],
        rank_pattern={"q_proj": 2},
        task_type="CAUSAL_LM",
    )
    saved.save_pretrained(str(tmp_path))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA"
    config = read_adapter_config(tmp_path)
    settings = config.settings
    assert (settings.rank, settings.lora_alpha, settings.rank_pattern) == (3, 7, {"q_proj": 2})
    assert config.notes == ()
    assert config.is_older_than(0, 18) is False


def test_no_option_of_peft_s_is_unknown() -> None:
    peft = pytest.importorskip("peft")
    known = config_module._COMMON | all_tuners()["LORA"].options
    assert {field.name for field in dataclasses.fields(peft.LoraConfig)} <= known
