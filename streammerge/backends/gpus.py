"""Which GPUs there are, and whether kernels run on them. Imports torch when it is asked."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from streammerge.errors import ConfigError

if TYPE_CHECKING:
    from streammerge.backends.device_merge import Kernels
    from streammerge.backends.streams import Runtime

__all__ = ["Gpus", "find_gpus", "kernel_errors", "missing_driver"]

# for tests: `module:function` that gives the devices instead; or `triton-interpret`, which is those
# of a checkout's own tests
_VARIABLE = "STREAMMERGE_BACKEND"
_INTERPRETED = ("triton-interpret", "interpreted:find_gpus")
_TESTS = Path(__file__).parents[2] / "tests" / "gpu"
_DRIVERS = ("libcuda.so.1", "libamdhip64.so")
# what Triton's code needs of a GPU
_LEAST_CAPABILITY = (8, 0)


@dataclass(frozen=True, slots=True)
class Gpus:
    """The devices of a run."""

    runtimes: tuple[Runtime, ...]
    kernels: Kernels | None
    """None: torch does the arithmetic on them."""
    notes: tuple[str, ...] = ()


def missing_driver() -> str | None:
    """Say why there can be no GPU, as far as that is known without torch; None if there may be."""
    if os.environ.get(_VARIABLE):
        return None
    for name in _DRIVERS:
        try:
            ctypes.CDLL(name)
        except OSError:
            continue
        return None
    return f"no GPU driver is installed ({' or '.join(_DRIVERS)})"


def find_gpus() -> Gpus | str:
    """Open the GPUs that torch sees; if there is none, say why."""
    named = os.environ.get(_VARIABLE)
    if named:
        return _named_gpus(named)
    import torch  # noqa: PLC0415 (a second)

    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is built without support for GPUs"
    if not torch.cuda.is_available():
        return "torch finds no GPU that it can use"
    from streammerge.backends.cuda_runtime import CudaRuntime  # noqa: PLC0415

    runtimes = tuple(CudaRuntime(index) for index in range(torch.cuda.device_count()))
    kernels = _find_kernels()
    if isinstance(kernels, str):
        note = f"no kernels on the GPU, torch does the arithmetic there: {kernels}"
        return Gpus(runtimes, None, (note,))
    return Gpus(runtimes, kernels)


def _named_gpus(named: str) -> Gpus:
    """Return the devices that a test supplies.

    Raises:
        ConfigError: It supplies none.
    """
    if named == _INTERPRETED[0]:
        named = _INTERPRETED[1]
        sys.path.append(str(_TESTS))
    module, _, function = named.partition(":")
    try:
        found: Gpus = getattr(import_module(module), function)()
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"{_VARIABLE} names no supplier of devices ({error})",
            expected=f"module:function, or {_INTERPRETED[0]} in a checkout with its tests",
            got=named,
            hint=f"unset {_VARIABLE}: it is for tests",
        ) from error
    return found


def _find_kernels() -> Kernels | str:
    """Load the kernels and try one on each GPU; if that does not work, say why."""
    import torch  # noqa: PLC0415

    if torch.version.hip is None:
        for index in range(torch.cuda.device_count()):
            found = torch.cuda.get_device_capability(index)
            if found < _LEAST_CAPABILITY:
                return f"compute capability {found[0]}.{found[1]} is below 8.0"
    from streammerge.backends.device_merge import load_kernels  # noqa: PLC0415

    try:
        kernels = load_kernels()
    except ModuleNotFoundError:
        return "Triton is not installed; pip install 'streammerge[gpu]'"
    for index in range(torch.cuda.device_count()):
        if why := _why_it_fails(kernels, index):
            return why
    return kernels


def kernel_errors() -> tuple[type[Exception], ...]:
    """Return what a launch raises if a kernel cannot run.

    Triton compiles its launcher with the system's C compiler, and its kernels with tools of its
    own, so that there is more than one thing to go wrong.
    """
    from triton.errors import TritonError  # noqa: PLC0415

    return (TritonError, RuntimeError, OSError, subprocess.SubprocessError)


def _why_it_fails(kernels: Kernels, index: int) -> str | None:
    """Launch a kernel on a GPU; return the error in one line, or None if there is none."""
    try:
        _try_kernel(kernels, index)
    except kernel_errors() as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return None


def _try_kernel(kernels: Kernels, index: int) -> None:
    """Merge a small weight.

    Raises:
        RuntimeError: The result is wrong.
    """
    import torch  # noqa: PLC0415

    device = torch.device("cuda", index)
    weight = torch.zeros((16, 16), dtype=torch.bfloat16, device=device)
    a, b = (torch.ones((16, 16), dtype=torch.bfloat16, device=device) for _ in range(2))
    kernels.merge(weight, [(a, b, 0.5)])
    if not bool((weight == 8).all()):
        raise RuntimeError("a kernel gives a wrong result")
