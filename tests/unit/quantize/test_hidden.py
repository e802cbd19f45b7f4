"""Hidden states in mapped files."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from streammerge.quantize.hidden import HiddenStates

if TYPE_CHECKING:
    from pathlib import Path

# of fewer bytes than a page, of pages and a rest, of whole pages
SHAPES = [(3, 5, 7), (3, 33, 67), (3, 32, 64)]


@pytest.mark.parametrize("shape", SHAPES)
def test_what_was_written_is_read_by_this_and_another_run(
    tmp_path: Path, shape: tuple[int, int, int]
) -> None:
    before, after = torch.randn(shape), torch.randn(shape)
    states = HiddenStates(tmp_path, shape=shape)
    for sample in range(3):
        states.write(0, sample, before[sample : sample + 1])
    for sample in range(3):
        assert torch.equal(states.read(0, sample)[0], before[sample])
        states.write(1, sample, after[sample : sample + 1])
    states.flush(1)
    states.close()
    assert HiddenStates.are_there(tmp_path, shape=shape)
    again = HiddenStates(tmp_path, shape=shape)
    for sample in range(3):
        assert torch.equal(again.read(2, sample)[0], before[sample])
        assert torch.equal(again.read(1, sample)[0], after[sample])
    again.remove()
    assert list(tmp_path.iterdir()) == []
    assert not HiddenStates.are_there(tmp_path, shape=shape)


def test_files_of_another_shape_do_not_count(tmp_path: Path) -> None:
    HiddenStates(tmp_path, shape=(2, 3, 4)).close()
    assert not HiddenStates.are_there(tmp_path, shape=(2, 3, 5))


def test_what_is_read_is_a_copy(tmp_path: Path) -> None:
    states = HiddenStates(tmp_path, shape=(1, 2, 3))
    states.write(0, 0, torch.ones(1, 2, 3))
    states.read(0, 0).zero_()
    assert states.read(0, 0).eq(1).all()
    states.remove()
