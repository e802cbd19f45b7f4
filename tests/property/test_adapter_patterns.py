"""Rank and alpha patterns select what PEFT selects; keys parse or are refused."""

from __future__ import annotations

import contextlib
import re
from typing import TYPE_CHECKING

import hypothesis.strategies as st
import pytest
from hypothesis import given

from streammerge.adapters.keys import AdapterKey, Role, parse_key
from streammerge.adapters.tuners import all_tuners
from streammerge.adapters.tuners.lora import LoraSettings
from streammerge.errors import AdapterError

if TYPE_CHECKING:
    from streammerge.adapters.tuners.base import Tuner

get_pattern_key = pytest.importorskip("peft.utils.other").get_pattern_key

LORA = all_tuners()["LORA"]
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


@given(
    st.dictionaries(PATTERNS.filter(is_regex), st.integers(1, 99), max_size=4),
    st.dictionaries(PATTERNS.filter(is_regex), st.integers(1, 99), max_size=4),
    PATHS,
)
def test_patterns_select_what_peft_selects(
    ranks: dict[str, int], alphas: dict[str, float], module: str
) -> None:
    found = LoraSettings(1000, 2000, rank_pattern=ranks, alpha_pattern=alphas)
    rank = ranks.get(get_pattern_key(ranks.keys(), module), 1000)
    alpha = alphas.get(get_pattern_key(alphas.keys(), module), 2000)
    assert found.rank_of(module) == rank
    assert found.scaling_of(module) == alpha / rank
    assert found.scaling_of(module, rank=7) == alpha / 7


@given(PATHS, st.sampled_from(["", "base_model.model.", "base_model.model._orig_mod."]))
def test_factor_of_any_path_names_its_module(module: str, prefix: str) -> None:
    for factor in ("lora_A", "lora_B"):
        for name in ("", ".default"):
            for depth in range(3):
                wrapped = module + ".base_layer" * depth
                key = parse_key(f"{prefix}{wrapped}.{factor}{name}.weight", LORA)
                assert key == AdapterKey(Role.FACTOR, module, factor, depth)


FACTORS = {word for tuner in all_tuners().values() for word in (*tuner.factors, *tuner.shared)}
WORDS = sorted(FACTORS | {word for tuner in all_tuners().values() for word in tuner.parts})


@given(
    st.one_of(
        st.text(),
        st.lists(
            st.one_of(
                st.sampled_from([*PARTS, "weight", "bias", "base_layer", "default", "base_model",
                                 "modules_to_save", "original_module", "token_adapter",
                                 "trainable_tokens_delta", "", "_orig_mod", "module"]),
                st.sampled_from(WORDS),
            ),
            max_size=6,
        ).map(".".join),
    ),
    st.sampled_from(list(all_tuners().values())),
)  # fmt: skip
def test_any_key_is_parsed_or_refused(key: str, tuner: Tuner) -> None:
    with contextlib.suppress(AdapterError):
        parsed = parse_key(key, tuner)
        assert isinstance(parsed.role, Role)
        # a factor has a module and a name that is the tuner's
        if parsed.role is Role.FACTOR:
            assert parsed.module
            assert parsed.name.partition(".")[0] in tuner.factors
        elif parsed.role is Role.SHARED:
            assert parsed.name.partition(".")[0] in tuner.shared
        else:
            # nothing that any kind calls a factor passes for a whole tensor
            assert {*parsed.path.split(".")}.isdisjoint(FACTORS - tuner.shared)
