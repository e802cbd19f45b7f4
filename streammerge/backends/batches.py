"""Rows of a block on their way through a slot: which go together, and where each of them is.

In a slot every part begins at a multiple of 256 bytes, so that kernels read 128 bits at a time.
Behind the results are the least and the greatest value of each part, in F64.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

import torch

from streammerge.codecs.tensors import torch_dtype

if TYPE_CHECKING:
    from streammerge.backends.base import Tile
    from streammerge.plan.ops import TensorPlan

__all__ = ["ALIGNMENT", "Batch", "Piece", "cut_tile", "rows_that_fit"]

ALIGNMENT = 256
# the least and the greatest value of a piece, in F64
FLAG_BYTES = 16

Owner = TypeVar("Owner")


@dataclass(slots=True)
class Piece(Generic[Owner]):
    """Rows `[begin, end)` of a tile."""

    tile: Tile
    owner: Owner
    """Whatever the backend knows of its target."""
    begin: int
    end: int
    input_at: int = 0
    """Where it is in a slot."""
    output_at: int = 0

    @property
    def is_last(self) -> bool:
        """Whether it ends the tile."""
        return self.end == self.tile.end

    @property
    def input_bytes(self) -> int:
        """Bytes of its rows as stored."""
        return (self.end - self.begin) * _row_bytes(self.tile.target)[0]

    @property
    def output_bytes(self) -> int:
        """Bytes of its results."""
        return (self.end - self.begin) * _row_bytes(self.tile.target)[1]

    def source(self) -> torch.Tensor:
        """Return the bytes of its rows in the block's buffer."""
        row, _ = _row_bytes(self.tile.target)
        return self._in_buffer(self.tile.source_offset, row)

    def result(self) -> torch.Tensor:
        """Return the bytes of the buffer that its results go to."""
        _, row = _row_bytes(self.tile.target)
        return self._in_buffer(self.tile.output_offset, row)

    def _in_buffer(self, tile_at: int, row_bytes: int) -> torch.Tensor:
        return torch.frombuffer(
            self.tile.buffer,
            dtype=torch.uint8,
            count=(self.end - self.begin) * row_bytes,
            offset=tile_at + (self.begin - self.tile.begin) * row_bytes,
        )

    def rows_in(self, slot: torch.Tensor) -> torch.Tensor:
        """View its rows, (n, columns), in a slot's input."""
        target = self.tile.target
        data = slot[self.input_at : self.input_at + self.input_bytes]
        return data.view(torch_dtype(target.source.dtype)).view(-1, target.columns)

    def rows_out(self, slot: torch.Tensor) -> torch.Tensor:
        """View its results, (n, columns), in a slot's output."""
        target = self.tile.target
        data = slot[self.output_at : self.output_at + self.output_bytes]
        return data.view(torch_dtype(target.dtype)).view(-1, target.columns)


class Batch(Generic[Owner]):
    """Pieces of one block that go through a slot together."""

    def __init__(self, slot_bytes: int) -> None:
        """Begin empty.

        Args:
            slot_bytes: Most bytes of the input, and of the output.
        """
        self.pieces: list[Piece[Owner]] = []
        self.input_bytes = self._flags_at = 0
        self._slot_bytes = slot_bytes

    @property
    def output_bytes(self) -> int:
        """Bytes of all results, and of what is said of them."""
        return self._flags_at + FLAG_BYTES * len(self.pieces)

    def add(self, piece: Piece[Owner]) -> bool:
        """Take a piece; return whether there is room for it."""
        input_end = self.input_bytes + _aligned(piece.input_bytes)
        output_end = self._flags_at + _aligned(piece.output_bytes)
        flags = FLAG_BYTES * (len(self.pieces) + 1)
        if max(input_end, output_end + flags) > self._slot_bytes:
            return False
        piece.input_at, piece.output_at = self.input_bytes, self._flags_at
        self.input_bytes, self._flags_at = input_end, output_end
        self.pieces.append(piece)
        return True

    def fill(self, slot: torch.Tensor) -> None:
        """Copy the rows from the block's buffer to a slot's input."""
        for piece in self.pieces:
            slot[piece.input_at : piece.input_at + piece.input_bytes] = piece.source()

    def drain(self, slot: torch.Tensor) -> list[bool]:
        """Copy the results to the block's buffer; return which are finite."""
        for piece in self.pieces:
            piece.result().copy_(slot[piece.output_at : piece.output_at + piece.output_bytes])
        extremes = self._flags(slot).tolist()
        return [math.isfinite(low) and math.isfinite(high) for low, high in extremes]

    def note_extremes(self, slot: torch.Tensor) -> None:
        """Put the least and the greatest value of each piece behind the results; NaN is both."""
        flags = self._flags(slot)
        for number, piece in enumerate(self.pieces):
            flags[number, 0], flags[number, 1] = torch.aminmax(piece.rows_out(slot))

    def _flags(self, slot: torch.Tensor) -> torch.Tensor:
        return slot[self._flags_at : self.output_bytes].view(torch.float64).view(-1, 2)


def rows_that_fit(target: TensorPlan, slot_bytes: int) -> int:
    """Return how many rows of a target go through a slot together; 0 if none does."""
    return max(0, slot_bytes - ALIGNMENT - FLAG_BYTES) // max(1, *_row_bytes(target))


def cut_tile(tile: Tile, owner: Owner, *, slot_bytes: int) -> list[Piece[Owner]]:
    """Divide a tile into pieces that fit a slot."""
    edges = [*range(tile.begin, tile.end, rows_that_fit(tile.target, slot_bytes)), tile.end]
    return [Piece(tile, owner, begin, end) for begin, end in itertools.pairwise(edges)]


def _row_bytes(target: TensorPlan) -> tuple[int, int]:
    """Return the bytes of a row as stored, and of its result."""
    return target.source.dtype.nbytes(target.columns), target.dtype.nbytes(target.columns)


def _aligned(nbytes: int) -> int:
    return nbytes + -nbytes % ALIGNMENT
