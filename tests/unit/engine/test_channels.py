"""Queues between stages: order, and an end for whoever waits."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from streammerge.engine.channels import Channel, InOrder, Stopped


@pytest.mark.parametrize("kind", [Channel, InOrder])
def test_a_stop_wakes_everyone_who_waits(kind: type[Channel[int] | InOrder[int]]) -> None:
    channel = kind()
    with ThreadPoolExecutor(3) as pool:
        waiting = [pool.submit(channel.get) for _ in range(3)]
        time.sleep(0.02)
        assert not any(future.done() for future in waiting)
        channel.stop()
        for future in waiting:
            with pytest.raises(Stopped):
                future.result(timeout=60)


def test_a_stopped_channel_gives_nothing_more() -> None:
    channel: Channel[int] = Channel()
    channel.put(1)
    channel.stop()
    channel.put(2)
    with pytest.raises(Stopped):
        channel.get()
    ordered: InOrder[int] = InOrder()
    ordered.put(0, 1)
    ordered.close(1)
    ordered.stop()
    with pytest.raises(Stopped):
        ordered.get()


def test_a_channel_gives_each_item_once_and_first_in_first_out() -> None:
    channel: Channel[int] = Channel()
    for number in range(5):
        channel.put(number)
    assert [channel.get() for _ in range(5)] == [0, 1, 2, 3, 4]
    with ThreadPoolExecutor(4) as pool:
        got = [pool.submit(channel.get) for _ in range(100)]
        for number in range(100):
            channel.put(number)
        assert sorted(future.result(timeout=60) for future in got) == list(range(100))


def test_items_come_in_their_order_from_any_thread() -> None:
    channel: InOrder[str] = InOrder()
    start = threading.Barrier(4)

    def put(first: int) -> None:
        start.wait(60)
        # each thread backwards: the first one comes last
        for number in range(96 + first, -1, -4):
            channel.put(number, f"item {number}")

    with ThreadPoolExecutor(4) as pool:
        for first in range(4):
            pool.submit(put, first)
        assert [channel.get() for _ in range(100)] == [f"item {number}" for number in range(100)]
    channel.close(100)
    assert channel.get() is None
    assert channel.get() is None


def test_the_end_is_known_before_the_last_item() -> None:
    channel: InOrder[str] = InOrder()
    channel.close(2)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(lambda: [channel.get() for _ in range(3)])
        channel.put(1, "b")
        time.sleep(0.02)
        assert not waiting.done()
        channel.put(0, "a")
        assert waiting.result(timeout=60) == ["a", "b", None]


def test_an_end_wakes_everyone_who_waits() -> None:
    channel: InOrder[str] = InOrder()
    with ThreadPoolExecutor(3) as pool:
        waiting = [pool.submit(channel.get) for _ in range(3)]
        time.sleep(0.02)
        channel.close(0)
        assert [future.result(timeout=60) for future in waiting] == [None] * 3
