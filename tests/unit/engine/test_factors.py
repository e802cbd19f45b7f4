"""Factors: read once, converted once, never more in memory than allowed."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from streammerge.adapters.terms import Factor
from streammerge.checkpoint.header import StoredTensor
from streammerge.checkpoint.reader import ReaderPool
from streammerge.dtypes import Dtype
from streammerge.engine import factors as factors_module
from streammerge.engine.channels import Stopped
from streammerge.engine.factors import FactorStore
from streammerge.errors import CheckpointError
from streammerge.plan.ops import ApplyTerms, BiasTerm, LoraTerm, TensorPlan, unique_factors
from streammerge.plan.tiles import MergeTile, factor_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from streammerge.backends.base import SourceReader
    from streammerge.plan.ops import Term

# as stored, and in the compute dtype
BYTES = 10 * (1 + 4)
ROWS = 20


class Backend:
    """Counts conversions, which take a while."""

    name = "test"

    def __init__(self) -> None:
        self.loads: list[tuple[str, list[bytes]]] = []

    def close(self) -> None:
        pass

    def load_factors(
        self,
        target: TensorPlan,
        raw: dict[StoredTensor, bytearray],
        read_source: SourceReader | None = None,
    ) -> Any:
        time.sleep(0.01)
        self.loads.append((target.name, [bytes(raw[f]) for f in unique_factors(target.terms)]))
        assert set(raw) == set(unique_factors(target.terms))
        return object()

    def apply_block(self, tiles: Iterable[object]) -> Iterator[bool]:
        return (True for _ in tiles)


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
    vectors = [
        StoredTensor(f"f{n}", Dtype.U8, (10,), path, 10 * (number + n)) for n in range(terms)
    ]
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
    assert factors.raw == {}


def test_a_conversion_that_fails_is_an_error_each_time(path: Path, adapters: ReaderPool) -> None:
    class Failing(Backend):
        def load_factors(self, *_: object) -> Any:
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
        assert factors.raw == {}


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


def test_a_factor_of_two_terms_is_read_once(path: Path, adapters: ReaderPool) -> None:
    one = target(path, 0)
    (term,) = one.terms
    twice = replace(one, op=replace(one.op, terms=(term, term)))
    assert list(FactorStore(10**6).take(tile(twice), adapters).raw) == [term.vector]


def test_a_term_may_read_its_target_s_source(path: Path, adapters: ReaderPool) -> None:
    class Looking(Backend):
        def load_factors(
            self, target: TensorPlan, raw: Any, read_source: SourceReader | None = None
        ) -> Any:
            assert read_source is not None
            for offset, count in ((0, 20), (3, 5), (19, 1)):
                buffer = bytearray(count)
                read_source(offset, memoryview(buffer))
                self.loads.append((str(offset), [bytes(buffer)]))
            return object()

    one = target(path, 0)
    one = replace(one, source=replace(one.source, offset=40))
    backend = Looking()
    FactorStore(10**6).take(tile(one), adapters).loaded(backend)
    content = bytes(range(100))
    assert backend.loads == [
        ("0", [content[40:60]]),
        ("3", [content[43:48]]),
        ("19", [content[59:60]]),
    ]


# parts of factors

RANK, EXPERTS, N, K = 2, 6, 5, 7


class Experts:
    """The factors of all experts on disk; each target is one of them."""

    def __init__(self, folder: Path, dtype: Dtype = Dtype.BF16) -> None:
        file = folder / "experts"
        count = EXPERTS * RANK * (N + K)
        random = np.random.default_rng(3)
        values = random.integers(0, 200, 16 + count * dtype.item_bytes, dtype=np.uint8)
        file.write_bytes(values.tobytes())
        self.a = StoredTensor("a", dtype, (EXPERTS * RANK, K), file, 16)
        self.b = StoredTensor("b", dtype, (N, EXPERTS * RANK), file, 16 + self.a.nbytes)
        content = values[16:].view(f"u{dtype.item_bytes}")
        self.values_a = content[: EXPERTS * RANK * K].reshape(EXPERTS * RANK, K)
        self.values_b = content[EXPERTS * RANK * K :].reshape(N, EXPERTS * RANK)

    def target(self, number: int, *, columns: range | None = None) -> TensorPlan:
        term = LoraTerm(
            Factor(self.a, rows=range(number * RANK, (number + 1) * RANK), columns=columns),
            Factor(self.b, columns=range(number, RANK * EXPERTS, EXPERTS)),
            1.0,
            is_transposed=False,
            rounds_delta=True,
        )
        source = StoredTensor("w", Dtype.BF16, (N, K), self.a.path, 0)
        return TensorPlan("w", Dtype.BF16, source, ApplyTerms(Dtype.BF16, (term,)), "merged")

    def expected(self, number: int, columns: range = range(K)) -> list[bytes]:
        rows = self.values_a[number * RANK : (number + 1) * RANK]
        return [rows[:, list(columns)].tobytes(), self.values_b[:, number::EXPERTS].tobytes()]


class Reads(ReaderPool):
    """It counts the whole tensors that were read."""

    def __init__(self) -> None:
        super().__init__(mode="buffered")
        self.whole: list[str] = []

    def read_tensor(self, tensor: StoredTensor, into: memoryview) -> None:
        self.whole.append(tensor.name)
        super().read_tensor(tensor, into)


@pytest.fixture
def reads() -> Iterator[Reads]:
    with Reads() as pool:
        yield pool


def loaded(store: FactorStore, one: TensorPlan, reads: ReaderPool) -> list[bytes]:
    """Take a target's factors as a backend is given them, and give them back."""
    backend = Backend()
    factors = store.take(tile(one, 0, N), reads)
    # what is left of the factors is the part, as a tensor of its own
    assert all(f.is_whole for t in factors.target.terms for f in (t.a, t.b))
    assert factors.nbytes == factor_bytes(one)
    factors.loaded(backend)
    store.give_back(factors, rows=N)
    ((_, raw),) = backend.loads
    assert sum(map(len, raw)) <= factors.nbytes
    return raw


@pytest.mark.parametrize("dtype", [Dtype.BF16, Dtype.F32, Dtype.F64, Dtype.U8])
@pytest.mark.parametrize("max_shared_bytes", [0, 10**6])
@pytest.mark.parametrize("piece_bytes", [1, 40, 1 << 20])
def test_of_a_part_only_the_part_is_given(
    dtype: Dtype,
    max_shared_bytes: int,
    piece_bytes: int,
    tmp_path: Path,
    reads: Reads,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(factors_module, "PIECE_BYTES", piece_bytes)
    experts = Experts(tmp_path, dtype)
    store = FactorStore(10**6, max_shared_bytes=max_shared_bytes)
    for number in (0, 3, 5, 3):
        assert loaded(store, experts.target(number), reads) == experts.expected(number)
        columns = range(1, K, 3)
        some = experts.target(number, columns=columns)
        assert loaded(store, some, reads) == experts.expected(number, columns)


def test_a_factor_whose_parts_are_scattered_is_read_once(tmp_path: Path, reads: Reads) -> None:
    experts = Experts(tmp_path)
    store = FactorStore(10**6, max_shared_bytes=experts.b.nbytes)
    for number in range(EXPERTS):
        loaded(store, experts.target(number), reads)
    # the rows of A lie side by side, and are read by themselves
    assert reads.whole == ["b"]


def test_a_factor_that_there_is_no_room_for_is_not_kept(tmp_path: Path, reads: Reads) -> None:
    experts = Experts(tmp_path)
    store = FactorStore(10**6, max_shared_bytes=experts.b.nbytes - 1)
    for number in range(EXPERTS):
        assert loaded(store, experts.target(number), reads) == experts.expected(number)
    assert reads.whole == []


def test_what_was_not_asked_for_the_longest_makes_room(tmp_path: Path, reads: Reads) -> None:
    folders = [tmp_path / name for name in "abc"]
    layers = []
    for folder in folders:
        folder.mkdir()
        layers.append(Experts(folder))
    store = FactorStore(10**6, max_shared_bytes=2 * layers[0].b.nbytes)

    def asks(layer: int) -> int:
        before = len(reads.whole)
        assert loaded(store, layers[layer].target(1), reads) == layers[layer].expected(1)
        return len(reads.whole) - before

    assert [asks(layer) for layer in (0, 1, 0, 1, 0)] == [1, 1, 0, 0, 0]
    # the second goes, not the first
    assert [asks(layer) for layer in (2, 0, 2)] == [1, 0, 0]
    assert [asks(layer) for layer in (1, 2, 0)] == [1, 0, 1]


def test_parts_and_whole_factors_stand_side_by_side(tmp_path: Path, reads: Reads) -> None:
    experts = Experts(tmp_path)
    one = experts.target(2)
    (term,) = one.terms
    assert isinstance(term, LoraTerm)
    vector = StoredTensor("v", Dtype.BF16, (N,), experts.a.path, 2)
    whole = replace(term, a=Factor(experts.a), b=Factor(experts.b), magnitude=vector)
    terms: tuple[Term, ...] = (term, whole, BiasTerm(vector, 1.0))
    several = replace(one, op=ApplyTerms(Dtype.BF16, terms))
    backend = Backend()
    FactorStore(10**6, max_shared_bytes=10**6).take(tile(several, 0, N), reads).loaded(backend)
    ((_, raw),) = backend.loads
    expected = [experts.values_a.tobytes(), experts.values_b.tobytes()]
    assert raw[:4] == [*experts.expected(2), *expected]
    assert len(raw) == 5


def test_a_truncated_part_is_the_reader_s_error(tmp_path: Path, reads: Reads) -> None:
    experts = Experts(tmp_path)
    experts.a.path.write_bytes(experts.a.path.read_bytes()[:-1])
    for max_shared_bytes in (0, 10**6):
        store = FactorStore(10**6, max_shared_bytes=max_shared_bytes)
        with pytest.raises(CheckpointError, match="truncated"):
            store.take(tile(experts.target(0), 0, N), reads)
