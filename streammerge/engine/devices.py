"""Where a run merges: on the CPU, or on GPUs, by what was asked for and by what is faster."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from streammerge.backends.gpus import find_gpus, missing_driver
from streammerge.backends.select import GpuRoom, no_gpu, select_backend, select_gpu_backend
from streammerge.config.profile import MachineProfile, load_profile, save_profile
from streammerge.errors import ConfigError

if TYPE_CHECKING:
    from streammerge.backends.base import Backend
    from streammerge.backends.gpus import Gpus
    from streammerge.backends.triton_gpu import GpuBackend
    from streammerge.config import ExportConfig
    from streammerge.config.tuning import GpuTuning
    from streammerge.plan.memory import MemoryPlan
    from streammerge.plan.merge_plan import MergePlan

__all__ = ["Devices", "choose_devices"]


@dataclass
class Devices:
    """What opens the backend of a run, and knows what became of it."""

    plan: MergePlan
    max_device_memory: int
    gpus: Gpus | None = None
    """None: the CPU alone."""
    said: list[str] = field(default_factory=list)
    """Why this choice."""
    _backend: GpuBackend | None = None

    @property
    def kind(self) -> str:
        """What the bits of the output depend on."""
        return "cpu" if self.gpus is None else "gpu"

    def serving(self, plan: MergePlan) -> Devices:
        """Return them for another plan, such as one whose weights are quantized by now."""
        return replace(self, plan=plan, gpus=self.gpus if _has_work(plan) else None)

    def open(self, memory: MemoryPlan) -> Backend:
        """Start the backend. Imports torch."""
        numerics, tuning = self.plan.numerics, self.plan.shape.compute
        if self.gpus is None:
            return select_backend(
                numerics=numerics, scratch_bytes=memory.scratch_bytes, tuning=tuning
            )
        room = GpuRoom(self.max_device_memory, memory.slab_bytes, memory.factor_bytes)
        self._backend = select_gpu_backend(
            self.gpus, room, numerics=numerics, scratch_bytes=memory.scratch_bytes, tuning=tuning
        )
        return self._backend

    def notes(self) -> list[str]:
        """Say what was chosen, and how many targets were merged where."""
        return [*self.said, *([] if self._backend is None else self._backend.notes())]


def choose_devices(plan: MergePlan, settings: ExportConfig) -> Devices:
    """Choose where a plan is merged.

    `cuda` takes all GPUs; `auto` takes them if bytes go there and back faster than the CPU merges.

    Raises:
        UnsupportedError: `cuda` was asked for, and there is no GPU.
    """
    devices = Devices(plan, settings.max_device_memory)
    if settings.export_device == "cpu" or not _has_work(plan):
        return devices
    found = missing_driver() or find_gpus()
    if isinstance(found, str):
        if settings.export_device == "cuda":
            raise no_gpu(found)
        devices.said.append(f"export_device: auto: merged on the CPU: {found}")
        return devices
    profile, _ = load_profile()
    tuned = profile.gpus.get(found.runtimes[0].name)
    if found.kernels is not None and tuned is not None and tuned.kernels:
        found = replace(found, kernels=found.kernels.with_shapes(tuned.kernels))
    if settings.export_device == "auto":
        tuning, notes = (tuned, []) if tuned is not None else _measure(found, settings, profile)
        devices.said += notes
        if tuning.link_gbps <= tuning.cpu_gbps:
            devices.said.append(
                "export_device: auto: merged on the CPU, which merges "
                f"{tuning.cpu_gbps:.1f} GB/s; the GPU's link moves {tuning.link_gbps:.1f}"
            )
            return devices
    devices.gpus = found
    devices.said += found.notes
    return devices


def _has_work(plan: MergePlan) -> bool:
    """Tell whether a plan has anything that a GPU merges."""
    return any(tensor.terms and tensor.encoding is None for tensor in plan.tensors)


def _measure(
    gpus: Gpus, settings: ExportConfig, profile: MachineProfile
) -> tuple[GpuTuning, list[str]]:
    """Measure how fast the GPU's link and the CPU are, and keep it for the next runs."""
    from streammerge.engine.tune_gpu import measure_rates  # noqa: PLC0415 (imports torch)

    tuning = measure_rates(gpus.runtimes[0], threads=settings.threads, compute=profile.compute)
    try:
        save_profile(MachineProfile(gpus={gpus.runtimes[0].name: tuning}).over(profile))
    except ConfigError as error:
        # the next run measures again, and this one goes on
        return tuning, [f"the rate of the GPU's link is not kept: {error}"]
    return tuning, []
