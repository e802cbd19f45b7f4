"""What an export launches: the real launchers and compiler, for a GPU that is not there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import merges
import pytest
import torch
from fake_driver import fake_gpu
from simulated import SimulatedRuntime

import streammerge
from streammerge.backends.device_merge import load_kernels
from streammerge.backends.gpus import Gpus
from streammerge.engine import devices

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

BF16, F32 = torch.bfloat16, torch.float32


class MetaRuntime(SimulatedRuntime):
    """A device whose memory has a place and no contents."""

    def device(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device="meta")

    def upload(self, stream: Any, values: torch.Tensor) -> torch.Tensor:
        return values.to("meta")

    def copy(self, stream: Any, target: torch.Tensor, source: torch.Tensor) -> None:
        if source.device.type != "meta":
            super().copy(stream, target, source)


GROUPED, DORA = ["grouped_merge_kernel"], ["square_sum_kernel", "finish_kernel", "merge_kernel"]
CASES: dict[str, tuple[Callable[[merges.Builder], merges.Merge], list[str]]] = {
    # all small targets of the only block at once, one launch for each rank
    "lora": (lambda b: merges.lora(b, BF16), GROUPED),
    "experts": (lambda b: merges.experts(b, BF16), GROUPED),
    "dora": (lambda b: merges.dora(b, BF16), DORA * 14),
    "fp32": (lambda b: merges.lora(b, F32, factors=BF16), GROUPED),
    "ranks": (merges.ranks, GROUPED * 2),
    "in turn": (lambda b: merges.several(b, "peft"), GROUPED * 2),
    "at once": (lambda b: merges.several(b, "fp32"), GROUPED),
}
FAST = ("lora", "experts", "dora")


@pytest.mark.parametrize(
    "case", [c if c in FAST else pytest.param(c, marks=pytest.mark.slow) for c in CASES]
)
def test_an_export_launches_kernels_that_compile(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, expected = CASES[case]
    # a cache of its own, in which nothing is compiled yet
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    gpus = Gpus((MetaRuntime(),), load_kernels())
    monkeypatch.setattr(devices, "missing_driver", lambda: None)
    monkeypatch.setattr("streammerge.backends.select.missing_driver", lambda: None)
    monkeypatch.setattr(devices, "find_gpus", lambda: gpus)
    merge = make(merges.Builder(tmp_path / "inputs"))
    with fake_gpu("cuda", 90) as launches:
        streammerge.export(
            {**merge.on(tmp_path / "out", "cuda"), "max_memory": "4GB", "allow_nonfinite": True}
        )
    assert [launch.kernel for launch in launches] == expected
    for launch in launches:
        if launch.kernel == "merge_kernel":
            assert {"weight", "out"} <= launch.divisible
        if launch.kernel == "grouped_merge_kernel":
            # the pieces of a slot begin where 128 bits are read at a time
            assert launch.constants["IS_ALIGNED"]
