"""Hidden states of the calibration samples, in mapped files: they never all have to be in memory.

There are two files, which take turns: a layer reads one and writes the other. What a finished layer
wrote is flushed before it counts, so that a run that was stopped goes on from there.
"""

from __future__ import annotations

import mmap
import os
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["HiddenStates"]


class HiddenStates:
    """The states before layer `number` are in file `number % 2`."""

    def __init__(
        self, folder: Path, *, shape: tuple[int, int, int], dtype: torch.dtype = torch.float32
    ) -> None:
        """Create or open the files.

        Args:
            folder: Where they are.
            shape: (samples, tokens, hidden).
            dtype: Of the states.
        """
        self._shape, self._dtype = shape, dtype
        self._sample = shape[1] * shape[2]
        self._paths = [folder / f"hidden{number}.bin" for number in range(2)]
        self._maps: list[mmap.mmap] = []
        for path in self._paths:
            with path.open("a+b") as file:
                os.truncate(file.fileno(), self.nbytes)
                self._maps.append(mmap.mmap(file.fileno(), self.nbytes))

    @classmethod
    def are_there(cls, folder: Path, *, shape: tuple[int, int, int], itemsize: int = 4) -> bool:
        """Tell whether a run before this one left both files, of the right size."""
        nbytes = shape[0] * shape[1] * shape[2] * itemsize
        paths = [folder / f"hidden{number}.bin" for number in range(2)]
        return all(path.exists() and path.stat().st_size == nbytes for path in paths)

    @property
    def nbytes(self) -> int:
        """Bytes of one file."""
        return self._shape[0] * self._sample * self._dtype.itemsize

    @property
    def samples(self) -> int:
        """How many samples there are."""
        return self._shape[0]

    def read(self, layer: int, sample: int) -> torch.Tensor:
        """Return a copy of the states of one sample before a layer, (1, tokens, hidden)."""
        found = self._view(layer, sample).clone()
        self._drop(layer, sample)
        return found

    def write(self, layer: int, sample: int, states: torch.Tensor) -> None:
        """Store the states of one sample before a layer, (1, tokens, hidden)."""
        self._view(layer, sample).copy_(states)
        self._drop(layer, sample)

    def flush(self, layer: int) -> None:
        """Make the states before a layer durable."""
        self._maps[layer % 2].flush()

    def close(self) -> None:
        """Release the files."""
        for mapped in self._maps:
            mapped.close()
        self._maps.clear()

    def remove(self) -> None:
        """Release the files, and delete them."""
        self.close()
        for path in self._paths:
            path.unlink(missing_ok=True)

    def _view(self, layer: int, sample: int) -> torch.Tensor:
        return torch.frombuffer(
            self._maps[layer % 2],
            dtype=self._dtype,
            count=self._sample,
            offset=sample * self._sample * self._dtype.itemsize,
        ).view(1, *self._shape[1:])

    def _drop(self, layer: int, sample: int) -> None:
        """Let pages that are done with count as the page cache's, not as ours."""
        size = self._sample * self._dtype.itemsize
        # whole pages inside the sample: its neighbours' are theirs to drop
        begin = -(-sample * size // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (sample + 1) * size // mmap.PAGESIZE * mmap.PAGESIZE
        if end > begin:
            self._maps[layer % 2].madvise(mmap.MADV_DONTNEED, begin, end - begin)
