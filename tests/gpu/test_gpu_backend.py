"""Exports through the GPU's backend on simulated devices, whose kernels compute in fp64."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import merges
import pytest
import torch
from simulated import SimulatedRuntime, every_choice
from stand_ins import ExactKernels

import streammerge
from streammerge.backends import triton_gpu
from streammerge.backends.gpus import Gpus
from streammerge.backends.triton_gpu import fit_ring
from streammerge.config.profile import MachineProfile, load_profile, save_profile
from streammerge.config.tuning import DiskTuning, GpuTuning, KernelShape
from streammerge.engine import devices, staging
from streammerge.errors import MemoryBudgetError, NonFiniteError, UnsupportedError

if TYPE_CHECKING:
    from pathlib import Path

MEMORY = "4GB"
BF16, F32 = torch.bfloat16, torch.float32


class Bench:
    """Exports a case on the CPU, and on simulated devices."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder, self._patch = folder, patch
        self.runtimes = [SimulatedRuntime()]
        self.kernels: ExactKernels | None = ExactKernels()
        self._count = 0
        patch.setattr(devices, "missing_driver", lambda: None)
        patch.setattr("streammerge.backends.select.missing_driver", lambda: None)
        patch.setattr(devices, "find_gpus", self.find)

    def find(self) -> Gpus:
        kernels = None if self.kernels is None else self.kernels.launchers()
        return Gpus(tuple(self.runtimes), kernels)

    def export(self, merge: merges.Merge, device: str, **settings: Any) -> Any:
        self._count += 1
        output = self.folder / f"{device}{self._count}"
        report = streammerge.export({**merge.on(output, device), "max_memory": MEMORY, **settings})
        return merges.load_folder(output), report

    def check(self, merge: merges.Merge, **settings: Any) -> Any:
        base = merges.load_folder(self.folder / "inputs" / "base")
        cpu, _ = self.export(merge, "cpu")
        gpu, report = self.export(merge, "cuda", **settings)
        merge.check(base, cpu, gpu)
        return report


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(tmp_path, monkeypatch)


@pytest.fixture
def build(tmp_path: Path) -> merges.Builder:
    return merges.Builder(tmp_path / "inputs")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", merges.CASES)
def test_every_target_is_merged_where_it_is_said(
    case: str, bench: Bench, build: merges.Builder
) -> None:
    make, where = merges.CASES[case]
    report = bench.check(make(build), threads=3)
    (note,) = [note for note in report.notes if note.startswith("merged with")]
    assert note.startswith(f"merged with simulated: {where}")


@pytest.mark.parametrize("eager", list(every_choice()), ids="-".join)
def test_tiles_go_through_small_slots_in_pieces(
    eager: tuple[str, ...], bench: Bench, build: merges.Builder, monkeypatch: pytest.MonkeyPatch
) -> None:
    # rows of one tile in several slots, and several tiles in one
    monkeypatch.setattr(triton_gpu, "MOST_SLOT_BYTES", 6144)
    bench.runtimes = [SimulatedRuntime(eager=eager)]
    merge = merges.dora_and_lora(build, "peft")
    bench.check(merge, threads=4)
    assert bench.kernels is not None
    assert bench.kernels.calls["dora"] > 14
    assert bench.runtimes[0].host_bytes == bench.runtimes[0].device_bytes


def test_small_targets_of_a_block_share_a_launch(bench: Bench, build: merges.Builder) -> None:
    bench.check(merges.experts(build, BF16))
    assert bench.kernels is not None
    # twelve matrices of experts, all in one block
    assert bench.kernels.calls == {"merge": 0, "dora": 0, "grouped": 1}
    assert bench.kernels.most_grouped == 12


def test_factors_go_to_a_device_once_for_each_target(bench: Bench, build: merges.Builder) -> None:
    bench.check(merges.lora(build, BF16), threads=1)
    assert bench.runtimes[0].uploads == 14 * 2


def test_threads_take_devices_in_turn(
    bench: Bench, build: merges.Builder, monkeypatch: pytest.MonkeyPatch
) -> None:
    # tiles of one target on several devices, which need its factors each
    monkeypatch.setattr(triton_gpu, "MOST_SLOT_BYTES", 6144)
    monkeypatch.setattr("streammerge.plan.memory.MIN_SLAB_BYTES", 8 << 10)
    monkeypatch.setattr(
        "streammerge.engine.machine.BUFFERED",
        DiskTuning("buffered", "buffered", 16 << 10, 1, 1),
    )
    bench.runtimes = [SimulatedRuntime(name="one"), SimulatedRuntime(name="two")]
    report = bench.check(merges.lora(build, F32, 20), threads=4, io="buffered")
    assert "merged with one, two: 14 by kernels" in report.notes
    uploads = [runtime.uploads for runtime in bench.runtimes]
    assert min(uploads) > 0
    assert 28 < sum(uploads) <= 56


def test_without_kernels_torch_merges_on_the_device(bench: Bench, build: merges.Builder) -> None:
    bench.kernels = None
    report = bench.check(merges.dora_and_lora(build, "peft"))
    assert "merged with simulated: 14 by torch on the GPU (no kernels)" in report.notes


def test_rows_larger_than_a_slot_are_merged_on_the_cpu(
    bench: Bench, build: merges.Builder, monkeypatch: pytest.MonkeyPatch
) -> None:
    # a slot has room for 240 bytes beside its flags; a row of down_proj in F32 has 320
    monkeypatch.setattr(triton_gpu, "MOST_SLOT_BYTES", 512)
    report = bench.check(merges.lora(build, F32))
    assert any(
        "12 by kernels, 2 on the CPU (rows larger than a slot)" in note for note in report.notes
    )


@pytest.mark.parametrize("slot_bytes", [2048, 1 << 20])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_result_that_is_not_finite_is_an_error_that_names_its_rows(
    value: float,
    slot_bytes: int,
    bench: Bench,
    build: merges.Builder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # in small slots the rows before and after it go by themselves
    monkeypatch.setattr(triton_gpu, "MOST_SLOT_BYTES", slot_bytes)
    merge = merges.lora(build, BF16)
    path = bench.folder / "inputs" / "base" / "model.safetensors"
    tensors = merges.load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"][30, 7] = value
    merges.save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(NonFiniteError, match="up_proj") as caught:
        bench.export(merge, "cuda")
    assert caught.value.where == "rows 0 to 79"
    found: dict[str, bool] = {}
    monkeypatch.setattr(
        "streammerge.engine.pipeline.Pipeline._check",
        lambda _, tile, *, is_finite: found.update({tile.target.name: is_finite}),
    )
    gpu, _ = bench.export(merge, "cuda", allow_nonfinite=True)
    assert len(found) == 14
    assert [name for name, is_finite in found.items() if not is_finite] == [
        "model.layers.1.mlp.up_proj.weight"
    ]
    cpu, _ = bench.export(merge, "cpu", allow_nonfinite=True)
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(gpu[name].isfinite(), cpu[name].isfinite())


def test_a_device_with_too_little_memory_is_an_error(bench: Bench, build: merges.Builder) -> None:
    merge = merges.lora(build, BF16)
    with pytest.raises(MemoryBudgetError, match="too little memory") as caught:
        bench.export(merge, "cuda", max_device_memory="10MB")
    assert caught.value.exit_code == 4
    bench.runtimes = [SimulatedRuntime(free=10**7)]
    with pytest.raises(MemoryBudgetError, match="too little memory"):
        bench.export(merge, "cuda")
    # as much as the message says is enough
    needed = int(str(caught.value.expected).split()[-1].removesuffix("MB"))
    bench.runtimes = [SimulatedRuntime(free=needed * 10**6)]
    bench.check(merge)


def test_slots_fit_the_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_gpu, "STEP_BYTES", 0)
    mib = 1 << 20
    assert fit_ring(room=10**9, block_bytes=8 * mib, factor_bytes=0).slots == 3
    # blocks of any size, slots of 64 MiB at most
    assert fit_ring(room=10**9, block_bytes=256 * mib, factor_bytes=0).slot_bytes == 64 * mib
    for room in range(7 * mib, 100 * mib, 5 * mib):
        found = fit_ring(room=room, block_bytes=8 * mib, factor_bytes=mib)
        assert (2 * found.slots + 1) * found.slot_bytes + mib <= room


def test_a_rerun_on_another_device_starts_over(bench: Bench, build: merges.Builder) -> None:
    # the devices' sums round otherwise, and an output is of one of them
    identities = []
    open_staging = staging.Staging.open

    def note(self: Any, identity: str) -> None:
        identities.append(identity)
        open_staging(self, identity)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(staging.Staging, "open", note)
        merge = merges.lora(build, BF16)
        for device in ("cpu", "cuda", "cpu"):
            bench.export(merge, device)
    assert identities[0] == identities[2] != identities[1]


@pytest.fixture
def profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "machine.json"
    monkeypatch.setenv("STREAMMERGE_PROFILE", str(path))
    return path


@pytest.mark.parametrize(("link", "cpu", "where"), [(20, 2, "kernels"), (2, 20, "CPU")])
def test_auto_takes_what_is_faster(
    link: float, cpu: float, where: str, bench: Bench, build: merges.Builder, profile: Path
) -> None:
    save_profile(MachineProfile(gpus={"simulated": GpuTuning(link, cpu)}))
    _, report = bench.export(merges.lora(build, BF16), "auto")
    assert any(where in note for note in report.notes)


def test_auto_measures_once(
    bench: Bench, build: merges.Builder, profile: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streammerge.engine.tune_gpu._LINK_BYTES", 1 << 16)
    merge = merges.lora(build, BF16)
    bench.export(merge, "auto")
    (found,) = load_profile()[0].gpus.values()
    assert found.link_gbps > 0
    assert found.cpu_gbps > 0
    monkeypatch.setattr("streammerge.engine.tune_gpu.measure_rates", None)
    bench.export(merge, "auto")


def test_kernels_have_the_shapes_that_were_measured(
    bench: Bench, build: merges.Builder, profile: Path
) -> None:
    shape = KernelShape(32, 64, 16, 4, 2)
    tuning = GpuTuning(20, 2, {"grouped fp32 16": shape})
    save_profile(MachineProfile(gpus={"simulated": tuning}))
    bench.check(merges.experts(build, BF16))
    assert bench.kernels is not None
    assert [dataclasses.asdict(found) for found in bench.kernels.shapes] == [
        dataclasses.asdict(shape)
    ]


def test_without_a_gpu_auto_says_so_and_cuda_is_an_error(
    bench: Bench, build: merges.Builder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "find_gpus", lambda: "torch finds no GPU that it can use")
    merge = merges.lora(build, BF16)
    _, report = bench.export(merge, "auto")
    expected = "export_device: auto: merged on the CPU: torch finds no GPU that it can use"
    assert expected in report.notes
    with pytest.raises(UnsupportedError, match="cuda needs a GPU; got torch finds no GPU"):
        bench.export(merge, "cuda")


def test_what_is_only_copied_needs_no_device(bench: Bench, build: merges.Builder) -> None:
    merge = merges.lora(build, BF16)
    _, report = bench.export(merge, "cuda", adapter_name_or_path=None)
    assert report.tensors_changed == 0
    assert not bench.runtimes[0].host_bytes


def test_a_comparison_finds_what_is_beyond_its_bound(build: merges.Builder) -> None:
    merge = merges.lora(build, BF16)
    before = {"w": torch.full((64, 64), 1.0, dtype=BF16), "x": torch.zeros(3)}
    after = {"w": torch.full((64, 64), 1.5, dtype=BF16), "x": torch.zeros(3)}
    merge.check(before, after, after)
    # two units above, an untouched tensor with another zero, and many that differ by one unit
    for name, index, value in (("w", 5, 1.5 + 2**-4), ("x", 1, -0.0), ("w", slice(64), 1.5078125)):
        changed = {key: tensor.clone() for key, tensor in after.items()}
        changed[name].view(-1)[index] = value
        with pytest.raises(AssertionError):
            merge.check(before, after, changed)
