"""How rows are packed into a slot, and what comes back out of it."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from streammerge.backends.base import Tile
from streammerge.backends.batches import Batch, Piece, cut_tile, rows_that_fit
from streammerge.checkpoint.header import StoredTensor
from streammerge.dtypes import Dtype
from streammerge.plan.ops import ApplyTerms, TensorPlan


def plan(rows: int, columns: int, source: Dtype = Dtype.BF16, out: Dtype = Dtype.F32) -> TensorPlan:
    stored = StoredTensor("w", source, (rows, columns), Path("none"), 0)
    return TensorPlan("w", out, stored, ApplyTerms(source, ()), "cast")


def tiles(shapes: list[tuple[int, int]]) -> tuple[bytearray, list[Tile]]:
    """Lay tiles into a buffer as a block does: the sources behind all results."""
    targets = [plan(*shape) for shape in shapes]
    outputs = [0, *itertools.accumulate(target.nbytes for target in targets)]
    sources = [0, *itertools.accumulate(target.source.nbytes for target in targets)]
    buffer = bytearray(outputs[-1] + sources[-1])
    values = torch.frombuffer(buffer, dtype=torch.uint8)[outputs[-1] :].view(torch.bfloat16)
    values.copy_(torch.randn(len(values)))
    view = memoryview(buffer)
    return buffer, [
        Tile(target, 0, target.rows, view, output, outputs[-1] + source)
        for target, output, source in zip(targets, outputs, sources, strict=False)
    ]


SHAPES = [(3, 7), (1, 1), (5, 129), (64, 2), (9, 33)]


def test_pieces_begin_at_multiples_of_256_bytes_and_do_not_touch() -> None:
    _, found = tiles(SHAPES)
    batch = Batch[None](1 << 16)
    assert all(batch.add(Piece(tile, None, tile.begin, tile.end)) for tile in found)
    for side in ("input", "output"):
        ends = 0
        for piece in batch.pieces:
            at, nbytes = getattr(piece, f"{side}_at"), getattr(piece, f"{side}_bytes")
            assert at % 256 == 0
            assert at >= ends
            ends = at + nbytes
        assert ends <= getattr(batch, f"{side}_bytes")


def test_a_batch_stays_within_its_slot() -> None:
    # two pieces of 256 bytes each, as output, and their flags
    _, found = tiles([(2, 32), (2, 32), (2, 32)])
    pieces = [Piece(tile, None, 0, 2) for tile in found]
    for slot_bytes, count in ((512 + 31, 1), (512 + 32, 2), (768 + 47, 2), (768 + 48, 3)):
        batch = Batch[None](slot_bytes)
        assert sum(batch.add(piece) for piece in pieces) == count
        assert batch.output_bytes <= slot_bytes


@pytest.mark.parametrize("slot_bytes", [800, 1024, 5000])
def test_rows_come_back_to_where_they_belong(slot_bytes: int) -> None:
    buffer, found = tiles(SHAPES)
    pieces = [p for tile in found for p in cut_tile(tile, None, slot_bytes=slot_bytes)]
    expected = b"".join(
        piece.source().view(torch.bfloat16).float().numpy().tobytes() for piece in pieces
    )
    waiting = iter([*pieces, None])
    piece = next(waiting)
    while piece is not None:
        batch = Batch[None](slot_bytes)
        # every piece fits a slot of its own
        assert batch.add(piece)
        while (piece := next(waiting)) is not None and batch.add(piece):
            pass
        given, result = (torch.full((slot_bytes,), 255, dtype=torch.uint8) for _ in range(2))
        batch.fill(given)
        for one in batch.pieces:
            one.rows_out(result).copy_(one.rows_in(given))
        batch.note_extremes(result)
        assert batch.drain(result[: batch.output_bytes]) == [True] * len(batch.pieces)
    assert bytes(buffer[: len(expected)]) == expected


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_found_in_its_piece(value: float) -> None:
    _, found = tiles(SHAPES)
    batch = Batch[None](1 << 16)
    assert all(batch.add(Piece(tile, None, tile.begin, tile.end)) for tile in found)
    result = torch.zeros(1 << 16, dtype=torch.uint8)
    batch.pieces[2].rows_out(result)[4, 128] = value
    batch.note_extremes(result)
    assert batch.drain(result) == [True, True, False, True, True]


def test_rows_too_long_for_a_slot_do_not_fit() -> None:
    assert rows_that_fit(plan(4, 100), 256 + 16 + 399) == 0
    assert rows_that_fit(plan(4, 100), 256 + 16 + 800) == 2
    assert rows_that_fit(plan(4, 100), 10) == 0
