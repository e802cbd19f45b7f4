"""A quantized checkpoint as if it were stored in 16 bits: weights are decoded as they are read.

Where a tensor's bytes would be read from a file, they are decoded from the codes instead, wherever
these lie. What reads, merges and writes need not know.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Protocol

from streammerge.checkpoint.header import StoredTensor
from streammerge.codecs.turned import TurnedWeight

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    import torch

    from streammerge.checkpoint.index import Checkpoint
    from streammerge.checkpoint.reader import FileReader, ReaderPool
    from streammerge.checkpoint.slab import Slab
    from streammerge.codecs.base import Codec, CodedWeight, Extent, Stored
    from streammerge.dtypes import Dtype

__all__ = [
    "READER_BYTES",
    "DecodedFile",
    "DecodedTensor",
    "TileReader",
    "Tiled",
    "decode_checkpoint",
]

# decoded at a time
CHUNK_VALUES = 1 << 19
# of one reader: codes, values in float32 and what is computed on the way, and what tiles share
READER_BYTES = 24 * CHUNK_VALUES
# what a layer that multiplies codes scales its inputs and caches by
_OF_ACTIVATIONS = (".input_scale", ".input_global_scale", ".input_zero_point", ".activation_scale",
                   ".k_scale", ".v_scale", ".q_scale", ".output_scale")  # fmt: skip


@dataclass(frozen=True, slots=True)
class DecodedFile:
    """What stands in the place of a file: the values of one weight, row after row."""

    weight: CodedWeight

    def open_reader(self, pool: ReaderPool) -> FileReader:
        """Return a reader that takes codes from the files of a pool."""
        return _DecodingReader(self.weight, pool)


@dataclass(frozen=True, slots=True)
class DecodedTensor(StoredTensor):
    """A weight that is stored as codes."""

    weight: CodedWeight

    @classmethod
    def of(cls, weight: CodedWeight) -> DecodedTensor:
        """Return what a weight stands for, as if it were where its first part is."""
        first = weight.parts[0].tensor
        assert isinstance(first, StoredTensor)
        return cls(weight.name, weight.dtype, weight.shape, first.path, 0, weight)

    @property
    def file(self) -> DecodedFile:
        """What a reader opens."""
        return DecodedFile(self.weight)

    @property
    def stored_bytes(self) -> int:
        """Bytes of the codes and what belongs to them."""
        return sum(part.tensor.nbytes for part in self.weight.parts)

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files that its bytes depend on."""
        found = [part.tensor for part in self.weight.parts]
        return tuple(dict.fromkeys(t.path for t in found if isinstance(t, StoredTensor)))


def read_whole(pool: ReaderPool) -> Callable[[Stored], bytes]:
    """Return what reads the few small tensors that hold shapes."""

    def read(tensor: Stored) -> bytes:
        assert isinstance(tensor, StoredTensor)
        buffer = bytearray(tensor.nbytes)
        pool.read_tensor(tensor, memoryview(buffer))
        return bytes(buffer)

    return read


def decode_checkpoint(
    base: Checkpoint, codec: Codec, pool: ReaderPool, *, is_turned: Callable[[str], bool]
) -> Checkpoint:
    """Return a checkpoint whose weights are decoded when they are read.

    Args:
        base: The quantized checkpoint.
        codec: Its format.
        pool: Reads the few small tensors that hold shapes.
        is_turned: Tells by its name whether a weight is (inputs, outputs) where it is no codes.

    Raises:
        CheckpointError: Codes are not complete, or do not fit together.
        UnsupportedError: A weight is stored in a variety that cannot be decoded.
    """
    found = codec.find(base.tensors.values(), read_whole(pool))
    # where its first part is, so that the order of the file is kept
    firsts = {weight.parts[0].tensor.name: weight for weight in found.weights}
    plain = {tensor.name for tensor in found.plain}
    tensors: dict[str, StoredTensor] = {}
    for name, tensor in base.tensors.items():
        if name in firsts:
            weight = firsts[name]
            if is_turned(weight.name):
                weight = TurnedWeight.of(weight)
            tensors[weight.name] = DecodedTensor.of(weight)
        elif name in plain and not name.endswith(_OF_ACTIVATIONS):
            tensors[name] = tensor
    return replace(base, tensors=tensors)


class Tiled(Protocol):
    """A weight whose rows are made in tiles."""

    @property
    def dtype(self) -> Dtype:
        """Of the values."""

    @property
    def columns(self) -> int:
        """Values of a row."""

    @property
    def matrix_rows(self) -> int:
        """Rows of one matrix."""

    @property
    def row_step(self) -> int:
        """Multiples of this are where tiles may begin and end."""


class TileReader(ABC):
    """Reads bytes of values that are made tile by tile."""

    chunk_values: ClassVar[int] = CHUNK_VALUES
    """How many values are made at a time, if a tile is not more."""

    def __init__(self, tiled: Tiled) -> None:
        self._tiled = tiled
        self._row_bytes = tiled.dtype.nbytes(tiled.columns)

    @abstractmethod
    def make(self, begin: int, end: int) -> torch.Tensor:
        """Return the rows of a tile, contiguous, in the weight's dtype."""

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill a buffer with the bytes from `offset` of the values."""
        from streammerge.codecs.tensors import bytes_of  # noqa: PLC0415 (it imports torch)

        end = offset + len(buffer)
        row = self._row_bytes
        for first, last in self._tiles(offset // row, -(-end // row)):
            data = bytes_of(self.make(first, last))
            start = first * row
            begin, stop = max(offset, start), min(end, last * row)
            buffer[begin - offset : stop - offset] = data[begin - start : stop - start]

    def read_slab(self, offset: int, slab: Slab, *, at: int, nbytes: int) -> None:
        """Put bytes from `offset` of the values into a slab."""
        self.read_into(offset, slab.view[at : at + nbytes])

    def forget(self, offset: int, nbytes: int) -> None:  # noqa: B027 (its own reads forget)
        """Do nothing: what a tile is made of lies among what others are made of."""

    def close(self) -> None:  # noqa: B027 (few share anything)
        """Release what tiles share."""

    def _tiles(self, begin: int, end: int) -> Iterator[tuple[int, int]]:
        """Cut rows, and as many as it takes to make them tiles, into tiles."""
        tiled = self._tiled
        step = tiled.row_step
        most = max(1, self.chunk_values // max(tiled.columns, 1) // step) * step
        for matrix in range(begin // tiled.matrix_rows, -(-end // tiled.matrix_rows)):
            start = matrix * tiled.matrix_rows
            stop = min(end, start + tiled.matrix_rows)
            first = max(begin, start)
            first -= (first - start) % step
            while first < stop:
                last = min(first + most, start + tiled.matrix_rows)
                # no more than is asked for
                wanted = stop - start + -(stop - start) % step
                last = min(last, start + min(wanted, tiled.matrix_rows))
                yield first, last
                first = last


class _DecodingReader(TileReader):
    """Reads bytes of a coded weight's values."""

    def __init__(self, weight: CodedWeight, pool: ReaderPool) -> None:
        super().__init__(weight)
        self._weight, self._pool = weight, pool
        self._shared: dict[str, bytes] = {}

    def close(self) -> None:
        """Forget what tiles share."""
        self._shared.clear()

    def make(self, begin: int, end: int) -> torch.Tensor:
        """Decode rows."""
        weight = self._weight
        data = {extent.role: self._read(extent) for extent in weight.extents(begin, end)}
        return weight.decode(begin, end, data)

    def _read(self, extent: Extent) -> memoryview:
        if extent.role in self._shared:
            return memoryview(self._shared[extent.role])
        tensor = self._weight.part(extent.role)
        assert isinstance(tensor, StoredTensor)
        data = bytearray(extent.total_bytes)
        view = memoryview(data)
        reader = self._pool.reader(tensor.file)
        for number in range(extent.count):
            run = view[number * extent.nbytes : (number + 1) * extent.nbytes]
            reader.read_into(tensor.offset + extent.offset + number * extent.stride, run)
        if extent.is_shared:
            self._shared[extent.role] = bytes(data)
        return view
