"""Rows of a matrix in a file, written and read by number, none of which stay in memory."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch

from streammerge.codecs.tensors import bytes_of

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["SpilledRows"]


class SpilledRows:
    """(rows, columns) in a temporary file, zeros at first.

    Rows are transferred one by one: mapped, each would bring the pages around it into the memory
    of the process.
    """

    def __init__(self, path: Path, *, columns: int, dtype: torch.dtype) -> None:
        """Create the file, and delete its name: it is gone when it is closed, however that comes.

        Args:
            path: A name that nothing else has.
            columns: Values of a row.
            dtype: Of the values.
        """
        self._columns, self._dtype = columns, dtype
        self._row_bytes = columns * dtype.itemsize
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        path.unlink()

    def resize(self, rows: int) -> None:
        """Have this many rows."""
        os.ftruncate(self._file, rows * self._row_bytes)

    def write(self, begin: int, rows: torch.Tensor) -> None:
        """Write neighbouring rows, (n, columns) of any float dtype, from row `begin` on."""
        data = bytes_of(rows.to(self._dtype).contiguous())
        offset = begin * self._row_bytes
        while data:
            done = os.pwrite(self._file, data, offset)
            data, offset = data[done:], offset + done

    def read(self, indices: torch.Tensor) -> torch.Tensor:
        """Return some rows, (len(indices), columns)."""
        found = torch.empty(len(indices), self._columns, dtype=self._dtype)
        views = bytes_of(found)
        for place, index in enumerate(indices.tolist()):
            view = views[place * self._row_bytes : (place + 1) * self._row_bytes]
            got = os.preadv(self._file, [view], index * self._row_bytes)
            if got != self._row_bytes:
                msg = f"row {index} is not there: {got} of {self._row_bytes} bytes"
                raise OSError(msg)
        return found

    def add(self, indices: torch.Tensor, values: torch.Tensor) -> None:
        """Add to some rows, each named once."""
        total = self.read(indices) + values
        for place, index in enumerate(indices.tolist()):
            self.write(index, total[place : place + 1])

    def close(self) -> None:
        """Let the file go."""
        os.close(self._file)
