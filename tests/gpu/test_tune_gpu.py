"""What is measured of GPUs, on a simulated one whose kernels are as fast as a test says."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from simulated import SimulatedRuntime
from stand_ins import ExactKernels
from typer.testing import CliRunner

from streammerge.backends.device_merge import Kernels
from streammerge.backends.gpus import Gpus
from streammerge.cli.app import app
from streammerge.config.profile import MachineProfile, load_profile, save_profile
from streammerge.config.tuning import MIB, DiskTuning, GpuTuning, KernelShape
from streammerge.engine import tune_gpu

if TYPE_CHECKING:
    from pathlib import Path

FAST = (64, 128, 4)


class Clock:
    """Time that passes when a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        self.now += 1e-6
        return self.now


class TimedKernels(ExactKernels):
    """Fast with one shape of tiles; refuses those of more than 128 columns."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock

    def wait(self, config: Any) -> None:
        if config is not None and config.block_k > 128:
            raise RuntimeError("out of resource: shared memory")
        found = config and (config.block_n, config.block_k, config.num_warps)
        self.clock.now += 0.001 if found == FAST else 0.002

    def merge(self, *args: Any, config: Any = None, **options: Any) -> None:
        self.wait(config)
        super().merge(*args, config=config, **options)

    def dora(self, *args: Any, config: Any = None, **options: Any) -> None:
        self.clock.now += 0.002
        super().dora(*args, config=config, **options)

    def grouped(self, *args: Any, config: Any = None, **options: Any) -> None:
        raise RuntimeError("no kernel")

    def launchers(self) -> Kernels:
        return Kernels(self.merge, self.dora, self.grouped)


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune_gpu, "_LINK_BYTES", 1 << 16)
    monkeypatch.setattr(tune_gpu, "_LAUNCHES", 1)
    sizes = {"merge": (8, 16, 1), "dora": (8, 16, 1), "grouped": (8, 16, 3)}
    monkeypatch.setattr(tune_gpu, "_SIZES", sizes)
    monkeypatch.setattr(tune_gpu, "missing_driver", lambda: None)
    monkeypatch.setattr(tune_gpu, "measure_cpu", lambda *_: 2.5)
    eager = ("in", "compute", "out")
    runtimes = tuple(SimulatedRuntime(eager=eager, name="one GPU") for _ in range(2))
    clock = Clock()
    monkeypatch.setattr(tune_gpu, "time", clock)
    found = Gpus(runtimes, TimedKernels(clock).launchers(), ("a note",))
    monkeypatch.setattr(tune_gpu, "find_gpus", lambda: found)


@pytest.fixture
def profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "machine.json"
    monkeypatch.setenv("STREAMMERGE_PROFILE", str(path))
    return path


def test_the_fastest_shape_that_a_device_takes_is_chosen() -> None:
    lines: list[str] = []
    found = tune_gpu.tune_gpus(threads=2, progress=lines.append)
    # two devices of one kind are measured once
    (tuning,) = found.gpus.values()
    assert tuning.cpu_gbps == 2.5
    assert tuning.link_gbps > 0
    half = tuning.kernels
    # no other shape is faster than the kernels' own
    assert set(half) == {"merge half 16", "merge half 64", "merge half 256"}
    assert {(s.block_n, s.block_k, s.num_warps) for s in half.values()} == {FAST}
    assert half["merge half 16"].block_r == 16
    assert lines[0] == "a note"
    assert "one GPU: grouped half 16: no shape can be launched" in lines
    cells = found.measurements["gpus"]
    assert not any(cell["shape"] and cell["shape"]["block_k"] > 128 for cell in cells
                   if cell["kernel"].startswith("merge"))  # fmt: skip


def test_quick_measures_rates_alone() -> None:
    found = tune_gpu.tune_gpus(threads=1, quick=True)
    assert found.gpus["one GPU"].kernels == {}
    assert found.measurements == {"gpus": []}


def test_the_command_keeps_what_else_is_known(profile: Path) -> None:
    save_profile(MachineProfile(disks={"8:1 /": DiskTuning(block_bytes=MIB)}))
    result = CliRunner().invoke(app, ["tune", "--gpu"])
    assert result.exit_code == 0, result.output
    assert "one GPU" in result.stdout
    assert "64 x 128 x 16" in result.stdout
    found, note = load_profile()
    assert note is None
    assert found.disks == {"8:1 /": DiskTuning(block_bytes=MIB)}
    assert "merge half 64" in found.gpus["one GPU"].kernels
    result = CliRunner().invoke(app, ["tune", "--gpu", "--quick", "--json"])
    assert json.loads(result.stdout)["written_to"] == str(profile)


def test_without_a_gpu_there_is_nothing_to_measure(
    profile: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune_gpu, "missing_driver", lambda: "no driver")
    result = CliRunner().invoke(app, ["tune", "--gpu"])
    assert result.exit_code == 2
    assert "there is no GPU to measure; got no driver" in result.stderr
    assert not profile.exists()


@pytest.mark.parametrize(
    "change",
    [
        {"link_gbps": 0}, {"link_gbps": True}, {"cpu_gbps": "fast"}, {"more": 1},
        {"kernels": {"merge half 16": {"block_n": 64}}},
        {"kernels": {"merge half 16": {"block_n": 65, "block_k": 64, "block_r": 16,
                                       "num_warps": 4, "num_stages": 2}}},
        {"kernels": []},
    ],
)  # fmt: skip
def test_a_profile_with_other_values_is_left_aside(change: dict[str, Any], profile: Path) -> None:
    shape = KernelShape(64, 64, 16, 4, 2)
    save_profile(MachineProfile(gpus={"G": GpuTuning(20.5, 2, {"merge half 16": shape})}))
    assert load_profile()[0].gpus["G"].kernels == {"merge half 16": shape}
    written = json.loads(profile.read_text())
    written["gpus"]["G"].update(change)
    profile.write_text(json.dumps(written))
    found, note = load_profile()
    assert found == MachineProfile()
    assert note is not None
    assert "G" in note or "kernels" in note
