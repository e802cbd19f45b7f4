"""A device that does what was queued as late as the events allow, or as early.

What is queued on an eager stream runs as soon as whatever it was told to wait for has run; on the
other streams nothing runs before a thread waits for it. A thread that waits lets the others queue
first. So a result is right for every choice of eager streams only if each step waits for all that
it needs, and each missing wait makes it wrong for one of the choices.

`drops` names what the runtime forgets: "record in sent", "wait compute sent", "synchronize sent".
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator

STREAMS = ("in", "compute", "out")
# how long the others may take to queue something
PATIENCE_S = 0.003
POISON = 255


def every_choice() -> Iterator[tuple[str, ...]]:
    """Yield each set of eager streams."""
    for count in range(len(STREAMS) + 1):
        yield from itertools.combinations(STREAMS, count)


@dataclass(eq=False)
class Operation:
    run: Callable[[], object]
    needs: list[Operation]
    is_done: bool = False


@dataclass(eq=False)
class Stream:
    name: str
    queued: deque[Operation] = field(default_factory=deque)
    last: Operation | None = None


@dataclass(eq=False)
class Event:
    name: str
    behind: Operation | None = None


class SimulatedRuntime:
    def __init__(
        self,
        *,
        eager: Iterable[str] = (),
        drops: Collection[str] = (),
        free: int = 1 << 30,
        name: str = "simulated",
    ) -> None:
        self.name = name
        self.seen: set[str] = set()
        self._eager, self._drops, self._free = set(eager), set(drops), free
        self._streams: list[Stream] = []
        self._state = threading.Condition(threading.RLock())
        self._failure: BaseException | None = None
        self.host_bytes = self.device_bytes = self.uploads = 0

    def stream(self, name: str) -> Stream:
        self._streams.append(Stream(name))
        return self._streams[-1]

    def event(self, name: str) -> Event:
        return Event(name)

    def host(self, nbytes: int) -> torch.Tensor:
        self.host_bytes += nbytes
        return torch.full((nbytes,), POISON, dtype=torch.uint8)

    def device(self, nbytes: int) -> torch.Tensor:
        self.device_bytes += nbytes
        return torch.full((nbytes,), POISON, dtype=torch.uint8)

    def upload(self, stream: Stream, values: torch.Tensor) -> torch.Tensor:
        self.uploads += 1
        staged, target = values.clone(), torch.full_like(values, float("nan"))
        self._queue(stream, lambda: target.copy_(staged))
        return target

    def copy(self, stream: Stream, target: torch.Tensor, source: torch.Tensor) -> None:
        self._queue(stream, lambda: target.copy_(source))

    def launch(self, stream: Stream, function: Callable[[], None]) -> None:
        self._queue(stream, function)

    def record(self, stream: Stream, event: Event) -> None:
        if not self._forgets(f"record {stream.name} {event.name}"):
            with self._state:
                event.behind = stream.last

    def wait(self, stream: Stream, event: Event) -> None:
        if not self._forgets(f"wait {stream.name} {event.name}"):
            needs = [] if event.behind is None else [event.behind]
            self._queue(stream, lambda: None, needs)

    def synchronize(self, event: Event) -> None:
        if self._forgets(f"synchronize {event.name}"):
            return
        with self._state:
            wanted = event.behind
            while wanted is not None and not wanted.is_done:
                if not self._state.wait(PATIENCE_S):
                    # nobody else came: they all wait as well
                    self._force(wanted)
            self._raise()

    def free_bytes(self) -> int:
        return self._free

    def close(self) -> None:
        with self._state:
            for stream in self._streams:
                if stream.last is not None:
                    self._force(stream.last)
            self._streams.clear()
            self._raise()

    def _forgets(self, what: str) -> bool:
        with self._state:
            self.seen.add(what)
        return what in self._drops

    def _queue(
        self, stream: Stream, run: Callable[[], object], needs: Collection[Operation] = ()
    ) -> None:
        with self._state:
            stream.last = Operation(run, list(needs))
            stream.queued.append(stream.last)
            self._advance()
            self._state.notify_all()

    def _advance(self) -> None:
        """Run what is ready on eager streams."""
        is_moving = True
        while is_moving:
            is_moving = False
            for stream in self._streams:
                while (
                    stream.name in self._eager
                    and stream.queued
                    and all(need.is_done for need in stream.queued[0].needs)
                ):
                    self._run(stream)
                    is_moving = True

    def _force(self, wanted: Operation) -> None:
        """Run an operation, and then what is ready on eager streams."""
        self._pull(wanted)
        self._advance()
        self._state.notify_all()

    def _pull(self, wanted: Operation) -> None:
        """Run an operation, and before it what it has to wait for, and nothing else."""
        if wanted.is_done:
            return
        stream = next(stream for stream in self._streams if wanted in stream.queued)
        while not wanted.is_done:
            for need in stream.queued[0].needs:
                self._pull(need)
            self._run(stream)

    def _run(self, stream: Stream) -> None:
        operation = stream.queued.popleft()
        try:
            operation.run()
        except BaseException as error:  # noqa: BLE001 (shown to whoever waits)
            self._failure = self._failure or error
        operation.is_done = True

    def _raise(self) -> None:
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure
