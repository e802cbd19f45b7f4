"""Which devices are found, and what is said where there is none, or none that runs kernels."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
from stand_ins import ExactKernels

from streammerge.backends import cuda_runtime, device_merge, gpus
from streammerge.backends.gpus import Gpus, find_gpus, missing_driver
from streammerge.errors import ConfigError, MemoryBudgetError

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture
def drivers(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let the system have some libraries and no others."""

    def have(*names: str) -> None:
        def load(name: str) -> None:
            if name not in names:
                raise OSError(name)

        monkeypatch.setattr(ctypes, "CDLL", load)

    return have


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torch see a GPU, that does nothing."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(device_merge, "load_kernels", ExactKernels().launchers)
    monkeypatch.setattr(gpus, "_try_kernel", lambda *_: None)


def test_a_driver_of_either_maker_will_do(drivers: Callable[..., None]) -> None:
    drivers()
    reason = missing_driver()
    assert reason is not None
    assert "no GPU driver is installed" in reason
    for name in ("libcuda.so.1", "libamdhip64.so"):
        drivers(name)
        assert missing_driver() is None


def test_what_torch_lacks_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    assert "is built without support for GPUs" in str(find_gpus())
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_gpus() == "torch finds no GPU that it can use"


@pytest.mark.parametrize("named", ["nothing_of_that_name", "json:nothing", "json"])
def test_a_supplier_that_is_not_there_is_an_error(
    named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STREAMMERGE_BACKEND", named)
    assert missing_driver() is None
    with pytest.raises(ConfigError, match=f"supplier of devices.*got {named}; unset STREAM"):
        find_gpus()


@pytest.mark.usefixtures("gpu")
def test_every_gpu_is_a_device() -> None:
    found = find_gpus()
    assert isinstance(found, Gpus)
    assert [runtime.name for runtime in found.runtimes] == ["GPU", "GPU"]
    assert all(isinstance(runtime, cuda_runtime.CudaRuntime) for runtime in found.runtimes)
    assert found.kernels is not None
    assert found.notes == ()


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("where", "what", "reason"),
    [
        ("capability", (7, 5), "compute capability 7.5 is below 8.0"),
        ("load", ModuleNotFoundError("triton"), "Triton is not installed"),
        ("try", RuntimeError("a kernel\n gives a wrong result"), "a kernel gives a wrong result"),
        ("try", OSError("no C compiler"), "OSError: no C compiler"),
        ("try", subprocess.CalledProcessError(1, "cc"), "CalledProcessError: Command 'cc'"),
    ],
)
def test_without_kernels_torch_does_the_arithmetic_and_that_is_said(
    where: str, what: Any, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise what

    if where == "capability":
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: what)
    else:
        places = {"load": (device_merge, "load_kernels"), "try": (gpus, "_try_kernel")}
        monkeypatch.setattr(*places[where], fail)
    found = find_gpus()
    assert isinstance(found, Gpus)
    assert found.kernels is None
    (note,) = found.notes
    assert "torch does the arithmetic there" in note
    assert reason in note
    assert "\n" not in note


@pytest.mark.usefixtures("gpu")
def test_a_lack_of_memory_is_an_error_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = cuda_runtime.CudaRuntime(0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def fail() -> None:
        raise torch.cuda.OutOfMemoryError("tried to allocate\n2 GiB")

    # without a GPU torch takes no notice of streams
    with pytest.raises(MemoryBudgetError, match="a GPU is out of memory, in GPU; got tried to all"):
        runtime.launch(None, fail)  # type: ignore[arg-type]
    done: list[int] = []
    runtime.launch(None, lambda: done.append(1))  # type: ignore[arg-type]
    target = torch.zeros(3)
    runtime.copy(None, target, torch.ones(3))  # type: ignore[arg-type]
    assert (done, target.tolist()) == ([1], [1, 1, 1])


def test_the_question_for_a_driver_does_not_import_torch() -> None:
    code = (
        "import sys; from streammerge.backends.gpus import missing_driver; missing_driver(); "
        "assert not {'torch', 'triton'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
