"""An export measured against the floor: the same bytes read and written without arithmetic."""

from __future__ import annotations

import os
import platform
import statistics
import tempfile
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streammerge.checkpoint.mounts import mount_of
from streammerge.checkpoint.writer import require_space, writing
from streammerge.config.tuning import DiskTuning
from streammerge.engine.export import rehearse
from streammerge.engine.floor import move_bytes
from streammerge.engine.machine import choose_io
from streammerge.engine.prepare import prepare
from streammerge.engine.tune_disk import drop_pages

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from streammerge.config import ExportConfig
    from streammerge.engine.floor import FloorResult
    from streammerge.plan.merge_plan import MergePlan
    from streammerge.report.export_report import ExportReport

__all__ = ["BenchReport", "bench"]

# files that are being written, and one that waits to be
_FILES_IN_FLIGHT = 2


@dataclass(frozen=True, slots=True)
class BenchReport:
    """What was measured."""

    machine: str
    """Processor, memory, file systems and versions in one line."""
    base: str
    bytes_written: int
    """Of one export."""
    floor_bytes: int
    """Of the base's weight files."""
    seconds: float
    """Of an export; the median."""
    floor_seconds: float
    runs_seconds: tuple[float, ...]
    floor_runs_seconds: tuple[float, ...]
    busy_seconds: dict[str, float]
    """Of reading, merging and writing, over the threads of each; in the run nearest the median."""
    threads: dict[str, int]
    floor_tuning: dict[str, Any]
    peak_rss_bytes: int
    """VmHWM of the process after the first export, before it did anything else."""

    @property
    def ratio(self) -> float:
        """Return how many times the floor's time an export takes."""
        return self.seconds / self.floor_seconds

    @property
    def binding(self) -> str:
        """Return the stage whose threads were busy for the longest."""
        return max(self.busy_seconds, key=lambda s: self.busy_seconds[s] / self.threads[s])

    def to_dict(self) -> dict[str, Any]:
        """Give the report as JSON types."""
        return {
            **asdict(self),
            "gbps": self.bytes_written / self.seconds / 10**9,
            "floor_gbps": self.floor_bytes / self.floor_seconds / 10**9,
            "ratio": self.ratio,
            "binding": self.binding,
        }


def bench(
    config: ExportConfig, *, runs: int = 3, progress: Callable[[str], None] = lambda _: None
) -> BenchReport:
    """Rehearse an export and measure the floor in turn, with cold inputs. Imports torch.

    Nothing is published, and each shard is deleted when it is finished.

    Args:
        config: The export.
        runs: How often both are done, at least once.
        progress: Told in a line what was measured.

    Raises:
        StreamMergeError: The export would fail, or its disk has no room for the floor.
    """
    plan = prepare(config)
    tuning = _best(config, plan)
    weights = sorted({t.source.path for t in plan.tensors if t.source.path.parent == plan.base})
    factors = {f.path for t in plan.tensors for term in t.terms for f in term.factors}
    exports: list[ExportReport] = []
    floors: list[FloorResult] = []
    for run in range(1, runs + 1):
        drop_pages([*weights, *factors])
        exports.append(rehearse(config))
        progress(f"run {run} of {runs}: export {exports[-1].seconds:.2f} s")
        drop_pages(weights)
        floors.append(_floor(weights, plan.output, tuning))
        progress(f"run {run} of {runs}: floor {floors[-1].seconds:.2f} s")
    seconds = statistics.median(report.seconds for report in exports)
    typical = min(exports, key=lambda report: abs(report.seconds - seconds))
    return BenchReport(
        machine=_machine_line(plan.base, plan.output),
        base=str(plan.base),
        bytes_written=typical.bytes_written,
        floor_bytes=floors[0].nbytes,
        seconds=seconds,
        floor_seconds=statistics.median(result.seconds for result in floors),
        runs_seconds=tuple(report.seconds for report in exports),
        floor_runs_seconds=tuple(result.seconds for result in floors),
        busy_seconds={
            "read": typical.read_seconds,
            "compute": typical.compute_seconds,
            "write": typical.write_seconds,
        },
        threads={
            "read": plan.io.readers,
            "compute": plan.memory.workers,
            "write": plan.io.writers,
        },
        floor_tuning=asdict(tuning),
        peak_rss_bytes=exports[0].peak_rss_bytes,
    )


def _best(config: ExportConfig, plan: MergePlan) -> DiskTuning:
    """Return the best known way to read and write there, whatever the configuration asks for."""
    best = config.model_copy(update={"io": "auto", "export_legacy_format": False})
    io, shape, _ = choose_io(best, base=plan.base, output=plan.output)
    return DiskTuning(io.read_mode, io.write_mode, shape.block_bytes, io.readers, io.writers)


def _floor(weights: Sequence[Path], output: Path, tuning: DiskTuning) -> FloorResult:
    """Move the weights to where the output would be, and delete each copy.

    Raises:
        DiskSpaceError: The copies in flight do not fit.
    """
    place = next(folder for folder in output.parents if folder.exists())
    sizes = sorted((path.stat().st_size for path in weights), reverse=True)
    require_space(
        place,
        needed=sum(sizes[:_FILES_IN_FLIGHT]),
        purpose="to measure the floor",
        hint="free some space, or set export_dir on another disk",
    )
    with writing(place):
        folder = tempfile.TemporaryDirectory(prefix=f".{output.name}.floor-", dir=place)
    with folder as name:
        return move_bytes(weights, Path(name), tuning=tuning, discard=True)


def _machine_line(base: Path, output: Path) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    kinds = [mount_of(path).fs_type for path in (base, output)]
    disks = kinds[0] if kinds[0] == kinds[1] else f"{kinds[0]} to {kinds[1]}"
    return (
        f"{models[0] if models else platform.machine()}, {len(os.sched_getaffinity(0))} cores, "
        f"{memory / 10**9:.0f} GB memory, {disks}, Linux {platform.release()}, "
        f"torch {version('torch')}"
    )
