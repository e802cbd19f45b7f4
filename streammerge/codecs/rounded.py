"""A checkpoint in 16 bits as an adapter saw it whose training had it in NF4 (QLoRA).

Training with a 4-bit base computes with what the codes stand for: `W_q = decode(encode(W))`. Where
a tensor's bytes would be read from a file, they are read, encoded and decoded instead, with the
bits of bitsandbytes: blocks of 64 values, and in double quantization blocks of 256 of their absmax
less its mean. The mean is that of the whole weight, which is why a weight is looked at once before
its first row is given out; what that yields, 1.02 bytes for 64 values, is kept for the last few.

W is encoded as stored and W_q has its dtype: that is what bitsandbytes decodes to where a model is
loaded in the dtype of its checkpoint.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar

from streammerge.checkpoint.header import StoredTensor
from streammerge.codecs.bnb4 import NESTED_BLOCK
from streammerge.codecs.decoded import TileReader
from streammerge.dtypes import Dtype
from streammerge.errors import UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    import torch

    from streammerge.checkpoint.index import Checkpoint
    from streammerge.checkpoint.reader import FileReader, ReaderPool
    from streammerge.codecs.bnb4 import QuantType

__all__ = ["Absmax", "AbsmaxStore", "RoundedTensor", "RoundedWeight", "round_checkpoint"]

BLOCK = 64
DTYPES = (Dtype.BF16, Dtype.F16, Dtype.F32)
# rounded at a time
CHUNK_VALUES = 1 << 18
# a value as stored, turned, in float32, its magnitude, scaled, its place in the table in 8 bytes,
# what it becomes, and that in the dtype of the weight
VALUE_BYTES = 36
# blocks whose absmax is quantized at a time, and what it takes for each: less its mean, padded,
# scaled, as a step, and as words of 8 bytes
FINISH_BLOCKS = NESTED_BLOCK << 10
FINISH_BYTES = 32


@dataclass(frozen=True, slots=True)
class RoundedWeight:
    """A matrix that is read as what its codes stand for."""

    source: StoredTensor
    """(N, K), or (K, N) if it is turned."""
    is_turned: bool
    """Whether the layer keeps it transposed, as GPT-2's do; codes are of (N, K)."""
    is_nested: bool
    """Whether absmax is quantized too."""
    quant_type: QuantType = "nf4"

    @property
    def dtype(self) -> Dtype:
        """Of the values."""
        return self.source.dtype

    @property
    def columns(self) -> int:
        """Values of a stored row."""
        return self.source.shape[1]

    @property
    def matrix_rows(self) -> int:
        """Stored rows."""
        return self.source.shape[0]

    @property
    def row_step(self) -> int:
        """Rows after which a row begins with a block again; of a turned weight those of a block."""
        if self.is_turned:
            return BLOCK
        return next(n for n in (1, 2, 4, 8, 16, 32, 64) if n * self.columns % BLOCK == 0)

    @property
    def blocks(self) -> int:
        """Blocks of the weight."""
        return -(-self.matrix_rows * self.columns // BLOCK)

    @property
    def reader_bytes(self) -> int:
        """What a reader holds while it makes a tile."""
        return VALUE_BYTES * max(CHUNK_VALUES, self.row_step * self.columns)

    @property
    def scan_bytes(self) -> int:
        """What looking at all of it holds besides: absmax twice, and what it is quantized with."""
        return 8 * self.blocks + FINISH_BYTES * FINISH_BLOCKS if self.is_nested else 0

    @property
    def absmax_bytes(self) -> int:
        """What is kept of it."""
        return self.blocks + 4 * -(-self.blocks // NESTED_BLOCK) if self.is_nested else 0

    def flatten(self, rows: torch.Tensor) -> torch.Tensor:
        """Return stored rows as float32 values that begin with a block."""
        return (rows.T if self.is_turned else rows).float().contiguous().flatten()

    def restore(self, values: torch.Tensor, rows: int) -> torch.Tensor:
        """Return values as stored rows again."""
        from streammerge.codecs.tensors import torch_dtype  # noqa: PLC0415 (it imports torch)

        values = values.to(torch_dtype(self.dtype))
        if self.is_turned:
            return values.view(self.columns, rows).T.contiguous()
        return values.view(rows, self.columns)

    def places(self, begin: int, end: int) -> torch.Tensor:
        """Return the numbers of the blocks of rows, in the order in which these are flattened."""
        import torch  # noqa: PLC0415 (planning needs no torch)

        if not self.is_turned:
            return torch.arange(begin * self.columns // BLOCK, -(-end * self.columns // BLOCK))
        each = self.matrix_rows // BLOCK
        some = torch.arange(begin // BLOCK, -(-end // BLOCK))
        return (torch.arange(self.columns)[:, None] * each + some).flatten()


@dataclass(frozen=True, slots=True)
class Absmax:
    """The absmax of a weight, as double quantization keeps it."""

    codes: torch.Tensor
    """(blocks,) uint8"""
    scales: torch.Tensor
    """(blocks / 256,) float32"""
    offset: torch.Tensor
    """() float32, the mean"""

    @classmethod
    def of(cls, absmax: torch.Tensor) -> Absmax:
        """Quantize; what it is given is (2, blocks) float32, twice the same."""
        import torch  # noqa: PLC0415 (planning needs no torch)

        from streammerge.codecs.bnb4_codes import mean_absmax, quantize_absmax  # noqa: PLC0415

        offset = mean_absmax(absmax)
        pieces = torch.split(absmax[0], FINISH_BLOCKS)
        found = [quantize_absmax(piece - offset) for piece in pieces]
        codes, scales = zip(*found, strict=True)
        return cls(torch.cat(codes), torch.cat(scales), offset)

    def decode(self, places: torch.Tensor) -> torch.Tensor:
        """Return what some blocks are decoded with."""
        from streammerge.codecs.bnb4_codes import dynamic_map  # noqa: PLC0415 (it imports torch)

        values = dynamic_map()[self.codes[places].int()]
        return values.mul_(self.scales[places // NESTED_BLOCK]).add_(self.offset)


@dataclass(slots=True)
class AbsmaxStore:
    """The absmax of the weights that were looked at last; shared by the threads that read.

    One weight is looked at at a time, so that the memory for it is there once.
    """

    capacity: int
    """Weights that are kept."""
    _found: OrderedDict[RoundedWeight, Absmax] = field(default_factory=OrderedDict, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def get(self, weight: RoundedWeight, scan: Callable[[], Absmax]) -> Absmax:
        """Return the absmax of a weight, found by `scan` if it is not there."""
        with self._lock:
            if weight in self._found:
                self._found.move_to_end(weight)
                return self._found[weight]
            while len(self._found) >= self.capacity:
                self._found.popitem(last=False)
            self._found[weight] = found = scan()
            return found


@dataclass(frozen=True, slots=True)
class _RoundedFile:
    """What stands in the place of a file: the values of one weight, row after row."""

    weight: RoundedWeight
    store: AbsmaxStore = field(compare=False, repr=False)

    def open_reader(self, pool: ReaderPool) -> FileReader:
        """Return a reader that takes values from the files of a pool."""
        return _RoundingReader(self.weight, self.store, pool)


@dataclass(frozen=True, slots=True)
class RoundedTensor(StoredTensor):
    """A weight that is read as what its codes would stand for."""

    weight: RoundedWeight
    store: AbsmaxStore = field(compare=False, repr=False)

    @property
    def file(self) -> _RoundedFile:
        """What a reader opens."""
        return _RoundedFile(self.weight, self.store)

    @property
    def stored_bytes(self) -> int:
        """Bytes that are read for it: twice, where absmax is quantized."""
        return self.weight.source.nbytes * (2 if self.weight.is_nested else 1)


def round_checkpoint(
    base: Checkpoint,
    names: Collection[str],
    store: AbsmaxStore,
    *,
    is_nested: bool,
    is_turned: Callable[[str], bool],
) -> Checkpoint:
    """Return a checkpoint some of whose weights are read as what their codes stand for.

    Args:
        base: The checkpoint in 16 or 32 bits.
        names: The weights.
        store: Where their absmax is kept.
        is_nested: Whether absmax is quantized too.
        is_turned: Tells by its name whether a weight is stored (K, N).

    Raises:
        UnsupportedError: A weight is of a dtype, or a turned one of a size, that is not rounded.
    """
    tensors = dict(base.tensors)
    for name in names:
        tensor = tensors[name]
        weight = RoundedWeight(tensor, is_turned(name), is_nested)
        if tensor.dtype not in DTYPES:
            raise UnsupportedError(
                "weight of this dtype is not rounded to NF4",
                where=f"'{name}' of {tensor.path}",
                expected="BF16, F16 or F32",
                got=tensor.dtype.value,
            )
        if weight.is_turned and tensor.shape[0] % BLOCK:
            raise UnsupportedError(
                "weight that the layer keeps transposed is rounded in whole blocks only",
                where=f"'{name}' of {tensor.path}",
                expected=f"a multiple of {BLOCK} inputs",
                got=tensor.shape[0],
            )
        tensors[name] = RoundedTensor(
            name, tensor.dtype, tensor.shape, tensor.path, 0, weight, store
        )
    return replace(base, tensors=tensors)


class _RoundingReader(TileReader):
    """Reads bytes of what a weight's codes stand for."""

    chunk_values: ClassVar[int] = CHUNK_VALUES

    def __init__(self, weight: RoundedWeight, store: AbsmaxStore, pool: ReaderPool) -> None:
        super().__init__(weight)
        self._weight, self._store, self._pool = weight, store, pool

    def make(self, begin: int, end: int) -> torch.Tensor:
        """Read, encode and decode rows."""
        from streammerge.codecs.bnb4_codes import round_to_codes  # noqa: PLC0415 (it imports torch)

        weight = self._weight
        absmax = None
        if weight.is_nested:
            found = self._store.get(weight, self._scan)
            absmax = found.decode(weight.places(begin, end))
        flat = weight.flatten(self._rows(begin, end))
        values = round_to_codes(flat, quant_type=weight.quant_type, block=BLOCK, absmax=absmax)
        return weight.restore(values, end - begin)

    def _scan(self) -> Absmax:
        """Look at all of the weight."""
        import torch  # noqa: PLC0415 (planning needs no torch)

        from streammerge.codecs.bnb4_codes import block_absmax  # noqa: PLC0415

        weight = self._weight
        absmax = torch.empty(2, weight.blocks)
        for begin, end in self._tiles(0, weight.matrix_rows):
            found = block_absmax(weight.flatten(self._rows(begin, end)), BLOCK)
            absmax[:, weight.places(begin, end)] = found
        return Absmax.of(absmax)

    def _rows(self, begin: int, end: int) -> torch.Tensor:
        import torch  # noqa: PLC0415 (planning needs no torch)

        from streammerge.codecs.tensors import torch_dtype  # noqa: PLC0415

        source = self._weight.source
        row = source.dtype.nbytes(self._weight.columns)
        data = bytearray((end - begin) * row)
        self._pool.read_part(source, begin * row, memoryview(data))
        return torch.frombuffer(data, dtype=torch_dtype(source.dtype)).view(end - begin, -1)
