"""Slabs are aligned, have room around the data, and move bytes over themselves."""

from __future__ import annotations

import numpy as np
import pytest

from streammerge.checkpoint.slab import FRONT_BYTES, PAGE, Slab, address_of


@pytest.mark.parametrize("nbytes", [0, 1, 4095, 4096, 4097, 100_000])
def test_a_slab_begins_on_a_page_and_has_room_around_the_data(nbytes: int) -> None:
    slab = Slab(nbytes)
    assert address_of(slab.view) % PAGE == 0
    # the data may begin anywhere in a page, and whole pages around it are read
    last = FRONT_BYTES + PAGE - 1
    assert len(slab.view) >= last + nbytes + PAGE
    assert bytes(slab.view[:8]) == bytes(8)


@pytest.mark.parametrize("offset", [0, 1, 511, 4095, 4096, 4097, 123_456_789_012])
def test_data_lies_as_far_into_a_page_as_in_the_file(offset: int) -> None:
    at = Slab.place(offset)
    assert at % PAGE == offset % PAGE
    assert FRONT_BYTES <= at < FRONT_BYTES + PAGE


@pytest.mark.parametrize("source", [0, 5, 4096])
@pytest.mark.parametrize("target", [0, 3, 4000, 8192])
@pytest.mark.parametrize("nbytes", [0, 1, 4097, 9000])
def test_bytes_move_over_each_other(source: int, target: int, nbytes: int) -> None:
    slab = Slab(9000)
    content = bytearray(n * 7 % 251 for n in range(len(slab.view)))
    slab.view[:] = content
    slab.move(source, target, nbytes)
    content[target : target + nbytes] = bytes(content[source : source + nbytes])
    assert slab.view == content


def test_an_address_is_that_of_the_first_byte() -> None:
    values = np.arange(16, dtype=np.uint8)
    assert address_of(memoryview(values)) == values.ctypes.data
    assert address_of(memoryview(values)[3:]) == values.ctypes.data + 3
