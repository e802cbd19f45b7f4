"""The GPU backend: blocks through `streams.Ring`, their targets merged by kernels.

Where a target is merged is decided once, when its factors are loaded: by a kernel, by torch on the
device, or by the CPU's backend. The notes of a run say how many were merged where.

Each thread that merges has a device, dealt in turn. A target's factors are uploaded to a device
when it first merges rows of it, and freed with the target's last row.
"""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from streammerge.backends.base import TargetFactors
from streammerge.backends.batches import ALIGNMENT, Batch, cut_tile, rows_that_fit
from streammerge.backends.device_merge import (
    SCRATCH_STEPS,
    STEP_BYTES,
    Part,
    merge_with_kernels,
    merge_with_torch,
)
from streammerge.backends.device_terms import Place, find_place, load_device_terms
from streammerge.backends.streams import Job, Ring
from streammerge.errors import MemoryBudgetError

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence

    import torch

    from streammerge.backends.base import SourceReader, Tile
    from streammerge.backends.batches import Piece
    from streammerge.backends.device_merge import Kernels
    from streammerge.backends.device_terms import DeviceTerm
    from streammerge.backends.streams import Runtime
    from streammerge.backends.torch_cpu import TorchCpuBackend
    from streammerge.checkpoint.header import StoredTensor
    from streammerge.plan.ops import Numerics, TensorPlan

__all__ = ["GpuBackend", "GpuMemory", "fit_ring"]

# two blocks share a slot, and three slots keep both directions of the link busy; slots of more than
# 64 MiB gain a percent (calculated for PCIe 4 and 5)
SLOTS = 3
MOST_SLOT_BYTES = 64 << 20
LEAST_SLOT_BYTES = 1 << 20

_SHOWN = {"kernel": "by kernels", "torch": "by torch on the GPU", "cpu": "on the CPU"}


@dataclass(frozen=True, slots=True)
class GpuMemory:
    """What a run takes of each device, and twice as much in slots of pinned memory."""

    slots: int
    slot_bytes: int
    """Most bytes of a slot's input, and of its output."""


def fit_ring(*, room: int, block_bytes: int, factor_bytes: int) -> GpuMemory:
    """Choose the slots of a device.

    Args:
        room: Bytes that may be taken of it.
        block_bytes: Most bytes of a block.
        factor_bytes: Most bytes of factors in flight.

    Raises:
        MemoryBudgetError: The least there can be does not fit.
    """
    # tiles are moved apart until each is aligned
    wanted = min(MOST_SLOT_BYTES, block_bytes + max(block_bytes // 8, 64 << 10))
    wanted -= wanted % ALIGNMENT
    small = min(wanted, LEAST_SLOT_BYTES)
    fixed = factor_bytes + SCRATCH_STEPS * STEP_BYTES
    for slots, slot_bytes in ((SLOTS, wanted), (2, wanted), (SLOTS, small), (1, small)):
        # input and output, and once the deltas of a block, where these are rounded first
        if (2 * slots + 1) * slot_bytes + fixed <= room:
            return GpuMemory(slots, slot_bytes)
    raise MemoryBudgetError(
        "a GPU has too little memory for this merge",
        expected=f"at least {-(-(fixed + 3 * small) // 10**6)}MB",
        got=f"{room // 10**6}MB",
        hint="set a larger max_device_memory, or export_device: cpu",
    )


@dataclass(slots=True)
class _Target(TargetFactors):
    """A target that is merged on devices."""

    place: Place
    terms: list[DeviceTerm]
    """On the host."""
    rows_left: int
    on: dict[int, list[DeviceTerm]] = field(default_factory=dict)
    """On each device, by its number."""
    lock: threading.Lock = field(default_factory=threading.Lock)


class _Device(NamedTuple):
    number: int
    ring: Ring


class GpuBackend:
    """Merge blocks on GPUs."""

    name = "gpu"

    def __init__(
        self,
        *,
        cpu: TorchCpuBackend,
        runtimes: Sequence[Runtime],
        kernels: Kernels | None,
        memory: GpuMemory,
        numerics: Numerics,
    ) -> None:
        """Allocate the rings.

        Args:
            cpu: Merges what no device does; closed with this one.
            runtimes: The devices.
            kernels: What devices launch; without them torch does the arithmetic there.
            memory: What is taken of each.
            numerics: What a merge rounds, and when.
        """
        self._cpu, self._kernels, self._numerics = cpu, kernels, numerics
        self._slot_bytes = memory.slot_bytes
        self._devices = [
            _Device(number, Ring(runtime, slots=memory.slots, slot_bytes=memory.slot_bytes))
            for number, runtime in enumerate(runtimes)
        ]
        self._names = ", ".join(dict.fromkeys(runtime.name for runtime in runtimes))
        self._local = threading.local()
        self._counting = threading.Lock()
        self._threads = 0
        self._places: Counter[Place] = Counter()

    def close(self) -> None:
        """Wait for the devices, and give back their memory, and what the CPU's backend took."""
        for device in self._devices:
            device.ring.close()
        self._devices.clear()
        self._local = threading.local()
        self._cpu.close()

    def notes(self) -> list[str]:
        """Say how many targets were merged where."""
        places = sorted(self._places, key=lambda place: (list(_SHOWN).index(place.where), place))
        counts = [
            f"{self._places[place]} {_SHOWN[place.where]}"
            + (f" ({place.reason})" if place.reason else "")
            for place in places
        ]
        return [f"merged with {self._names}: {', '.join(counts)}"] if counts else []

    def load_factors(
        self,
        target: TensorPlan,
        raw: Mapping[StoredTensor, bytearray],
        read_source: SourceReader | None = None,
    ) -> TargetFactors:
        """Decide where a target is merged, and convert its factors for that."""
        place = find_place(target, numerics=self._numerics, has_kernels=self._kernels is not None)
        if place.where != "cpu" and not rows_that_fit(target, self._slot_bytes):
            place = Place("cpu", "rows larger than a slot")
        with self._counting:
            self._places[place] += 1
        if place.where == "cpu":
            return self._cpu.load_factors(target, raw, read_source)
        terms = load_device_terms(target, raw, place=place, numerics=self._numerics)
        return _Target(place, terms, target.rows)

    def side(self, factors: TargetFactors, part: int) -> memoryview:
        """Return one of the tensors that describe the codes of a weight, merged on the CPU."""
        return self._cpu.side(factors, part)

    def apply_block(self, tiles: Iterable[tuple[Tile, TargetFactors]]) -> Iterator[bool]:
        """Merge the tiles of one block, as many at a time as go through a slot together.

        What the CPU merges ends a batch: the sources before it have then left the buffer, and so
        its output may go where they were.
        """
        device = self._own_device()
        batch, is_finite = Batch[_Target](self._slot_bytes), True
        for tile, factors in tiles:
            if not isinstance(factors, _Target):
                is_finite = yield from self._merge(device, batch, is_finite=is_finite)
                batch = Batch(self._slot_bytes)
                yield from self._cpu.apply_block([(tile, factors)])
                continue
            for piece in cut_tile(tile, factors, slot_bytes=self._slot_bytes):
                if not batch.add(piece):
                    is_finite = yield from self._merge(device, batch, is_finite=is_finite)
                    batch = Batch(self._slot_bytes)
                    batch.add(piece)
        yield from self._merge(device, batch, is_finite=is_finite)

    def _own_device(self) -> _Device:
        """Return this thread's device."""
        if not hasattr(self._local, "device"):
            with self._counting:
                self._local.device = self._devices[self._threads % len(self._devices)]
                self._threads += 1
        device: _Device = self._local.device
        return device

    def _merge(
        self, device: _Device, batch: Batch[_Target], *, is_finite: bool
    ) -> Generator[bool, None, bool]:
        """Merge a batch; yield what `apply_block` does for each tile that ends in it.

        Args:
            device: Where.
            batch: The pieces.
            is_finite: What is known of the tile that the batch before began.

        Returns:
            What is known of the tile that the next batch goes on with.
        """
        if not batch.pieces:
            return is_finite
        found = self._run(device, batch)
        for piece, is_piece_finite in zip(batch.pieces, found, strict=True):
            self._count_rows(piece)
            is_finite = is_finite and is_piece_finite
            if piece.is_last:
                yield is_finite
                is_finite = True
        return is_finite

    def _run(self, device: _Device, batch: Batch[_Target]) -> list[bool]:
        """Take a batch through a slot; return which of its pieces are finite."""
        uploaded = [self._upload(device, piece.owner) for piece in batch.pieces]
        found: list[bool] = []

        def compute(given: torch.Tensor, result: torch.Tensor) -> None:
            parts = [
                Part(p.tile.target, terms, p.begin, p.rows_in(given), p.rows_out(result))
                for p, terms in zip(batch.pieces, uploaded, strict=True)
            ]
            self._compute([piece.owner.place for piece in batch.pieces], parts)
            batch.note_extremes(result)

        device.ring.run(
            Job(
                batch.input_bytes,
                batch.output_bytes,
                fill=batch.fill,
                compute=compute,
                drain=lambda slot: found.extend(batch.drain(slot)),
            )
        )
        return found

    def _compute(self, places: Sequence[Place], parts: Sequence[Part]) -> None:
        by_kernels = []
        for place, part in zip(places, parts, strict=True):
            if place.where == "kernel":
                by_kernels.append(part)
            else:
                merge_with_torch(part, self._numerics)
        if by_kernels:
            assert self._kernels is not None
            merge_with_kernels(self._kernels, by_kernels)

    def _upload(self, device: _Device, target: _Target) -> list[DeviceTerm]:
        """Return a target's terms on a device; whoever asks first queues the copies."""
        with target.lock:
            found = target.on.get(device.number)
            if found is None:
                found = [term.moved(device.ring.upload) for term in target.terms]
                target.on[device.number] = found
                if len(self._devices) == 1:
                    target.terms = []
            return found

    @staticmethod
    def _count_rows(piece: Piece[_Target]) -> None:
        """Free the terms of a target with its last row: nothing that reads them is queued then."""
        target = piece.owner
        with target.lock:
            target.rows_left -= piece.end - piece.begin
            if not target.rows_left:
                target.on.clear()
                target.terms = []
