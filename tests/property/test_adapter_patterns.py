"""Rank and alpha patterns select what PEFT selects; keys parse or are refused."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given

from streammerge.adapters.config import AdapterConfig
from streammerge.adapters.keys import Role, parse_key
from streammerge.errors import AdapterError

get_pattern_key = pytest.importorskip("peft.utils.other").get_pattern_key

PARTS = ["model", "layers", "0", "1", "10", "q_proj", "proj", "mlp", "experts", "x"]
PATHS = st.lists(st.sampled_from(PARTS), min_size=1, max_size=5).map(".".join)
GLUE = st.sampled_from([".", r"\.", "", ".*", "|", r"\.[01]\.", "^", "$", "[a-z]+", ".+", "(x|q)_"])
PATTERNS = st.one_of(
    PATHS,
    st.lists(st.one_of(st.sampled_from(PARTS), GLUE), min_size=1, max_size=5).map("".join),
)


def is_regex(pattern: str) -> bool:
    with contextlib.suppress(re.error):
        return bool(re.compile(rf"(.*\.)?({pattern})$"))
    return False


def config(ranks: dict[str, int], alphas: dict[str, float]) -> AdapterConfig:
    return AdapterConfig(
        path=Path("adapter_config.json"),
        rank=1000,
        lora_alpha=2000,
        use_rslora=False,
        use_dora=False,
        fan_in_fan_out=False,
        rank_pattern=ranks,
        alpha_pattern=alphas,
        modules_to_save=(),
        ensure_weight_tying=False,
        task_type=None,
        base_model=None,
        peft_version=None,
    )


@given(
    st.dictionaries(PATTERNS.filter(is_regex), st.integers(1, 99), max_size=4),
    st.dictionaries(PATTERNS.filter(is_regex), st.integers(1, 99), max_size=4),
    PATHS,
)
def test_patterns_select_what_peft_selects(
    ranks: dict[str, int], alphas: dict[str, float], module: str
) -> None:
    found = config(ranks, alphas)
    rank = ranks.get(get_pattern_key(ranks.keys(), module), 1000)
    alpha = alphas.get(get_pattern_key(alphas.keys(), module), 2000)
    assert found.rank_of(module) == rank
    assert found.scaling_of(module) == alpha / rank


@given(PATHS, st.sampled_from(["", "base_model.model.", "base_model.model._orig_mod."]))
def test_factor_of_any_path_names_its_module(module: str, prefix: str) -> None:
    for role in (Role.LORA_A, Role.LORA_B):
        for name in ("", ".default"):
            key = parse_key(f"{prefix}{module}.{role.value}{name}.weight")
            assert (key.role, key.module) == (role, module)


@given(
    st.one_of(
        st.text(),
        st.lists(
            st.sampled_from([*PARTS, "lora_A", "lora_B", "weight", "bias", "base_layer", "default",
                             "modules_to_save", "original_module", "base_model", "lora_embedding_A",
                             "lora_magnitude_vector", "", "_orig_mod"]),
            max_size=6,
        ).map(".".join),
    )
)  # fmt: skip
def test_any_key_is_parsed_or_refused(key: str) -> None:
    with contextlib.suppress(AdapterError):
        assert isinstance(parse_key(key).role, Role)
