"""The schedule of the ring on a device that is as late, or as early, as the events allow."""

from __future__ import annotations

import functools
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
import torch
from simulated import SimulatedRuntime, every_choice

from streammerge.backends.streams import Job, Ring

if TYPE_CHECKING:
    from collections.abc import Collection

CHOICES = list(every_choice())
THREADS = 8
JOBS = 40
WAITS = [
    "record in sent",
    "record compute computed",
    "record out returned",
    "wait in computed",
    "wait compute sent",
    "wait compute returned",
    "wait out computed",
    "synchronize sent",
    "synchronize returned",
]


class NoLock:
    def acquire(self) -> None:
        pass

    def release(self) -> None:
        pass


def run(
    runtime: SimulatedRuntime, *, slots: int, has_lock: bool = True, is_upload_ahead: bool = True
) -> int:
    """Take jobs through a ring, each with a factor of its own; return how many came out wrong."""
    ring = Ring(runtime, slots=slots, slot_bytes=64)
    if not is_upload_ahead:
        ring.upload = functools.partial(  # type: ignore[method-assign]
            runtime.upload, ring._copies_out
        )
    if not has_lock:
        free = [ring._free.get() for _ in range(slots)]
        for slot in free:
            slot.taken = NoLock()  # type: ignore[assignment]
            ring._free.put(slot)

    def one(number: int) -> bool:
        values = torch.arange(number, number + 40 + number % 24, dtype=torch.uint8)
        factor = ring.upload(torch.tensor([number % 13 + 1.0]))
        expected = values * (number % 13 + 1)
        got: list[torch.Tensor] = []

        def compute(given: torch.Tensor, result: torch.Tensor) -> None:
            result.copy_(given * factor.nan_to_num(nan=99.0).to(torch.uint8))

        ring.run(
            Job(
                len(values), len(values),
                fill=lambda slot: slot.copy_(values),
                compute=compute,
                drain=lambda slot: got.append(slot.clone()),
            )
        )  # fmt: skip
        return not torch.equal(got[0], expected)

    with ThreadPoolExecutor(THREADS) as pool:
        wrong = sum(pool.map(one, range(JOBS)))
    ring.close()
    return wrong


@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("eager", CHOICES, ids="-".join)
def test_every_job_is_right_whenever_the_device_runs_it(eager: tuple[str, ...], slots: int) -> None:
    runtime = SimulatedRuntime(eager=eager)
    assert run(runtime, slots=slots) == 0
    # the list that is mutated below is all there is
    assert runtime.seen == set(WAITS)


def wrong_for_any(drops: Collection[str] = (), **options: Any) -> bool:
    return any(
        run(SimulatedRuntime(eager=eager, drops=drops), slots=slots, **options)
        for _ in range(3)
        for slots in (1, 2)
        for eager in CHOICES
    )


@pytest.mark.parametrize("drop", WAITS)
def test_whatever_is_not_waited_for_gives_a_wrong_result(drop: str) -> None:
    assert wrong_for_any([drop])


def test_an_upload_that_does_not_go_ahead_gives_a_wrong_result() -> None:
    assert wrong_for_any(is_upload_ahead=False)


def test_results_that_were_not_taken_are_not_overwritten() -> None:
    assert wrong_for_any(has_lock=False)


def test_blocks_are_on_their_way_at_the_same_time() -> None:
    # with one slot two jobs share it: one is filled while the other's results are taken
    runtime = SimulatedRuntime(eager=("in", "compute", "out"))
    ring = Ring(runtime, slots=1, slot_bytes=8)
    meet = threading.Barrier(2)

    def job(number: int) -> Job:
        is_first = number == 0
        return Job(
            8, 8,
            fill=lambda slot: slot.fill_(number) if is_first else meet.wait(60),
            compute=lambda given, result: result.copy_(given),
            drain=lambda slot: meet.wait(60) if is_first else slot.sum(),
        )  # fmt: skip

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(ring.run, job(0))
        second = pool.submit(ring.run, job(1))
        first.result(60)
        second.result(60)


@pytest.mark.parametrize("step", ["fill", "compute", "drain"])
def test_a_failure_in_one_job_leaves_the_slot_to_the_next(step: str) -> None:
    runtime = SimulatedRuntime()
    ring = Ring(runtime, slots=1, slot_bytes=8)

    def fail(*_: object) -> None:
        raise ValueError(step)

    def keep(*_: object) -> None:
        pass

    steps: dict[str, Any] = dict.fromkeys(("fill", "compute", "drain"), keep)
    with pytest.raises(ValueError, match=step):
        ring.run(Job(8, 8, **{**steps, step: fail}))
    ring.run(Job(8, 8, **steps))
    ring.close()
