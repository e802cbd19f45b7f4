"""Queues between the stages of a run, which end at once when a stage fails."""

from __future__ import annotations

import threading
from collections import deque
from typing import Generic, TypeVar

__all__ = ["Channel", "InOrder", "Stopped"]

_T = TypeVar("_T")


class Stopped(Exception):  # noqa: N818 (a signal between stages, not an error)
    """Another stage failed."""


class Channel(Generic[_T]):
    """A queue that can be stopped from either side."""

    def __init__(self) -> None:
        self._items: deque[_T] = deque()
        self._ready = threading.Condition()
        self._is_stopped = False

    def put(self, item: _T) -> None:
        """Add an item."""
        with self._ready:
            self._items.append(item)
            self._ready.notify()

    def get(self) -> _T:
        """Wait for an item.

        Raises:
            Stopped: The run failed.
        """
        with self._ready:
            while not self._items and not self._is_stopped:
                self._ready.wait()
            if self._is_stopped:
                raise Stopped
            return self._items.popleft()

    def stop(self) -> None:
        """Wake whoever waits."""
        with self._ready:
            self._is_stopped = True
            self._ready.notify_all()


class InOrder(Generic[_T]):
    """A queue that gives numbered items in the order of their numbers, from 0."""

    def __init__(self) -> None:
        self._items: dict[int, _T] = {}
        self._next = 0
        self._total: int | None = None
        self._ready = threading.Condition()
        self._is_stopped = False

    def put(self, number: int, item: _T) -> None:
        """Add an item."""
        with self._ready:
            self._items[number] = item
            self._ready.notify_all()

    def close(self, total: int) -> None:
        """Say how many items there are in all."""
        with self._ready:
            self._total = total
            self._ready.notify_all()

    def get(self) -> _T | None:
        """Wait for the next item; None after the last.

        Raises:
            Stopped: The run failed.
        """
        with self._ready:
            while not self._is_stopped:
                if self._next in self._items:
                    self._next += 1
                    return self._items.pop(self._next - 1)
                if self._next == self._total:
                    return None
                self._ready.wait()
            raise Stopped

    def stop(self) -> None:
        """Wake whoever waits."""
        with self._ready:
            self._is_stopped = True
            self._ready.notify_all()
