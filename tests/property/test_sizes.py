"""Sizes: exact for whole numbers, and a ValueError for everything else."""

from __future__ import annotations

import contextlib

import hypothesis.strategies as st
import pytest
from hypothesis import given

from streammerge.config.sizes import parse_bytes

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "K": 10**3,
         "M": 10**6, "G": 10**9, "T": 10**12, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30,
         "TiB": 2**40}  # fmt: skip


@given(st.integers(1, 4000), st.sampled_from(sorted(UNITS)), st.sampled_from(["", " ", "  "]))
def test_whole_number_and_unit_multiply(count: int, unit: str, gap: str) -> None:
    for spelt in (unit, unit.lower(), unit.upper()):
        assert parse_bytes(f"{count}{gap}{spelt}") == count * UNITS[unit]


@given(st.integers(1, 1 << 53))
def test_number_of_bytes_is_kept_exactly(count: int) -> None:
    assert parse_bytes(count) == count
    assert parse_bytes(f"{count}B") == count


@given(st.integers(max_value=0))
def test_number_below_one_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match="size"):
        parse_bytes(count)


@given(
    st.one_of(st.text(), st.floats(), st.integers(), st.none(), st.binary(), st.lists(st.none()))
)
def test_anything_gives_a_positive_size_or_a_value_error(value: object) -> None:
    with contextlib.suppress(ValueError):
        assert parse_bytes(value) > 0
