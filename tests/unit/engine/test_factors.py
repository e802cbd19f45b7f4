"""Factors: read once, converted once, never more in memory than allowed."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

from streammerge.checkpoint.header import StoredTensor
from streammerge.checkpoint.reader import ReaderPool
from streammerge.dtypes import Dtype
from streammerge.engine.channels import Stopped
from streammerge.engine.factors import FactorStore
from streammerge.errors import CheckpointError
from streammerge.plan.ops import ApplyTerms, BiasTerm, TensorPlan
from streammerge.plan.tiles import MergeTile, factor_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# as stored, and in the widest compute dtype
BYTES = 10 * (1 + 8)
ROWS = 20


class Backend:
    """Counts conversions, which take a while."""

    name = "test"

    def __init__(self) -> None:
        self.loads: list[tuple[str, list[bytes]]] = []

    def close(self) -> None:
        pass

    def load_factors(self, target: TensorPlan, raw: list[bytearray]) -> Any:
        time.sleep(0.01)
        self.loads.append((target.name, [bytes(part) for part in raw]))
        return object()

    def apply(self, *_: object) -> bool:
        return True


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "adapter"
    file.write_bytes(bytes(range(100)))
    return file


@pytest.fixture
def adapters() -> Iterator[ReaderPool]:
    with ReaderPool(mode="buffered") as pool:
        yield pool


def target(path: Path, number: int, *, terms: int = 1, shape: tuple[int, ...] = (ROWS,)) -> Any:
    vectors = [StoredTensor("f", Dtype.U8, (10,), path, 10 * (number + n)) for n in range(terms)]
    op = ApplyTerms(Dtype.U8, tuple(BiasTerm(vector, 1.0) for vector in vectors))
    source = StoredTensor("w", Dtype.U8, shape, path, 0)
    return TensorPlan(f"t{number}", Dtype.U8, source, op, "merged")


def tile(target: TensorPlan, begin: int = 0, end: int = ROWS) -> MergeTile:
    return MergeTile(target, begin, end, 0, 0)


def test_the_bytes_of_every_term_in_order(path: Path, adapters: ReaderPool) -> None:
    one = target(path, 2, terms=3)
    backend = Backend()
    FactorStore(10**6).take(tile(one), adapters).loaded(backend)
    content = bytes(range(100))
    assert backend.loads == [("t2", [content[20:30], content[30:40], content[40:50]])]


def test_tiles_of_one_target_share_its_factors(path: Path, adapters: ReaderPool) -> None:
    store = FactorStore(10**6)
    one, other = target(path, 0), target(path, 1)
    first = store.take(tile(one, 0, 8), adapters)
    assert store.take(tile(one, 8, ROWS), adapters) is first
    second = store.take(tile(other), adapters)
    assert second is not first
    # the same tensor again is another target
    assert store.take(tile(other), adapters) is not second


def test_conversion_happens_once_whoever_comes_first(path: Path, adapters: ReaderPool) -> None:
    backend = Backend()
    factors = FactorStore(10**6).take(tile(target(path, 0)), adapters)
    together = threading.Barrier(4)

    def load() -> Any:
        together.wait(60)
        return factors.loaded(backend)

    with ThreadPoolExecutor(4) as pool:
        found = {id(future.result(60)) for future in [pool.submit(load) for _ in range(4)]}
    assert len(found) == 1
    assert len(backend.loads) == 1
    # what was read is not kept beside what was made of it
    assert factors.raw == []


def test_a_conversion_that_fails_is_an_error_each_time(path: Path, adapters: ReaderPool) -> None:
    class Failing(Backend):
        def load_factors(self, target: TensorPlan, raw: list[bytearray]) -> Any:
            raise RuntimeError("broken")

    factors = FactorStore(10**6).take(tile(target(path, 0)), adapters)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="broken"):
            factors.loaded(Failing())


def test_a_target_waits_until_there_is_room(path: Path, adapters: ReaderPool) -> None:
    assert factor_bytes(target(path, 0)) == BYTES
    store = FactorStore(2 * BYTES)
    held = [store.take(tile(target(path, number)), adapters) for number in range(2)]
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(store.take, tile(target(path, 2)), adapters)
        time.sleep(0.02)
        assert not waiting.done()
        # not before the last row is merged, in whatever order the rows come
        store.give_back(held[1], rows=12)
        time.sleep(0.02)
        assert not waiting.done()
        store.give_back(held[1], rows=8)
        assert waiting.result(60).target.name == "t2"
        full = pool.submit(store.take, tile(target(path, 3)), adapters)
        time.sleep(0.02)
        assert not full.done()
        store.give_back(held[0], rows=ROWS)
        assert full.result(60).target.name == "t3"


def test_a_target_larger_than_the_room_goes_alone(path: Path, adapters: ReaderPool) -> None:
    store = FactorStore(BYTES)
    large = store.take(tile(target(path, 0, terms=3)), adapters)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(store.take, tile(target(path, 1)), adapters)
        time.sleep(0.02)
        assert not waiting.done()
        store.give_back(large, rows=ROWS)
        waiting.result(60)


def test_targets_without_factors_never_wait(path: Path, adapters: ReaderPool) -> None:
    store = FactorStore(0)
    for number in range(5):
        factors = store.take(tile(target(path, number, terms=0)), adapters)
        assert factors.raw == []


def test_a_scalar_has_one_row(path: Path, adapters: ReaderPool) -> None:
    store = FactorStore(BYTES)
    scalar = store.take(tile(target(path, 0, shape=()), 0, 1), adapters)
    store.give_back(scalar, rows=1)
    store.take(tile(target(path, 1)), adapters)


def test_a_stop_wakes_who_waits_for_room(path: Path, adapters: ReaderPool) -> None:
    store = FactorStore(BYTES)
    store.take(tile(target(path, 0)), adapters)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(store.take, tile(target(path, 1)), adapters)
        time.sleep(0.02)
        assert not waiting.done()
        store.stop()
        with pytest.raises(Stopped):
            waiting.result(60)
    with pytest.raises(Stopped):
        store.take(tile(target(path, 2)), adapters)


def test_a_truncated_adapter_is_the_reader_s_error(path: Path, adapters: ReaderPool) -> None:
    with pytest.raises(CheckpointError, match="truncated"):
        FactorStore(10**6).take(tile(target(path, 95)), adapters)
