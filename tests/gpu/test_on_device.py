"""The exports of the simulated devices on real ones."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

import merges
import pytest
import torch

import streammerge
from streammerge.backends.gpus import find_gpus, missing_driver
from streammerge.engine.tune_gpu import measure_rates

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore"),
]
ROOM = 10**9


@pytest.mark.parametrize("case", merges.CASES)
def test_an_export_is_within_a_unit_of_the_cpu(case: str, tmp_path: Path) -> None:
    make, where = merges.CASES[case]
    merge = make(merges.Builder(tmp_path / "inputs"))
    report = {}
    for device in ("cpu", "cuda"):
        settings = merge.on(tmp_path / device, device)
        report[device] = streammerge.export(
            {**settings, "max_memory": "12GB", "max_device_memory": ROOM, "threads": 4}
        )
    base = merges.load_folder(tmp_path / "inputs" / "base")
    merge.check(base, *(merges.load_folder(tmp_path / device) for device in report))
    (note,) = [note for note in report["cuda"].notes if note.startswith("merged with")]
    assert f": {where}" in note


def test_a_run_gives_the_same_bytes_every_time(tmp_path: Path) -> None:
    merge = merges.dora_and_lora(merges.Builder(tmp_path / "inputs"), "peft")
    digests = []
    for number in range(3):
        settings = {**merge.on(tmp_path / str(number), "cuda"), "max_memory": "12GB"}
        report = streammerge.export({**settings, "threads": number + 1})
        digests.append([shard["digest"] for shard in report.shards])
    assert digests[0] == digests[1] == digests[2]


def test_memory_of_the_device_stays_below_its_ceiling(tmp_path: Path) -> None:
    gc.collect()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    merge = merges.lora(merges.Builder(tmp_path / "inputs"), torch.float64)
    settings = {**merge.on(tmp_path / "out", "cuda"), "max_memory": "12GB"}
    streammerge.export({**settings, "max_device_memory": ROOM})
    assert torch.cuda.max_memory_allocated() - before <= ROOM
    gc.collect()
    assert torch.cuda.memory_allocated() == before


def test_the_link_is_measured() -> None:
    assert missing_driver() is None
    found = find_gpus()
    assert not isinstance(found, str)
    tuning = measure_rates(found.runtimes[0], threads=2)
    assert 0.1 < tuning.link_gbps < 1000
    assert 0.01 < tuning.cpu_gbps < 1000
