"""GPUs that torch drives as `cuda`, NVIDIA's and AMD's."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from streammerge.errors import MemoryBudgetError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["CudaRuntime"]


class CudaRuntime:
    """One GPU, as `streams.Runtime` wants it."""

    def __init__(self, index: int) -> None:
        """Choose a GPU by its number; its context is made with the first memory."""
        self._device = torch.device("cuda", index)
        self.name = torch.cuda.get_device_name(self._device)

    def stream(self, name: str) -> torch.cuda.Stream:  # noqa: ARG002 (CUDA has no use for names)
        """Make a stream."""
        return torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]

    def event(self, name: str) -> torch.cuda.Event:  # noqa: ARG002
        """Make an event whose waiting threads leave the processor to others."""
        return torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]

    def host(self, nbytes: int) -> torch.Tensor:
        """Allocate pinned memory."""
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def device(self, nbytes: int) -> torch.Tensor:
        """Allocate bytes on the GPU; torch aligns them to 512."""
        with self._on(torch.cuda.current_stream(self._device)):
            return torch.empty(nbytes, dtype=torch.uint8, device=self._device)

    def upload(self, stream: torch.cuda.Stream, values: torch.Tensor) -> torch.Tensor:
        """Queue a copy of a tensor to new memory; CUDA stages memory that is not pinned."""
        with self._on(stream):
            return values.to(self._device, non_blocking=True)

    def copy(self, stream: torch.cuda.Stream, target: torch.Tensor, source: torch.Tensor) -> None:
        """Queue a copy."""
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)

    def launch(self, stream: torch.cuda.Stream, function: Callable[[], None]) -> None:
        """Call a function with the stream as the current one."""
        with self._on(stream):
            function()

    @contextmanager
    def _on(self, stream: torch.cuda.Stream) -> Iterator[None]:
        """Make a stream the current one, and a lack of memory an error of ours."""
        try:
            with torch.cuda.stream(stream):
                yield
        except torch.cuda.OutOfMemoryError as error:
            raise MemoryBudgetError(
                "a GPU is out of memory",
                where=self.name,
                got=" ".join(str(error).split())[:200],
                hint="set a smaller max_device_memory, or export_device: cpu",
            ) from error

    def record(self, stream: torch.cuda.Stream, event: torch.cuda.Event) -> None:
        """Let an event stand for what was queued on a stream."""
        event.record(stream)

    def wait(self, stream: torch.cuda.Stream, event: torch.cuda.Event) -> None:
        """Let a stream wait for an event."""
        stream.wait_event(event)

    def synchronize(self, event: torch.cuda.Event) -> None:
        """Wait for an event."""
        event.synchronize()

    def free_bytes(self) -> int:
        """Return the bytes that nobody has, as the driver counts."""
        return torch.cuda.mem_get_info(self._device)[0]

    def close(self) -> None:
        """Wait for everything that was queued."""
        torch.cuda.synchronize(self._device)
