"""Which of several measured settings is taken."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Mapping

    Setting = TypeVar("Setting", bound=Hashable)

__all__ = ["prefer"]

# two runs of one setting differ by about as much
_NOISE = 0.05


def prefer(
    rates: Mapping[Setting, float], *, default: Setting, cost: Callable[[Setting], int]
) -> Setting:
    """Return the fastest setting, or one that is as fast within 5 % and costs less.

    Args:
        rates: Speed of each setting.
        default: What is taken if nothing is faster; it need not have been measured.
        cost: What a setting takes of the machine, such as bytes of buffers.
    """
    fastest = max(rates.values())
    near = [setting for setting, rate in rates.items() if rate >= fastest * (1 - _NOISE)]
    return default if default in near else min(near, key=lambda s: (cost(s), -rates[s]))
