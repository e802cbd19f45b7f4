"""The protocol of a codec: which stored tensors make a weight, where its rows are, what they mean.

A `Codec` is a format as one checkpoint uses it. From headers it finds the `CodedWeight`s of the
checkpoint; each says for any tile of its rows which bytes of which stored tensors are needed
(`extents`), and turns these bytes into values (`decode`). An `Encoder` goes the other way. Nothing
here opens a file, and torch is imported where arithmetic is done, so that a plan needs neither.

Rows are counted through all matrices of a weight: row r of matrix e of (E, N, K) is `e * N + r`. A
tile lies in one matrix, begins at a multiple of `row_step`, and ends at one or with its matrix.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar

from streammerge.checkpoint.header import StoredTensor, TensorSpec
from streammerge.errors import CheckpointError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    import torch

    from streammerge.dtypes import Dtype

__all__ = ["Codec", "CodedWeight", "Encoder", "Extent", "Found", "Part", "Stored"]

Stored = StoredTensor | TensorSpec


@dataclass(frozen=True, slots=True)
class Extent:
    """Bytes of one stored tensor: `count` runs of `nbytes`, `stride` apart, the first at `offset`.

    What is handed to `decode` is the runs one after the other.
    """

    role: str
    """Which of the weight's parts it is."""
    offset: int
    """From the first byte of the tensor."""
    nbytes: int
    """Of one run."""
    count: int = 1
    stride: int = 0
    """From the beginning of a run to that of the next, in bytes."""
    is_shared: bool = False
    """Whether every tile of the weight needs these same bytes: they may be read once and kept."""

    @property
    def total_bytes(self) -> int:
        """Bytes of all runs."""
        return self.nbytes * self.count

    def take(self, tensor: memoryview) -> memoryview:
        """Return the runs, out of a whole tensor's bytes, one after the other."""
        if self.count == 1:
            return tensor[self.offset : self.offset + self.nbytes]
        runs = (tensor[at : at + self.nbytes] for at in self._places())
        return memoryview(b"".join(runs))

    def put(self, data: memoryview, tensor: memoryview) -> None:
        """Write the runs, which are one after the other in `data`, into a whole tensor's bytes."""
        for number, at in enumerate(self._places()):
            run = data[number * self.nbytes : (number + 1) * self.nbytes]
            tensor[at : at + self.nbytes] = run

    def _places(self) -> range:
        stride = self.stride or 1
        return range(self.offset, self.offset + self.count * stride, stride)


@dataclass(frozen=True, slots=True)
class Part:
    """One stored tensor of a weight, and what it is there."""

    role: str
    """The end of its name in the library of the format, such as `weight_scale`."""
    tensor: Stored


@dataclass(frozen=True, slots=True, kw_only=True)
class CodedWeight(ABC):
    """A weight that several stored tensors make up."""

    name: str
    """What it would be called if it were stored as it is."""
    shape: tuple[int, ...]
    """(N, K), or (E, N, K) for experts in one tensor."""
    dtype: Dtype
    """What the format's own library decodes to."""
    parts: tuple[Part, ...]
    """Every stored tensor of the weight, in the order of the library."""

    @property
    def rows(self) -> int:
        """Rows of all matrices."""
        return prod(self.shape[:-1])

    @property
    def columns(self) -> int:
        """K."""
        return self.shape[-1]

    @property
    def matrix_rows(self) -> int:
        """N: the rows of one matrix."""
        return self.shape[-2]

    @property
    @abstractmethod
    def row_step(self) -> int:
        """Multiples of this are where tiles may begin and end."""

    def part(self, role: str) -> Stored:
        """Return the stored tensor with a role.

        Raises:
            KeyError: The weight has none.
        """
        for part in self.parts:
            if part.role == role:
                return part.tensor
        raise KeyError(role)

    def has(self, role: str) -> bool:
        """Tell whether a part has this role."""
        return any(part.role == role for part in self.parts)

    @abstractmethod
    def extents(self, begin: int, end: int) -> tuple[Extent, ...]:
        """Return which bytes the rows `[begin, end)` are decoded from.

        Raises:
            ValueError: The rows are no tile.
        """

    def decode(
        self,
        begin: int,
        end: int,
        data: Mapping[str, memoryview],
        *,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """Return the values of rows.

        Args:
            begin: First row.
            end: Row after the last.
            data: The bytes of `extents(begin, end)`, by role.
            dtype: What the values are rounded to; by default `self.dtype`, which gives the bits of
                the format's own library. float32 gives the values before that rounding.

        Returns:
            (end - begin, K), contiguous.

        Raises:
            ValueError: The rows are no tile.
            CheckpointError: The codes contradict each other.
        """
        from streammerge.codecs.tensors import torch_dtype  # noqa: PLC0415 (it imports torch)

        self.check_tile(begin, end)
        return self.values(begin, end, data).to(dtype or torch_dtype(self.dtype)).contiguous()

    @abstractmethod
    def values(self, begin: int, end: int, data: Mapping[str, memoryview]) -> torch.Tensor:
        """Return (end - begin, K) float32: the values before the library's last rounding."""

    def check_tile(self, begin: int, end: int) -> None:
        """Make sure that rows are a tile.

        Raises:
            ValueError: They are not.
        """
        step, rows = self.row_step, self.matrix_rows
        first = begin // rows * rows if rows else 0
        is_inside = 0 <= begin < end <= first + rows and end <= self.rows
        if (
            not is_inside
            or (begin - first) % step
            or ((end - first) % step and end != first + rows)
        ):
            raise ValueError(
                f"rows {begin} to {end} of {self.name} are no tile: expected multiples of {step} "
                f"in one matrix of {rows} rows"
            )

    def by_rows(self, role: str, begin: int, end: int, *, step: int = 1) -> Extent:
        """Return the lines of a part that hold rows, where a line serves `step` rows of a matrix.

        The last line of a matrix may serve fewer.
        """
        matrix, first, last = self.in_matrix(begin, end)
        lines = -(-self.matrix_rows // step)
        line_bytes = self._matrix_bytes(role) // lines
        line, after = first // step, -(-last // step)
        offset = (matrix * lines + line) * line_bytes
        return Extent(role, offset, (after - line) * line_bytes)

    def by_columns(self, role: str, begin: int, end: int, *, item_bits: int) -> Extent:
        """Return the part of every line of a tensor that holds rows, `item_bits` of it a row.

        The tensor has the weight's rows along its last dimension, in whole words.
        """
        matrix, first, last = self.in_matrix(begin, end)
        tensor = self.part(role)
        width = tensor.dtype.nbytes(tensor.shape[-1])
        matrix_bytes = self._matrix_bytes(role)
        word = 8 * tensor.dtype.item_bytes
        start = first * item_bits // word * word // 8
        stop = min(-(-last * item_bits // word) * word // 8, width)
        lines = matrix_bytes // width
        return Extent(role, matrix * matrix_bytes + start, stop - start, lines, width)

    def whole(self, role: str) -> Extent:
        """Return all of a part, which every tile needs."""
        return Extent(role, 0, self.part(role).nbytes, is_shared=True)

    def in_matrix(self, begin: int, end: int) -> tuple[int, int, int]:
        """Return the matrix of a tile, and its rows in there."""
        matrix = begin // self.matrix_rows
        return matrix, begin - matrix * self.matrix_rows, end - matrix * self.matrix_rows

    def _matrix_bytes(self, role: str) -> int:
        return self.part(role).nbytes // prod(self.shape[:-2])


@dataclass(frozen=True, slots=True)
class Found:
    """What a checkpoint holds in a format."""

    weights: tuple[CodedWeight, ...]
    plain: tuple[Stored, ...]
    """The tensors that are no part of a coded weight."""


class Encoder(ABC):
    """Turns the rows of one weight into the bytes of a format, tile by tile.

    It is told to `begin`. If it `needs_scan`, every tile goes through `scan` first. Then every tile
    goes through `encode`, and `finish` gives what is known only after the last.
    """

    weight: CodedWeight
    """The layout of what is written; its parts are known before any value is."""
    needs_scan: bool = False
    row_step: int
    """As that of a weight, for tiles to encode."""

    @property
    def held_bytes(self) -> int:
        """What it holds from the first tile to the last, and while it finishes."""
        return 0

    def begin(self) -> None:  # noqa: B027 (few do)
        """Get ready for tiles, which several threads may encode at the same time."""

    def scan(self, begin: int, end: int, tile: torch.Tensor) -> None:  # noqa: B027 (few do)
        """Look at the values of rows.

        Tiles may come in any order, and from one thread at a time.
        """

    def join(self, others: Sequence[Encoder]) -> None:
        """Share what was found in scans of other weights, whose scale has to be the same.

        Raises:
            NotImplementedError: The format has no such scale.
        """
        raise NotImplementedError

    @abstractmethod
    def encode(self, begin: int, end: int, tile: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the stored bytes of rows.

        Args:
            begin: First row.
            end: Row after the last.
            tile: (end - begin, K), in the dtype that the whole weight would be encoded from.

        Returns:
            By role, contiguous tensors; the place of their bytes is that of the role in
            `weight.extents(begin, end)`.
        """

    def finish(self) -> dict[str, torch.Tensor]:
        """Return, by role, the whole tensors that `encode` gave no part of."""
        return {}

    def check_tile(self, begin: int, end: int, tile: torch.Tensor) -> None:
        """Make sure that a tile is one.

        Raises:
            ValueError: It is not.
        """
        self.weight.check_tile(begin, end)
        rows = self.weight.matrix_rows
        if begin % rows % self.row_step or (end % rows) % self.row_step:
            raise ValueError(
                f"tiles are encoded in steps of {self.row_step} rows; got {begin}:{end}"
            )
        if tuple(tile.shape) != (end - begin, self.weight.columns):
            raise ValueError(f"tile has shape {tuple(tile.shape)} for rows {begin} to {end}")


@dataclass(frozen=True, slots=True)
class Codec(ABC):
    """One format, with what `quantization_config` says of it."""

    title: ClassVar[str]
    """What it is called in tables."""
    selector: ClassVar[str]
    """What in `quantization_config` selects it."""
    stored: ClassVar[str]
    """The stored tensors of a weight."""
    reference: ClassVar[str]
    """The library whose bits are matched."""
    encodes: ClassVar[bool] = False
    remarks: ClassVar[str] = ""

    @property
    def shares_scales(self) -> bool:
        """Whether loaders that join weights, such as those of q, k and v, want one scale in all."""
        return False

    @classmethod
    @abstractmethod
    def of(cls, section: Mapping[str, Any], dtype: Dtype) -> Codec | None:
        """Return the codec that a configuration selects, or None if it selects another.

        Args:
            section: `quantization_config` of config.json.
            dtype: The model's dtype, for formats that leave it open what they decode to.

        Raises:
            UnsupportedError: The format is this one, in a variety that cannot be decoded.
        """

    @abstractmethod
    def find(self, tensors: Iterable[Stored], read: Callable[[Stored], bytes]) -> Found:
        """Group the tensors of a checkpoint into weights.

        Args:
            tensors: Of all shards.
            read: Returns the bytes of one tensor. It is called for the few small ones, below
                64 KiB, that hold shapes rather than values.

        Raises:
            CheckpointError: The tensors of a weight are not complete, or do not fit together.
            UnsupportedError: A weight is stored in a variety that cannot be decoded.
        """

    def holds_whole(self, shape: tuple[int, ...]) -> bool:
        """Tell whether a weight of a shape divides into what shares a scale, as loaders want it."""
        del shape
        return True

    def like(self, weight: CodedWeight) -> Codec:
        """Return the codec that makes such a weight, where a checkpoint may hold several kinds."""
        del weight
        return self

    def encoder(self, name: str, shape: tuple[int, ...], dtype: Dtype) -> Encoder:
        """Return an encoder of one weight.

        Args:
            name: Of the weight, ending in `.weight`.
            shape: (N, K).
            dtype: Of the values to encode.

        Raises:
            UnsupportedError: The format is only read, or cannot hold such a weight.
        """
        raise UnsupportedError(
            "weights cannot be encoded in this format",
            where=name,
            got=f"{self.title}, {dtype.value} {shape}",
            hint="it is only read",
        )


def sort_out(
    by_name: Mapping[str, Stored], weights: Sequence[CodedWeight], *, marks: tuple[str, ...]
) -> Found:
    """Return weights, and what is no part of one.

    Args:
        by_name: All tensors of a checkpoint.
        weights: Those that were found.
        marks: Ends of names that only parts of weights have.

    Raises:
        CheckpointError: A tensor with such a name is no part of a weight.
    """
    used = {part.tensor.name for weight in weights for part in weight.parts}
    plain = tuple(tensor for name, tensor in by_name.items() if name not in used)
    for tensor in plain:
        if tensor.name.endswith(marks):
            raise CheckpointError(
                "tensor describes codes that are not there, or are of another dtype",
                where=tensor.name,
                hint="download the checkpoint again, or check its quantization_config",
            )
    return Found(tuple(weights), plain)


def misfit(tensor: Stored, expected: object) -> CheckpointError:
    """Return the error that a part does not fit the rest of its weight."""
    return CheckpointError(
        "tensors of a quantized weight do not fit together",
        where=tensor.name,
        expected=expected,
        got=f"{tensor.dtype.value} {tensor.shape}",
    )


def missing(name: str, expected: str) -> CheckpointError:
    """Return the error that a weight lacks a part."""
    return CheckpointError("quantized weight lacks a tensor", where=name, expected=expected)
