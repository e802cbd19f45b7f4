"""A driver that compiles launches for a GPU that is not there, and only notes them.

```
with fake_gpu("cuda", 90) as launches:
    lora_merge_(torch.empty(8192, 28672, device="meta", dtype=torch.bfloat16), terms)
assert launches[0].grid == (28672, 1, 1)
```

Tensors on the meta device have a shape and no memory; their pointer is 0, which counts as aligned.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import triton
from triton.backends.compiler import GPUTarget

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch, after it was compiled."""

    kernel: str
    grid: tuple[int, int, int]
    divisible: frozenset[str]
    """Names of the arguments that triton takes to be multiples of 16."""
    constants: dict[str, Any]
    num_warps: int


class Utilities:
    """What a launch asks of a device."""

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232_448, "multiprocessor_count": 132, "warpSize": 32}

    def load_binary(self, *args: object) -> tuple[None, int, int, int, int]:
        # module, function, registers, spills, threads
        return None, 1, 0, 0, 1024

    def unload_module(self, module: None) -> None:
        pass


class FakeDriver:
    """One device of a given kind."""

    def __init__(self, target: GPUTarget, launches: list[Launch]) -> None:
        self._target = target
        self.utils = Utilities()
        self.launcher_cls = lambda source, metadata: note_into(launches, source, metadata)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")

    def get_device_interface(self) -> NoReturn:
        raise RuntimeError("there is no device")

    @staticmethod
    def is_active() -> bool:
        return True


def note_into(launches: list[Launch], source: Any, metadata: Any) -> Callable[..., None]:
    names = source.fn.arg_names

    def by_name(values: dict[tuple[int, ...], Any]) -> dict[str, Any]:
        return {names[path[0]]: value for path, value in values.items()}

    divisible = {
        name for name, value in by_name(source.attrs).items() if ["tt.divisibility", 16] in value
    }

    def launch(grid_x: int, grid_y: int, grid_z: int, *args: object) -> None:
        launches.append(
            Launch(
                metadata.name,
                (grid_x, grid_y, grid_z),
                frozenset(divisible),
                by_name(source.constants),
                metadata.num_warps,
            )
        )

    return launch


@contextmanager
def fake_gpu(backend: str, architecture: int | str) -> Iterator[list[Launch]]:
    """Make a pretended GPU the active one."""
    launches: list[Launch] = []
    target = GPUTarget(backend, architecture, 64 if backend == "hip" else 32)
    drivers = triton.runtime.driver
    before = drivers._active
    drivers.set_active(FakeDriver(target, launches))
    try:
        yield launches
    finally:
        drivers._active = before
