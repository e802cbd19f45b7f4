"""Byte sizes as users write them."""

from __future__ import annotations

import pytest

from streammerge.config.sizes import parse_bytes


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("5GB", 5_000_000_000),
        ("512MB", 512_000_000),
        ("1.5GiB", 1_610_612_736),
        ("5gb", 5_000_000_000),
        (" 7 kib ", 7168),
        ("3K", 3000),
        ("3M", 3_000_000),
        ("2G", 2_000_000_000),
        ("1T", 10**12),
        ("1TB", 10**12),
        ("1TiB", 2**40),
        ("1MiB", 2**20),
        ("9B", 9),
        ("42", 42),
        (42, 42),
        (42.4, 42),
    ],
)
def test_size_is_read(text: object, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [(5, 5 * 10**9), (0.5, 5 * 10**8), ("5", 5 * 10**9), ("5GB", 5 * 10**9), ("5B", 5)],
)
def test_bare_number_counts_the_given_unit(value: object, expected: int) -> None:
    assert parse_bytes(value, number_unit=10**9) == expected


@pytest.mark.parametrize(
    "value",
    ["", "GB", "5XB", "5 G B", "-5GB", "5GBGB", "1e3", "0x10", "nan", "inf", True, False, None, [5],
     float("nan"), float("inf"), -1],
)  # fmt: skip
def test_what_is_not_a_size_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="a size "):
        parse_bytes(value)


@pytest.mark.parametrize("value", [0, 0.0, "0", "0GB", "0.4", 0.4, 0.75])
def test_nothing_is_not_a_size(value: object) -> None:
    with pytest.raises(ValueError, match="a size "):
        parse_bytes(value)


def test_size_beyond_every_float_is_refused() -> None:
    with pytest.raises(ValueError, match="size"):
        parse_bytes("9" * 400 + "GB")
