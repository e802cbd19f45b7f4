"""An export from beginning to end."""

from __future__ import annotations

import time
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streammerge.checkpoint.digest import digest_file
from streammerge.checkpoint.direct import DirectWriter
from streammerge.checkpoint.header import read_header
from streammerge.checkpoint.hub import push_folder
from streammerge.checkpoint.sidecars import write_durably, write_sidecars
from streammerge.checkpoint.torch_bin import read_torch_bin
from streammerge.checkpoint.writer import SafetensorsWriter, TorchBinWriter, require_space
from streammerge.config import ExportConfig, load_config, parse_config
from streammerge.engine.devices import choose_devices
from streammerge.engine.fidelity import measure_deltas
from streammerge.engine.pipeline import Pipeline
from streammerge.engine.prepare import prepare
from streammerge.engine.quantize import bytes_needed, foresee, quantize_layers, read_settings
from streammerge.engine.staging import Staging, check_output, fingerprint
from streammerge.errors import (
    InputError,
    InterruptedRunError,
    MemoryBudgetError,
    StreamMergeError,
    VerificationError,
)
from streammerge.plan.layout import encode_index
from streammerge.plan.memory import plan_memory
from streammerge.report.export_report import ExportReport, peak_rss_bytes, rss_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from streammerge.backends.base import Backend
    from streammerge.checkpoint.writer import ShardWriter
    from streammerge.engine.devices import Devices
    from streammerge.plan.layout import ShardPlan
    from streammerge.plan.memory import MemoryPlan
    from streammerge.plan.merge_plan import MergePlan

__all__ = ["Progress", "build_plan", "export", "rehearse"]

# torch's CPU build takes 180 MB of RSS, builds for GPUs up to about 500
TORCH_USUAL_BYTES = 180 * 10**6
TORCH_MOST_BYTES = 550 * 10**6


class Progress:
    """Told how an export goes; this one says nothing."""

    def start(self, plan: MergePlan, *, done_bytes: int) -> None:
        """Begin to write; `done_bytes` were written by an interrupted run."""

    def advance(self, nbytes: int) -> None:
        """Count bytes written; called from another thread."""

    def start_layers(self, count: int) -> None:
        """Begin to quantize; comes before `start`."""

    def advance_layer(self) -> None:
        """Count a layer as quantized."""

    def stop_layers(self) -> None:
        """End the quantization, whether it went well or not."""

    def stop(self) -> None:
        """End, whether it went well or not."""


def build_plan(config: ExportConfig | Mapping[str, Any] | str | Path) -> MergePlan:
    """Plan an export without reading a weight or writing a byte. Does not import torch.

    Args:
        config: A configuration, a map of its keys, or the path of a YAML or JSON file.

    Raises:
        StreamMergeError: The export cannot be done; the message says why.
    """
    settings = _to_config(config)
    plan = prepare(settings, local_only=True)
    _check_output(plan, settings)
    stage = foresee(plan, settings)
    return plan if stage is None else replace(plan, notes=(*plan.notes, stage))


def export(
    config: ExportConfig | Mapping[str, Any] | str | Path, *, progress: Progress | None = None
) -> ExportReport:
    """Merge adapters into a base and write the result.

    Args:
        config: A configuration, a map of its keys, or the path of a YAML or JSON file.
        progress: Told how it goes.

    Raises:
        StreamMergeError: The export was not done; nothing appears under `export_dir`.
    """
    started, settings = time.perf_counter(), _to_config(config)
    peak_before = peak_rss_bytes()
    # open, match, lay out: every fault of the inputs shows here, before torch and before any write
    plan = prepare(settings)
    _check_output(plan, settings)
    progress = progress or Progress()
    quantize = read_settings(settings)
    needed = plan.bytes_written if quantize is None else bytes_needed(plan, quantize)
    _check_disk(plan, needed=needed)
    # before layers are quantized, which may take hours
    devices = choose_devices(plan, settings)
    with ExitStack() as stack:
        quantized = None
        if quantize is not None:
            quantized = quantize_layers(plan, settings, quantize, progress)
            # whatever stops the run, the layers stay for a rerun
            stack.callback(quantized.work.release)
            plan = quantized.plan
        devices = devices.serving(plan)
        memory, open_backend = _fit_memory(devices, settings, peak_before=peak_before)
        staging = Staging(plan.output)
        allowed, device = settings.allow_nonfinite, devices.kind
        identity = fingerprint(plan, allow_nonfinite=allowed, device=device)
        staging.open(identity)
        run = _Run(plan, staging, progress)
        pipeline = run.pipeline(memory, open_backend, allow_nonfinite=settings.allow_nonfinite)
        with _keeping(staging):
            run.write_shards(pipeline)
            run.write_rest()
            run.verify()
            # of NaN there is no share
            deltas = {} if settings.allow_nonfinite else measure_deltas(plan, staging.folder)
            if fingerprint(plan, allow_nonfinite=allowed, device=device) != identity:
                raise InputError(
                    "the base or an adapter changed during the run",
                    where=plan.base,
                    hint="run the same command again; it starts over",
                )
            staging.publish(overwrite=settings.overwrite)
        if quantized is not None:
            quantized.work.discard()
    url = None
    if settings.export_hub_model_id:
        url = push_folder(
            plan.output, repo_id=settings.export_hub_model_id, token=settings.hf_hub_token
        )
    seconds = time.perf_counter() - started
    report = _report(run, pipeline, devices, seconds=seconds, hub_url=url)
    if deltas:
        report = replace(report, deltas=deltas)
    if quantized is not None:
        predicted = max(report.predicted_peak_bytes, quantized.foreseen_bytes)
        report = replace(report, quantization=quantized.describe(), predicted_peak_bytes=predicted)
    return report


def rehearse(
    config: ExportConfig | Mapping[str, Any] | str | Path, *, progress: Progress | None = None
) -> ExportReport:
    """Do what an export does, but delete each finished shard, and publish nothing; to measure it.

    Needs the space of a few shards where an export needs that of the whole output.

    Args:
        config: A configuration, a map of its keys, or the path of a YAML or JSON file.
        progress: Told how it goes.

    Raises:
        StreamMergeError: The export would fail.
    """
    started, settings = time.perf_counter(), _to_config(config)
    peak_before = peak_rss_bytes()
    plan = prepare(settings)
    _check_output(plan, settings)
    _check_disk(plan, needed=3 * max(shard.file_bytes for shard in plan.shards))
    devices = choose_devices(plan, settings)
    memory, open_backend = _fit_memory(devices, settings, peak_before=peak_before)
    # a folder of its own, so that no interrupted run is disturbed
    is_new_parent = not plan.output.parent.exists()
    staging = Staging(plan.output.with_name(f"{plan.output.name}.rehearsal"))
    allowed, device = settings.allow_nonfinite, devices.kind
    staging.open(fingerprint(plan, allow_nonfinite=allowed, device=device))
    run = _Rehearsal(plan, staging, progress or Progress())
    pipeline = run.pipeline(memory, open_backend, allow_nonfinite=settings.allow_nonfinite)
    try:
        run.write_shards(pipeline)
    finally:
        staging.discard()
        if is_new_parent:
            with suppress(OSError):  # somebody else uses it by now
                plan.output.parent.rmdir()
    seconds = time.perf_counter() - started
    return _report(run, pipeline, devices, seconds=seconds, hub_url=None)


@contextmanager
def _keeping(staging: Staging) -> Iterator[None]:
    """Keep finished shards for a rerun, whatever stops the run but a fault of the result itself."""
    try:
        yield
    except KeyboardInterrupt:
        staging.release()
        raise InterruptedRunError(
            "interrupted",
            where=staging.folder,
            hint="run the same command again to go on from the shards that are finished",
        ) from None
    except (InputError, VerificationError):
        # these shards are of no use: another adapter, another base or another build is needed
        staging.discard()
        raise
    except BaseException:
        staging.release()
        raise


def _fit_memory(
    devices: Devices, settings: ExportConfig, *, peak_before: int
) -> tuple[MemoryPlan, Callable[[], Backend]]:
    """Fit the buffers to the ceiling, and say how the backend is opened.

    Importing torch takes a second: where the ceiling leaves room for whatever it may need, the
    first blocks are read meanwhile. Otherwise it is imported first, and the buffers fit what is
    left; so it is for GPUs, whose drivers take memory too.

    Args:
        devices: What merges, and the plan.
        settings: What the user asked for.
        peak_before: VmHWM before the export began, for which it is not to blame.

    Raises:
        MemoryBudgetError: It is too much already, or the buffers do not fit.
    """
    plan = devices.plan

    def fit(baseline: int) -> MemoryPlan:
        return plan_memory(
            plan.tensors,
            max_memory=settings.max_memory,
            shape=plan.shape,
            baseline=baseline + plan.reader_bytes,
            baseline_holds_plan=True,
        )

    def check() -> None:
        peak = peak_rss_bytes()
        if peak > settings.max_memory and peak > peak_before:
            raise MemoryBudgetError(
                "max_memory is too small to read the headers and sidecars of these inputs",
                expected=f"at least {-(-peak // 10**6)}MB",
                got=f"{settings.max_memory // 10**6}MB",
                hint="set a larger max_memory",
            )

    before = rss_bytes()
    is_tight = settings.max_memory < TORCH_MOST_BYTES + before + plan.memory.least_bytes
    if is_tight or devices.gpus is not None:
        backend = devices.open(plan.memory)
        # the slots of pinned memory among it
        baseline = rss_bytes()
        backend.close()
        check()
        memory = fit(baseline)
        return memory, lambda: devices.open(memory)

    check()
    roomy = fit(TORCH_MOST_BYTES + before)

    def open_meanwhile() -> Backend:
        backend = devices.open(roomy)
        slabs = roomy.slab_bytes * roomy.slab_count
        if rss_bytes() - before - slabs > TORCH_MOST_BYTES:
            raise MemoryBudgetError(
                "torch takes more memory on this machine than was foreseen",
                expected=f"at most {TORCH_MOST_BYTES // 10**6}MB",
                got=f"{(rss_bytes() - before - slabs) // 10**6}MB",
                hint=f"set max_memory: {-(-plan.memory.least_bytes // 10**6)}MB or a little more: "
                "torch is then loaded first, and the buffers fit what it leaves",
            )
        return backend

    # `before` has the records of the plan in it, which are not small for 90,000 targets
    shown = roomy.predicted_peak_bytes - (TORCH_MOST_BYTES - TORCH_USUAL_BYTES)
    return replace(roomy, predicted_peak_bytes=shown), open_meanwhile


def _report(
    run: _Run, pipeline: Pipeline, devices: Devices, *, seconds: float, hub_url: str | None
) -> ExportReport:
    plan, busy = run.plan, pipeline.seconds
    return ExportReport(
        output_dir=str(plan.output),
        tensors_total=len(plan.tensors),
        tensors_changed=len(plan.targets),
        tensors_copied=len(plan.tensors) - len(plan.targets),
        adapter_tensors_used=plan.contents.adapter_tensors_used,
        bytes_read=plan.bytes_read,
        bytes_written=sum(nbytes for nbytes, _ in run.written.values()),
        seconds=seconds,
        read_seconds=busy.read,
        compute_seconds=busy.compute,
        write_seconds=busy.write,
        predicted_peak_bytes=pipeline.memory.predicted_peak_bytes,
        peak_rss_bytes=peak_rss_bytes(),
        shards=[_describe(run, shard.name) for shard in plan.shards],
        digest=plan.io.digest,
        resumed_shards=run.resumed,
        config_edits=plan.contents.config_edits,
        not_copied=list(plan.sidecars.left_out),
        notes=[*plan.notes, *devices.notes()],
        hub_url=hub_url,
    )


def _describe(run: _Run, name: str) -> dict[str, object]:
    nbytes, digest = run.written[name]
    return {"name": name, "bytes": nbytes, "digest": digest}


@dataclass
class _Run:
    """What one export writes into its staging folder."""

    plan: MergePlan
    staging: Staging
    progress: Progress

    def __post_init__(self) -> None:
        self.written = dict(self.staging.finished)
        self.resumed = len(self.written)

    def pipeline(
        self, memory: MemoryPlan, open_backend: Callable[[], Backend], *, allow_nonfinite: bool
    ) -> Pipeline:
        return Pipeline(
            memory=memory,
            open_backend=open_backend,
            io=self.plan.io,
            open_writer=self.open_writer,
            on_written=self.progress.advance,
            on_shard=self.on_shard,
            allow_nonfinite=allow_nonfinite,
        )

    def open_writer(self, shard: ShardPlan) -> ShardWriter:
        path = self.staging.folder / shard.name
        if self.plan.layout == "torch_bin":
            return TorchBinWriter(path, specs=shard.specs)
        if self.plan.io.write_mode == "direct":
            return DirectWriter(path, head=shard.head, nbytes=shard.file_bytes)
        return SafetensorsWriter(path, head=shard.head)

    def on_shard(self, shard: ShardPlan, nbytes: int, digest: str) -> None:
        if self.plan.layout == "torch_bin" or not shard.is_sequential:
            # the archive's own bytes are not those that passed through; or they came out of order
            digest = digest_file(self.staging.folder / shard.name, kind=self.plan.io.digest)
        self.staging.record(shard.name, nbytes, digest)
        self.written[shard.name] = nbytes, digest

    def write_shards(self, pipeline: Pipeline) -> None:
        todo = [shard for shard in self.plan.shards if shard.name not in self.written]
        done = sum(shard.data_bytes for shard in self.plan.shards if shard.name in self.written)
        self.progress.start(self.plan, done_bytes=done)
        try:
            pipeline.run(todo)
        finally:
            self.progress.stop()

    def write_rest(self) -> None:
        """Write what goes beside the shards."""
        folder, plan = self.staging.folder, self.plan
        if len(plan.shards) > 1:
            name = "model.safetensors" if plan.layout == "safetensors" else "pytorch_model.bin"
            write_durably(folder / f"{name}.index.json", encode_index(plan.shards))
        write_sidecars(
            folder,
            plan.sidecars,
            config_source=plan.base / "config.json",
            config_edits=plan.contents.config_edits,
            config=plan.base_config,
        )

    def verify(self) -> None:
        """Read the headers back and compare them with the plan.

        Raises:
            VerificationError: A shard is not what was planned.
        """
        for shard in self.plan.shards:
            path = self.staging.folder / shard.name
            try:
                stored = (
                    read_header(path)[0]
                    if self.plan.layout == "safetensors"
                    else read_torch_bin(path)
                )
            except StreamMergeError as error:
                raise VerificationError(
                    "written shard is damaged", where=path, got=error
                ) from error
            got = {(tensor.name, tensor.dtype, tensor.shape) for tensor in stored}
            wanted = {(spec.name, spec.dtype, spec.shape) for spec in shard.specs}
            if got != wanted:
                raise VerificationError(
                    "written shard does not hold the planned tensors",
                    where=path,
                    expected=f"{len(wanted)} tensors",
                    got=f"{len(got)}, {len(got ^ wanted)} of them differ",
                )


class _Rehearsal(_Run):
    """An export whose shards are deleted as soon as they are finished."""

    def on_shard(self, shard: ShardPlan, nbytes: int, digest: str) -> None:
        super().on_shard(shard, nbytes, digest)
        (self.staging.folder / shard.name).unlink()


def _to_config(config: ExportConfig | Mapping[str, Any] | str | Path) -> ExportConfig:
    if isinstance(config, ExportConfig):
        return config
    return load_config(config) if isinstance(config, (str, Path)) else parse_config(config)


def _check_output(plan: MergePlan, settings: ExportConfig) -> None:
    check_output(
        plan.output,
        base=plan.base.resolve(),
        adapters=[path.resolve() for path in plan.adapters],
        overwrite=settings.overwrite,
    )


def _check_disk(plan: MergePlan, *, needed: int) -> None:
    """Refuse a run that the disk cannot take, an interrupted run's finished shards considered."""
    place = plan.output.parent
    while not place.exists():
        place = place.parent
    staged = Staging(plan.output).folder
    held = sum(f.stat().st_size for f in staged.iterdir() if f.is_file()) if staged.is_dir() else 0
    require_space(
        place,
        needed=needed,
        held=held,
        purpose="for the output",
        hint="free some space, or set export_dir on another disk",
    )
