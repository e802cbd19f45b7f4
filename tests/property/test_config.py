"""Whatever a configuration holds, loading gives a configuration or a one-line ConfigError."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import hypothesis.strategies as st
from hypothesis import given

from streammerge.config import parse_config
from streammerge.config.keys import NO_EFFECT_KEYS, REFUSED_KEYS, TRAINING_KEYS
from streammerge.config.load import parse_overrides
from streammerge.config.model import field_names
from streammerge.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

PRINTABLE = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=12)
KEYS = st.one_of(
    st.sampled_from(sorted(field_names())),
    st.sampled_from(sorted(NO_EFFECT_KEYS | REFUSED_KEYS.keys() | TRAINING_KEYS)),
    PRINTABLE,
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), PRINTABLE),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(PRINTABLE, inner, max_size=3)
    ),
    max_leaves=5,
)


def error_of(call: Callable[[], object]) -> ConfigError | None:
    try:
        call()
    except ConfigError as error:
        return error
    return None


@given(st.dictionaries(KEYS, VALUES, max_size=5))
def test_any_map_gives_a_configuration_or_a_one_line_error(values: dict[str, Any]) -> None:
    error = error_of(lambda: parse_config({"model_name_or_path": "m", "export_dir": "o", **values}))
    assert error is None or error.exit_code == 2
    assert error is None or len(str(error).splitlines()) == 1


@given(st.lists(PRINTABLE, max_size=4))
def test_any_overrides_are_parsed_or_refused(items: list[str]) -> None:
    error = error_of(lambda: parse_overrides(items))
    assert error is None or len(str(error).splitlines()) == 1
