"""adapter_config.json: scaling, and refusals that name the option."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any, Protocol

import pytest

from streammerge.adapters.config import AdapterConfig, read_adapter_config
from streammerge.errors import AdapterError

if TYPE_CHECKING:
    from pathlib import Path

    class MakeAdapter(Protocol):
        def __call__(self, tensors: Any = None, **options: Any) -> Path: ...


UNSUPPORTED = {
    "alora_invocation_tokens": [1, 2],
    "arrow_config": {"top_k": 2},
    "use_bdlora": True,
    "use_qalora": True,
    "kasa_config": {"beta": 1},
    "monteclora_config": {"n": 1},
    "velora_config": {"n": 1},
    "layer_replication": [[0, 2], [1, 3]],
    "target_parameters": ["experts.gate_up_proj"],
    "trainable_token_indices": [5],
}


def fault_of(folder: Path) -> AdapterError:
    with pytest.raises(AdapterError) as caught:
        read_adapter_config(folder)
    assert caught.value.exit_code == 3
    assert len(str(caught.value).splitlines()) == 1
    assert caught.value.where == str(folder / "adapter_config.json")
    return caught.value


def test_least_config_has_pefts_defaults(make_adapter: MakeAdapter) -> None:
    folder = make_adapter()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4}')
    assert read_adapter_config(folder) == AdapterConfig(
        path=folder / "adapter_config.json",
        rank=4,
        lora_alpha=8,
        use_rslora=False,
        use_dora=False,
        fan_in_fan_out=False,
        rank_pattern={},
        alpha_pattern={},
        modules_to_save=(),
        ensure_weight_tying=False,
        task_type=None,
        base_model=None,
        peft_version=None,
    )


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
        ensure_weight_tying=True,
        task_type="CAUSAL_LM",
        base_model_name_or_path="owner/base",
        peft_version="0.18.0",
        init_lora_weights="gaussian",
        lora_bias=True,
        target_modules=["q_proj"],
    )
    assert read_adapter_config(folder) == AdapterConfig(
        path=folder / "adapter_config.json",
        rank=16,
        lora_alpha=0.5,
        use_rslora=True,
        use_dora=True,
        fan_in_fan_out=True,
        rank_pattern={"q_proj": 4},
        alpha_pattern={"q_proj": 1.5},
        modules_to_save=("lm_head",),
        ensure_weight_tying=True,
        task_type="CAUSAL_LM",
        base_model="owner/base",
        peft_version="0.18.0",
    )


@pytest.mark.parametrize(("rslora", "expected"), [(False, 24 / 9), (True, 24 / 3)])
def test_scaling_divides_by_rank_or_its_root(
    make_adapter: MakeAdapter, *, rslora: bool, expected: float
) -> None:
    config = read_adapter_config(make_adapter(r=9, lora_alpha=24, use_rslora=rslora))
    assert config.scaling_of("model.layers.0.q_proj") == expected


def test_patterns_change_rank_and_alpha_separately(make_adapter: MakeAdapter) -> None:
    config = read_adapter_config(
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
    first = read_adapter_config(make_adapter(rank_pattern={"q_proj": 4, "model.q_proj": 2}))
    assert first.rank_of("model.q_proj") == 4
    second = read_adapter_config(make_adapter(rank_pattern={"model.q_proj": 2, "q_proj": 4}))
    assert second.rank_of("model.q_proj") == 2


@pytest.mark.parametrize("option", UNSUPPORTED)
def test_unsupported_option_is_refused_by_name(make_adapter: MakeAdapter, option: str) -> None:
    fault = fault_of(make_adapter(**{option: UNSUPPORTED[option]}))
    assert fault.got == f"{option}: {UNSUPPORTED[option]!r}"


@pytest.mark.parametrize("option", UNSUPPORTED)
@pytest.mark.parametrize("value", [None, False, [], {}])
def test_unsupported_option_that_is_off_passes(
    make_adapter: MakeAdapter, option: str, value: object
) -> None:
    assert read_adapter_config(make_adapter(**{option: value})).notes == ()


@pytest.mark.parametrize(
    "init", ["pissa", "pissa_niter_16", "PiSSA", "olora", "loftq", "corda", "lora_ga"]
)
def test_base_changing_init_is_refused(make_adapter: MakeAdapter, init: str) -> None:
    fault = fault_of(make_adapter(init_lora_weights=init))
    assert fault.what == (f"adapter starts from changed base weights (init_lora_weights: {init!r})")


@pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "orthogonal", "true"])
def test_init_that_leaves_the_base_alone_passes(make_adapter: MakeAdapter, init: object) -> None:
    assert read_adapter_config(make_adapter(init_lora_weights=init)).rank == 2


@pytest.mark.parametrize("init", ["dreamed_up", "", 5, None, []])
def test_unknown_init_is_refused(make_adapter: MakeAdapter, init: object) -> None:
    fault = fault_of(make_adapter(init_lora_weights=init))
    assert fault.got == f"init_lora_weights: {init!r}"


@pytest.mark.parametrize("kind", ["LOHA", "OFT", "IA3", "lora", None, 5, ["LORA"]])
def test_other_kinds_of_adapter_are_refused(make_adapter: MakeAdapter, kind: object) -> None:
    fault = fault_of(make_adapter(peft_type=kind))
    assert (fault.expected, fault.got) == ("peft_type LORA", repr(kind))


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


@pytest.mark.parametrize("value", [0, -1, 1.5, 2.0, "8", True, None, [8]])
def test_bad_rank_is_refused(make_adapter: MakeAdapter, value: object) -> None:
    fault = fault_of(make_adapter(r=value))
    assert (fault.what, fault.expected, fault.got) == (
        "bad r", "a positive whole number", repr(value),
    )  # fmt: skip


@pytest.mark.parametrize("value", ["8", True, None, [8], math.nan, math.inf])
def test_bad_alpha_is_refused(make_adapter: MakeAdapter, value: object) -> None:
    fault = fault_of(make_adapter(lora_alpha=value))
    assert (fault.what, fault.got) == ("bad lora_alpha", repr(value))


def test_alpha_beyond_every_float_is_refused(make_adapter: MakeAdapter) -> None:
    with pytest.raises(AdapterError):
        read_adapter_config(make_adapter(lora_alpha=10**400)).scaling_of("q_proj")


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
    with pytest.raises(AdapterError):
        read_adapter_config(make_adapter(rank_pattern={pattern: 4})).rank_of("q_proj")


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
    assert (config.rank, config.lora_alpha, config.rank_pattern) == (3, 7, {"q_proj": 2})
    assert config.notes == ()
