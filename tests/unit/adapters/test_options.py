"""Options: each with its type checked, absent ones with their default."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from streammerge.adapters.options import MAX_NUMBER, Choices, Options, first_match
from streammerge.errors import AdapterError

if TYPE_CHECKING:
    from collections.abc import Callable

PATH = Path("adapter_config.json")
READERS: dict[str, Callable[[Options], Any]] = {
    "flag": lambda options: options.flag("key"),
    "flag that is on": lambda options: options.flag("key", default=True),
    "text": lambda options: options.text("key"),
    "choice": lambda options: options.choice("key", "first", "second"),
    "count": lambda options: options.count("key", 3),
    "count from zero": lambda options: options.count("key", 3, least=0),
    "number": lambda options: options.number("key", 2.5),
    "names": lambda options: options.names("key"),
    "ranks": lambda options: options.pattern("key", whole=True),
    "alphas": lambda options: options.pattern("key", whole=False),
}
HUGE = 10**400


def of(value: Any) -> Options:
    return Options({"key": value}, PATH)


def fault_of(read: str, value: Any) -> AdapterError:
    with pytest.raises(AdapterError) as caught:
        READERS[read](of(value))
    fault = caught.value
    assert fault.where == str(PATH)
    assert len(str(fault).splitlines()) == 1
    assert len(str(fault)) < 400
    return fault


@pytest.mark.parametrize(
    ("read", "default"),
    [
        ("flag", False),
        ("flag that is on", True),
        ("text", None),
        ("choice", "first"),
        ("count", 3),
        ("count from zero", 3),
        ("number", 2.5),
        ("names", ()),
        ("ranks", {}),
        ("alphas", {}),
    ],
)
def test_absent_and_null_mean_the_default(read: str, default: Any) -> None:
    for options in (Options({}, PATH), Options({"other": 1}, PATH), of(None)):
        assert READERS[read](options) == default


@pytest.mark.parametrize(
    ("read", "value"),
    [
        ("flag", True),
        ("flag that is on", False),
        ("text", "some words"),
        ("text", ""),
        ("choice", "first"),
        ("choice", "second"),
        ("count", 1),
        ("count", 10**9),
        ("count from zero", 0),
        ("number", 0),
        ("number", -7),
        ("number", 1e9),
        ("number", -0.125),
        ("ranks", {"q_proj": 4, r"layers\.[01]\..*": 1}),
        ("alphas", {"q_proj": 0.5, "v_proj": -3}),
    ],
)
def test_sound_values_are_returned_as_they_are(read: str, value: Any) -> None:
    found = READERS[read](of(value))
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("value", "expected"),
    [("one", ("one",)), (["one", "two"], ("one", "two")), ([], ()), ("", ())],
)
def test_names_are_a_list_or_one_name(value: Any, expected: tuple[str, ...]) -> None:
    assert of(value).names("key") == expected


@pytest.mark.parametrize(
    ("read", "value", "expected"),
    [
        *[("flag", value, "true or false") for value in (0, 1, "true", [], {})],
        *[("text", value, "text") for value in (0, True, ["x"], {})],
        *[("choice", value, "first or second") for value in ("third", "First", "")],
        ("choice", 1, "text"),
        *[
            ("count", value, "a positive whole number")
            for value in (0, -1, True, False, 1.0, "3", [3], math.nan, math.inf, 10**9 + 1, HUGE)
        ],
        *[("count from zero", value, "a whole number from 0") for value in (-1, 0.0, True)],
        *[
            ("number", value, "a number")
            for value in (True, "3", [3], {}, math.nan, math.inf, -math.inf, 2e9, -HUGE)
        ],
        *[("names", value, "a list of names") for value in (5, True, [5], ["x", None], {"x": 1})],
        *[("ranks", value, "a map") for value in (5, "q_proj", ["q_proj"], True)],
    ],
)
def test_unsound_values_are_refused(read: str, value: Any, expected: str) -> None:
    fault = fault_of(read, value)
    assert (fault.what, fault.expected) == ("bad key", expected)
    assert fault.got == repr(value)[:80]


def test_a_count_and_a_number_without_default_have_to_be_there() -> None:
    for options in (Options({}, PATH), of(None)):
        for read in (options.count, options.number):
            with pytest.raises(AdapterError, match="bad key"):
                read("key")


@pytest.mark.parametrize("value", [0, -1, 1.5, "4", None, True, 10**10])
def test_ranks_of_a_pattern_are_whole_and_positive(value: Any) -> None:
    assert fault_of("ranks", {"q_proj": value}).what == "bad q_proj"


@pytest.mark.parametrize("value", ["4", None, True, math.nan, [1]])
def test_alphas_of_a_pattern_are_numbers(value: Any) -> None:
    assert fault_of("alphas", {"q_proj": value}).what == "bad q_proj"


@pytest.mark.parametrize("pattern", ["(", "*", "[z-a]", "(?i)x", "a{99999999999999999999}"])
def test_patterns_that_are_none_are_refused(pattern: str) -> None:
    fault = fault_of("ranks", {"fine": 1, pattern: 1})
    assert fault.what == "bad key"
    assert repr(pattern) in str(fault.got)


@pytest.mark.parametrize("pattern", ["(a+)+", "(a*)*b", "(a{2,})+", "(a+)+$", "x" * 1001])
def test_patterns_that_could_take_for_ever_are_refused(pattern: str) -> None:
    fault = fault_of("alphas", {pattern: 1})
    assert fault.what == "key holds a pattern that could take for ever to match"
    assert fault.got == pattern[:80]


def test_a_value_may_be_had_as_it_stands() -> None:
    assert of({"any": [1]}).get("key") == {"any": [1]}
    assert of(1).get("other") is None


def test_a_fault_shows_the_value_but_not_all_of_it() -> None:
    assert of("x" * 200).bad("key", expected="less").got == repr("x" * 200)[:80]


def test_choices_are_the_careful_ones_by_default() -> None:
    assert Options({}, PATH).choices == Choices()
    assert Choices() == Choices(base_is_residual=False, reproduces_bugs=False)


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        ("q_proj", 1),
        ("model.q_proj", 1),
        ("model.layers.7.v_proj", 2),
        ("model.layers.17.v_proj", 0),
        ("xq_proj", 0),
        ("q_proj.inner", 0),
        ("", 0),
    ],
)
def test_a_pattern_matches_a_whole_path_or_its_end(module: str, expected: int) -> None:
    patterns = {"q_proj": 1, r"layers\.[0-9]\.v_proj": 2, "model.q_proj": 3}
    assert first_match(patterns, module, 0) == expected


def test_the_first_pattern_of_the_file_wins() -> None:
    assert first_match({"a": 1, "b.a": 2}, "b.a", 0) == 1
    assert first_match({"b.a": 2, "a": 1}, "b.a", 0) == 2
    assert first_match({"a": MAX_NUMBER}, "a", None) == MAX_NUMBER
    assert first_match({}, "a", None) is None
