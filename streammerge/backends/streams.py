"""Blocks through one device on three streams: in, compute, out, in a ring of slots.

A slot is memory on both sides. A block's way through it, and what each step waits for:

    fill       host      until the bytes of the block before have left        (sent)
    copy in    stream    until the block before was computed                  (computed)
    compute    stream    until its bytes are there                            (sent)
                         until the results before have left                   (returned)
    copy out   stream    until it was computed                                (computed)
                         until the results before were taken                  (taken, a lock)
    drain      host      until its results are there                          (returned)

The slot is free for the next block once the copy out has been queued, so that two blocks share it:
one is filled while the other is drained. Which thread brings a block does not matter: blocks of
different slots depend on nothing of each other, and an event is recorded by a slot's owner only.

The device is behind `Runtime`, so that the schedule can be run on a pretended one, which does what
was queued as late, or as early, as the events allow.
"""

from __future__ import annotations

import queue
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

__all__ = ["Job", "Ring", "Runtime"]


class Runtime(Protocol):
    """One device: memory, streams and events, as CUDA means them.

    Streams and events are known by handles. What is queued on a stream runs in its order, and after
    what the stream was told to wait for; an event stands for what it was recorded behind last.
    Several threads may use it.
    """

    name: str
    """Of the device, for notes and profiles."""

    def stream(self, name: str) -> Any:
        """Make a stream."""

    def event(self, name: str) -> Any:
        """Make an event; until it is recorded, nobody waits for it."""

    def host(self, nbytes: int) -> torch.Tensor:
        """Allocate bytes that copies reach without staging."""

    def device(self, nbytes: int) -> torch.Tensor:
        """Allocate bytes on the device."""

    def upload(self, stream: Any, values: torch.Tensor) -> torch.Tensor:
        """Queue a copy of a tensor to new memory on the device; the tensor may go at once."""

    def copy(self, stream: Any, target: torch.Tensor, source: torch.Tensor) -> None:
        """Queue a copy between the memory of `host` and `device`."""

    def launch(self, stream: Any, function: Callable[[], None]) -> None:
        """Queue what a function does with tensors of the device."""

    def record(self, stream: Any, event: Any) -> None:
        """Let an event stand for everything that was queued on a stream until now."""

    def wait(self, stream: Any, event: Any) -> None:
        """Let what is queued on a stream from now on wait for an event."""

    def synchronize(self, event: Any) -> None:
        """Wait in the calling thread for an event."""

    def free_bytes(self) -> int:
        """Return the bytes of the device that nobody has."""

    def close(self) -> None:
        """Wait for everything that was queued."""


@dataclass(frozen=True, slots=True)
class Job:
    """What goes through a slot at one time."""

    input_bytes: int
    output_bytes: int
    fill: Callable[[torch.Tensor], None]
    """Writes the input, (input_bytes,) in the host's memory."""
    compute: Callable[[torch.Tensor, torch.Tensor], None]
    """Makes the output of the input, both on the device."""
    drain: Callable[[torch.Tensor], None]
    """Reads the output, (output_bytes,) in the host's memory."""


class _Slot:
    def __init__(self, runtime: Runtime, host: torch.Tensor, device: torch.Tensor) -> None:
        self.host_in, self.host_out = host.chunk(2)
        self.device_in, self.device_out = device.chunk(2)
        self.sent = runtime.event("sent")
        self.computed = runtime.event("computed")
        self.returned = runtime.event("returned")
        self.taken = threading.Lock()


class Ring:
    """The slots of one device, which threads take in turn."""

    def __init__(self, runtime: Runtime, *, slots: int, slot_bytes: int) -> None:
        """Allocate the slots.

        Args:
            runtime: The device.
            slots: How many.
            slot_bytes: Most bytes of a job's input, and of its output, a multiple of 256. A slot
                has both twice: on the host and on the device.
        """
        self.runtime = runtime
        self.slot_bytes = slot_bytes
        self._copies_in = runtime.stream("in")
        self._computing = runtime.stream("compute")
        self._copies_out = runtime.stream("out")
        self._free: queue.SimpleQueue[_Slot] = queue.SimpleQueue()
        # in one piece: allocators of pinned memory round each up to a power of two
        host, device = (take(slots * 2 * slot_bytes) for take in (runtime.host, runtime.device))
        for parts in zip(host.chunk(slots), device.chunk(slots), strict=True):
            self._free.put(_Slot(runtime, *parts))
        # so that no kernel is compiled twice, and one block has intermediate values at a time
        self._launching = threading.Lock()

    def upload(self, values: torch.Tensor) -> torch.Tensor:
        """Queue a copy of a tensor to the device, where every job that is run later finds it.

        It goes ahead of the jobs' bytes, which their computations wait for.
        """
        uploaded: torch.Tensor = self.runtime.upload(self._copies_in, values)
        return uploaded

    def run(self, job: Job) -> None:
        """Take a job through a slot; return when its output has been drained."""
        slot = self._free.get()
        try:
            self._queue(job, slot)
        finally:
            self._free.put(slot)
        try:
            self.runtime.synchronize(slot.returned)
            job.drain(slot.host_out[: job.output_bytes])
        finally:
            slot.taken.release()

    def _queue(self, job: Job, slot: _Slot) -> None:
        """Queue a job; its output is the caller's until he releases `taken`."""
        runtime = self.runtime
        given, result = slot.device_in[: job.input_bytes], slot.device_out[: job.output_bytes]
        runtime.synchronize(slot.sent)
        job.fill(slot.host_in[: job.input_bytes])
        runtime.wait(self._copies_in, slot.computed)
        runtime.copy(self._copies_in, given, slot.host_in[: job.input_bytes])
        runtime.record(self._copies_in, slot.sent)
        with self._launching:
            runtime.wait(self._computing, slot.sent)
            runtime.wait(self._computing, slot.returned)
            runtime.launch(self._computing, lambda: job.compute(given, result))
            runtime.record(self._computing, slot.computed)
        slot.taken.acquire()
        try:
            runtime.wait(self._copies_out, slot.computed)
            runtime.copy(self._copies_out, slot.host_out[: job.output_bytes], result)
            runtime.record(self._copies_out, slot.returned)
        except BaseException:
            slot.taken.release()
            raise

    def close(self) -> None:
        """Wait for what was queued."""
        self.runtime.close()
