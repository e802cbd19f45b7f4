"""Merged tensors by name: the base and its adapters through the same plan as an export."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from streammerge.backends.base import Tile
from streammerge.backends.select import select_backend
from streammerge.checkpoint.reader import ReaderPool
from streammerge.codecs.tensors import torch_dtype
from streammerge.errors import NonFiniteError
from streammerge.plan.ops import CopyBytes, unique_factors
from streammerge.plan.tiles import split_rows

if TYPE_CHECKING:
    from collections.abc import Iterator

    from streammerge.backends.base import SourceReader
    from streammerge.checkpoint.header import StoredTensor
    from streammerge.plan.merge_plan import MergePlan
    from streammerge.plan.ops import TensorPlan

__all__ = ["MergedSource"]

# of a tensor that is looked at piece by piece
PIECE_BYTES = 16 << 20


class MergedSource:
    """Reads tensors of a plan as they would be exported, one at a time."""

    def __init__(self, plan: MergePlan) -> None:
        """Take charge of torch's threads; `close` gives them back.

        Args:
            plan: The merge. Its arithmetic has one thread, which is what fixes its bits; whatever
                is done with the tensors has as many as the plan wants for workers.
        """
        self._tensors = {tensor.name: tensor for tensor in plan.tensors}
        self._backend = select_backend(
            numerics=plan.numerics,
            scratch_bytes=plan.memory.scratch_bytes,
            tuning=plan.shape.compute,
        )
        self._threads = plan.shape.workers
        torch.set_num_threads(self._threads)
        self._readers = ReaderPool(mode="buffered")

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def __enter__(self) -> MergedSource:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files, and give torch the threads that it had."""
        self._readers.close()
        self._backend.close()

    @property
    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self._tensors)

    def plan(self, name: str) -> TensorPlan:
        """Return what is planned for a tensor."""
        return self._tensors[name]

    def load(
        self, name: str, dtype: torch.dtype | None = None, *, part: int | None = None
    ) -> torch.Tensor:
        """Return a whole tensor, or one matrix of it.

        Args:
            name: Of the tensor.
            dtype: What its values are converted to; its own by default.
            part: Which matrix of a tensor (E, rows, columns); the others are not merged.

        Raises:
            NonFiniteError: The merge gives NaN or Inf.
        """
        target = self._tensors[name]
        if part is not None:
            found = target.part(part)
            if found is None:
                return self.load(name, dtype)[part].clone()
            target = found
        result = torch.empty(target.shape, dtype=dtype or torch_dtype(target.dtype))
        flat = result.view(target.rows, target.columns)
        for begin, piece in self._pieces(target, 0, target.rows):
            flat[begin : begin + len(piece)] = piece
        return result

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Let the backend work in one thread."""
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(self._threads)

    def pieces(
        self, name: str, begin: int = 0, end: int | None = None
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield the first row and the values of one piece of rows after the other.

        Rows are those that the plan cuts tiles of. A piece is overwritten by the next.

        Args:
            name: Of the tensor.
            begin: First row.
            end: Row after the last; by default all rows.

        Raises:
            NonFiniteError: The merge gives NaN or Inf.
        """
        target = self._tensors[name]
        yield from self._pieces(target, begin, target.rows if end is None else end)

    def _pieces(
        self, target: TensorPlan, first: int, last: int
    ) -> Iterator[tuple[int, torch.Tensor]]:
        source_row = target.source.dtype.nbytes(target.columns)
        output_row = target.dtype.nbytes(target.columns)
        step = max(4, PIECE_BYTES // max(source_row, output_row, 1))
        factors, read = None, self._reader_of(target.source)
        if not isinstance(target.op, CopyBytes):
            raw = {}
            for factor in unique_factors(target.terms):
                raw[factor] = bytearray(factor.nbytes)
                self._readers.read_tensor(factor, memoryview(raw[factor]))
            with self._alone():
                factors = self._backend.load_factors(target, raw, read)
        buffer = bytearray(min(last - first, step + 3) * max(source_row, output_row))
        for begin, end in split_rows(first, last, step):
            rows = end - begin
            # the source at the end of the buffer, so that wider results never reach unread rows
            at = rows * max(source_row, output_row) - rows * source_row
            view = memoryview(buffer)
            read(begin * source_row, view[at : at + rows * source_row])
            if factors is not None:
                tile = Tile(target, begin, end, view, output_offset=0, source_offset=at)
                with self._alone():
                    is_finite = all(self._backend.apply_block([(tile, factors)]))
                if not is_finite:
                    raise NonFiniteError(
                        f"merged tensor '{target.name}' holds NaN or Inf",
                        where=f"rows {begin} to {end - 1}",
                        hint="the adapter or the base is broken",
                    )
            yield (
                begin,
                torch.frombuffer(
                    buffer, dtype=torch_dtype(target.dtype), count=rows * target.columns
                ).view(rows, target.columns),
            )

    def rows_between(self, name: str, begin: int, end: int) -> torch.Tensor:
        """Return rows `[begin, end)` of a tensor, (end - begin, columns) in its own dtype."""
        return torch.cat([piece.clone() for _, piece in self.pieces(name, begin, end)])

    def rows(self, name: str, indices: torch.Tensor) -> torch.Tensor:
        """Return some rows of a matrix, the rest of which never stays in memory.

        Args:
            name: Of the tensor, (rows, columns).
            indices: Ascending, each once.

        Returns:
            (len(indices), columns) in the tensor's own dtype.
        """
        target = self._tensors[name]
        found = torch.empty((len(indices), target.columns), dtype=torch_dtype(target.dtype))
        for begin, piece in self.pieces(name):
            first = int(torch.searchsorted(indices, begin))
            last = int(torch.searchsorted(indices, begin + len(piece)))
            found[first:last] = piece[indices[first:last] - begin]
        return found

    def _reader_of(self, own: StoredTensor) -> SourceReader:
        def read(offset: int, buffer: memoryview, source: StoredTensor | None = None) -> None:
            self._readers.read_part(own if source is None else source, offset, buffer)

        return read
