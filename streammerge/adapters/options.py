"""Read the options of adapter_config.json, which nobody vouches for: each with its type checked."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from streammerge.errors import AdapterError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

__all__ = ["Choices", "Options", "first_match"]

# of ranks and alphas; NaN and Inf are above it too
MAX_NUMBER = 1e9
# PEFT's rule (peft.utils.other.get_pattern_key): a pattern matches the whole path, or its end after
# a dot; the first one in the order of the file wins
MAX_PATTERN_CHARACTERS = 1000
_NESTED_QUANTIFIERS = re.compile(r"[+*}]\)+[+*{]")
_PATTERN = r"(.*\.)?({})$"


@dataclass(frozen=True, slots=True)
class Choices:
    """What the user says of adapters that their files do not."""

    base_is_residual: bool = False
    """The base is the one that training went on with, so nothing has to be taken off it."""
    reproduces_bugs: bool = False
    """Merge as PEFT does where PEFT is known to be wrong."""


@dataclass(frozen=True, slots=True)
class Options:
    """The JSON object, read by key. An absent key and null mean the default."""

    raw: Mapping[str, Any]
    path: Path
    choices: Choices = Choices()

    def get(self, key: str) -> Any:
        """Return a value as it stands."""
        return self.raw.get(key)

    def flag(self, key: str, *, default: bool = False) -> bool:
        """Return true or false.

        Raises:
            AdapterError: It is neither.
        """
        value = self.raw.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.bad(key, expected="true or false")
        return default if value is None else value

    def text(self, key: str) -> str | None:
        """Return text, or None.

        Raises:
            AdapterError: It is something else.
        """
        value = self.raw.get(key)
        if value is not None and not isinstance(value, str):
            raise self.bad(key, expected="text")
        return value

    def choice(self, key: str, *choices: str) -> str:
        """Return one of a few words, the first of which is the default.

        Raises:
            AdapterError: It is none of them.
        """
        value = self.text(key)
        if value is not None and value not in choices:
            raise self.bad(key, expected=" or ".join(choices))
        return choices[0] if value is None else value

    def count(self, key: str, default: int | None = None, *, least: int = 1) -> int:
        """Return a whole number.

        Args:
            key: The option.
            default: What an absent key means; None if it has to be there.
            least: The smallest number allowed.

        Raises:
            AdapterError: It is something else, or absurd.
        """
        value = self.raw.get(key)
        value = default if value is None else value
        is_whole = isinstance(value, int) and not isinstance(value, bool)
        if not is_whole or not least <= value <= MAX_NUMBER:  # type: ignore[operator]
            wanted = "a positive whole number" if least == 1 else f"a whole number from {least}"
            raise self.bad(key, expected=wanted)
        return int(value)  # type: ignore[arg-type]

    def number(self, key: str, default: float | None = None) -> Any:
        """Return a number, as a float or an int.

        Raises:
            AdapterError: It is something else, or absurd.
        """
        value = self.raw.get(key)
        value = default if value is None else value
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not abs(value) <= MAX_NUMBER:  # type: ignore[arg-type]
            raise self.bad(key, expected="a number")
        return value

    def names(self, key: str) -> tuple[str, ...]:
        """Return a list of names; a single one may stand alone.

        Raises:
            AdapterError: It is something else.
        """
        names = self.raw.get(key) or []
        names = [names] if isinstance(names, str) else names
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise self.bad(key, expected="a list of names")
        return tuple(names)

    def pattern(self, key: str, *, whole: bool) -> dict[str, Any]:
        """Return a map of patterns to numbers, in the order of the file.

        Args:
            key: The option.
            whole: Whether the numbers are whole and positive.

        Raises:
            AdapterError: It is something else, or a pattern is not sound.
        """
        patterns = self.raw.get(key) or {}
        if not isinstance(patterns, dict):
            raise self.bad(key, expected="a map")
        for pattern in patterns:
            if len(pattern) > MAX_PATTERN_CHARACTERS or _NESTED_QUANTIFIERS.search(pattern):
                raise AdapterError(
                    f"{key} holds a pattern that could take for ever to match",
                    where=self.path,
                    got=pattern[:80],
                    hint="write the names of the modules instead",
                )
            try:
                re.compile(_PATTERN.format(pattern))
            except (re.error, OverflowError, RecursionError) as error:
                message = f"{pattern!r}: {error}"
                raise AdapterError(f"bad {key}", where=self.path, got=message) from error
            inner = Options(patterns, self.path)
            _ = inner.count(pattern) if whole else inner.number(pattern)
        return patterns

    def bad(self, key: str, *, expected: str) -> AdapterError:
        """Say that an option has another value than it may have."""
        got = repr(self.raw.get(key))[:80]
        return AdapterError(f"bad {key}", where=self.path, expected=expected, got=got)


def first_match(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """Return the value of the first pattern that matches a module's path, or the default."""
    for pattern, value in patterns.items():
        if re.match(_PATTERN.format(pattern), module):
            return value
    return default
