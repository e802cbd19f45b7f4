"""A weight on its way to codes: its rows in any order, then the tensors that describe them."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from streammerge.codecs.tensors import bytes_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from streammerge.plan.ops import Encoding

__all__ = ["WeightEncoder"]


class WeightEncoder:
    """Encodes the rows of one weight; several threads may do so at the same time."""

    def __init__(self, encoding: Encoding) -> None:
        """Get ready for the first rows."""
        self._encoding = encoding
        self._encoder = encoding.encoder()
        self._encoder.begin()
        codes, *others = encoding.weight.parts
        self._codes = codes.role
        self._sides = {part.role: bytearray(part.tensor.nbytes) for part in others}
        self._finishing = threading.Lock()
        self._is_finished = False

    @property
    def needs_scan(self) -> bool:
        """Whether all rows have to be looked at before the first is encoded."""
        return self._encoder.needs_scan

    def scan(self, begin: int, values: torch.Tensor) -> None:
        """Look at rows `begin, ...`."""
        self._encoder.scan(begin, begin + len(values), values)

    def join(self, others: Sequence[WeightEncoder]) -> None:
        """Share what scans of other weights found."""
        self._encoder.join([other._encoder for other in others])  # noqa: SLF001 (its own kind)

    def encode(self, begin: int, values: torch.Tensor, output: memoryview) -> int:
        """Encode rows.

        Args:
            begin: The first of them.
            values: (n, K) in the dtype of the encoding.
            output: Their codes go to its beginning.

        Returns:
            The bytes of the codes.
        """
        end = begin + len(values)
        found = self._encoder.encode(begin, end, values)
        for extent in self._encoding.weight.extents(begin, end):
            if extent.role in found and extent.role != self._codes:
                data = bytes_of(found[extent.role].contiguous())
                extent.put(data, memoryview(self._sides[extent.role]))
        codes = bytes_of(found[self._codes].contiguous())
        output[: len(codes)] = codes
        return len(codes)

    def side(self, part: int) -> memoryview:
        """Return the bytes of a part that is not the codes, once all rows are encoded."""
        with self._finishing:
            if not self._is_finished:
                for role, tensor in self._encoder.finish().items():
                    self._sides[role][:] = bytes_of(tensor.contiguous())
                self._is_finished = True
        return memoryview(self._sides[self._encoding.weight.parts[part].role])
