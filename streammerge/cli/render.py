"""What a person sees: the progress bar on stderr, results on stdout."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from streammerge.engine.export import Progress as ExportProgress
from streammerge.plan.ops import kind_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from streammerge.config.profile import MachineProfile
    from streammerge.engine.bench import BenchReport
    from streammerge.engine.evaluate import EvaluationReport
    from streammerge.plan.merge_plan import MergePlan
    from streammerge.report.export_report import ExportReport

__all__ = [
    "RichProgress",
    "print_rows",
    "print_table",
    "show_bench",
    "show_evaluation",
    "show_inspection",
    "show_plan",
    "show_profile",
    "show_report",
]


class RichProgress(ExportProgress):
    """A bar with bytes, speed and time left; silent where stderr is not a terminal."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("merging"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("merge", total=None)
        self._layers = Progress(
            TextColumn("quantizing"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("layers"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._layer = self._layers.add_task("quantize", total=None)

    def start_layers(self, count: int) -> None:
        """Show a bar of layers."""
        self._layers.update(self._layer, total=count)
        self._layers.start()

    def advance_layer(self) -> None:
        """Move the bar; the last layer leaves it as it is."""
        self._layers.advance(self._layer)

    def stop_layers(self) -> None:
        """Leave the bar of layers as it is."""
        self._layers.stop()

    def start(self, plan: MergePlan, *, done_bytes: int) -> None:
        """Show the notes and the bar."""
        for note in plan.notes:
            self._console.print(f"note: {note}", style="dim", markup=False, soft_wrap=True)
        if done_bytes:
            self._console.print(f"going on after {_size(done_bytes)} of an interrupted run")
        total = sum(shard.data_bytes for shard in plan.shards)
        self._bar.update(self._task, total=total, completed=done_bytes)
        self._bar.start()

    def advance(self, nbytes: int) -> None:
        """Move the bar."""
        self._bar.advance(self._task, nbytes)

    def stop(self) -> None:
        """Leave the bar as it is."""
        self._bar.stop()


def show_report(report: ExportReport) -> None:
    """Print what an export did."""
    speed = report.bytes_written / report.seconds / 10**9
    rows = [
        ("output", report.output_dir),
        (
            "tensors",
            (
                f"{report.tensors_total}: {report.tensors_changed} changed, "
                f"{report.tensors_copied} copied byte for byte"
            ),
        ),
        ("adapter tensors", f"{report.adapter_tensors_used}, each used once"),
        ("read, written", f"{_size(report.bytes_read)}, {_size(report.bytes_written)}"),
        ("shards", _shards(report)),
        ("time", f"{report.seconds:.1f} s ({speed:.2f} GB/s)"),
        (
            "peak memory",
            f"{_size(report.peak_rss_bytes)} (predicted {_size(report.predicted_peak_bytes)})",
        ),
    ]
    if report.quantization:
        rows.append(("quantized", _quantization(report.quantization)))
    rows += [("deltas", _deltas(report.deltas))] if report.deltas else []
    rows += _edits(report.config_edits)
    if report.hub_url:
        rows.append(("pushed to", report.hub_url))
    print_rows(rows)


def show_plan(plan: MergePlan) -> None:
    """Print what an export would do."""
    changes = Counter(tensor.change for tensor in plan.tensors)
    counted = ", ".join(f"{count} {change}" for change, count in changes.most_common())
    kinds = Counter(kind_of(tensor.name) for tensor in plan.targets)
    targets = ", ".join(f"{kind} ({count})" for kind, count in kinds.most_common())
    rows = [
        ("base", str(plan.base)),
        ("adapters", ", ".join(map(str, plan.adapters)) or "none"),
        ("output", str(plan.output)),
        ("tensors", f"{len(plan.tensors)}: {counted}"),
        ("targets", targets or "none"),
        ("adapter tensors", f"{plan.contents.adapter_tensors_used}, each used once"),
        ("to read, to write", f"{_size(plan.bytes_read)}, {_size(plan.bytes_written)}"),
        (
            "shards",
            f"{len(plan.shards)}, the largest {_size(max(s.file_bytes for s in plan.shards))}",
        ),
        (
            "peak memory",
            (
                f"{_size(plan.memory.predicted_peak_bytes)} predicted, "
                f"least {_size(plan.memory.least_bytes)}"
            ),
        ),
        ("numerics", plan.numerics),
    ]
    rows += _edits(plan.contents.config_edits)
    rows.extend(("note", note) for note in plan.notes)
    print_rows(rows)


def show_inspection(found: dict[str, Any]) -> None:
    """Print what a folder holds."""
    if found["kind"] == "adapter":
        _show_adapter(found)
        return
    dtypes = ", ".join(f"{name} {_size(size)}" for name, size in found["bytes_by_dtype"].items())
    print_rows(
        [
            ("checkpoint", found["path"]),
            ("format", found["format"]),
            ("model type", found["model_type"] or "not named"),
            ("quantization", found["quantization"] or "none"),
            ("tensors", f"{len(found['tensors'])}, {_size(found['bytes'])} ({dtypes})"),
            ("shards", str(len(found["shards"]))),
        ]
    )
    print_table(
        ("tensor", "dtype", "shape", "size"),
        [(t["name"], t["dtype"], _shape(t["shape"]), _size(t["bytes"])) for t in found["tensors"]],
    )


def _show_adapter(found: dict[str, Any]) -> None:
    """Print what an adapter is and what it changes, or why it cannot be merged."""
    if not found["is_mergeable"]:
        print_rows(
            [
                ("adapter", found["path"]),
                ("kind", found["peft_type"]),
                ("merge", f"not possible: {found['reason']}"),
            ]
        )
        return
    rows = [
        ("adapter", found["path"]),
        ("kind", ", ".join([found["peft_type"], *found["variants"]])),
        ("merge", found["formula"]),
        ("base model", found["base_model"] or "not named"),
        ("PEFT", found["peft_version"] or "before 0.18"),
        ("tensors", f"{found['tensors_total']} in {len(found['modules'])} modules"),
        ("rank", ", ".join(map(str, found["ranks"])) or "none"),
        ("scaling", ", ".join(f"{value:g}" for value in found["scalings"]) or "none"),
        ("whole tensors", str(len(found["replacements"])) if found["replacements"] else "none"),
    ]
    if found["target_parameters"]:
        rows.append(("parameters", ", ".join(found["target_parameters"])))
    if found["layer_replication"]:
        ranges = ", ".join(f"{begin} to {end - 1}" for begin, end in found["layer_replication"])
        rows.append(("layers", f"those of the base numbered {ranges}"))
    rows += [
        ("token rows", f"{len(rows['tokens'])} of {rows['name']}") for rows in found["token_rows"]
    ]
    print_rows(rows)
    print_table(
        ("module", "rank", "scaling", "delta", "dtype", "else"),
        [
            (
                m["name"],
                m.get("rank", "-"),
                f"{m['scaling']:g}" if "scaling" in m else "-",
                _shape(m["shape"]) if "shape" in m else "-",
                m.get("dtype", "-"),
                _rest(m),
            )
            for m in found["modules"]
        ]
        + [
            (r["name"], "-", "-", _shape(r["shape"]), r["dtype"], "whole")
            for r in found["replacements"]
        ],
    )


def _rest(module: dict[str, Any]) -> str:
    """Return what only this kind of adapter says of a module."""
    shown = {"name", "rank", "scaling", "shape", "dtype"}
    return ", ".join(
        f"{key.replace('_', ' ')} {value}" for key, value in module.items() if key not in shown
    )


def show_profile(profile: MachineProfile, *, path: Path | None) -> None:
    """Print what was measured, the chosen settings marked, and where it was written."""
    for found in profile.measurements["disks"].values():
        print_rows([("disk", f"{found['folder']} ({found['fs_type']}), GB/s")])
        modes = ("", "read mode", "write mode", "block", "readers", "writers")
        print_table(
            (*modes, "read", "write", "both"),
            [
                (
                    _mark(s),
                    s["read_mode"],
                    s["write_mode"],
                    f"{s['block_bytes'] / 2**20:g} MiB",
                    s["readers"],
                    s["writers"],
                    *(f"{s[f'{way}_gbps']:.2f}" for way in ("read", "write", "both")),
                )
                for s in found["settings"]
            ],
        )
    cells = profile.measurements["compute"]
    sizes = list(dict.fromkeys(cell["scratch_bytes"] for cell in cells))
    rows: dict[tuple[object, ...], list[str]] = {}
    for cell in cells:
        row = rows.setdefault((cell["dtype"], cell["rank"]), [])
        row.append(f"{cell['gbps']:.2f}{_mark(cell)}")
    print_rows([("merging", f"GB/s in {cells[0]['threads']} threads, by the size of a product")])
    print_table(
        ("dtype", "rank", *(f"{size / 2**20:g} MiB" for size in sizes)),
        [(*key, *row) for key, row in rows.items()],
    )
    where = "nowhere: STREAMMERGE_PROFILE is empty" if path is None else str(path)
    print_rows([("chosen", "marked with *"), ("written to", where)])


def show_bench(report: BenchReport) -> None:
    """Print how an export compares with the floor."""
    speed = report.bytes_written / report.seconds / 10**9
    floor_speed = report.floor_bytes / report.floor_seconds / 10**9
    busy = ", ".join(
        f"{stage} {seconds:.2f} s in {report.threads[stage]}"
        for stage, seconds in report.busy_seconds.items()
    )
    print_rows(
        [
            ("machine", report.machine),
            ("base", f"{report.base}, {_size(report.floor_bytes)}"),
            ("runs", f"{len(report.runs_seconds)}, with cold inputs; medians"),
            ("export", f"{report.seconds:.2f} s ({speed:.2f} GB/s)"),
            ("floor", f"{report.floor_seconds:.2f} s ({floor_speed:.2f} GB/s): a plain copy"),
            ("ratio", f"{report.ratio:.2f} times the floor"),
            ("peak memory", _size(report.peak_rss_bytes)),
            ("busy", f"{busy} threads; bound by {report.binding}"),
        ]
    )


def show_evaluation(report: EvaluationReport) -> None:
    """Print how well a model foresees a text."""
    left_out = f", {report.tokens_left_out} left out" if report.tokens_left_out else ""
    rows = [
        ("checkpoint", report.checkpoint),
        *(("adapter", name) for name in report.adapters),
        *([("quantized", report.quantization)] if report.quantization else []),
        ("text", report.text),
        ("tokens", f"{report.tokens} in {report.windows} x {report.length}{left_out}"),
        ("perplexity", f"{report.perplexity:.4f}"),
        ("mean loss", f"{report.loss:.6f}"),
        ("time", f"{report.seconds:.1f} s"),
        ("peak memory", _size(report.peak_rss_bytes)),
    ]
    print_rows(rows)


def show_evaluations(reports: Sequence[EvaluationReport]) -> None:
    """Print how well several models foresee a text, next to the first."""
    first = reports[0]
    left_out = f", {first.tokens_left_out} left out" if first.tokens_left_out else ""
    print_rows(
        [
            ("text", first.text),
            ("tokens", f"{first.tokens} in {first.windows} x {first.length}{left_out}"),
        ]
    )
    print_table(
        ("checkpoint", "perplexity", "ratio", "mean loss", "time", "peak memory"),
        [
            (
                report.label,
                f"{report.perplexity:.4f}",
                f"{report.perplexity / first.perplexity:.4f}",
                f"{report.loss:.6f}",
                f"{report.seconds:.1f} s",
                _size(report.peak_rss_bytes),
            )
            for report in reports
        ],
    )


def _edits(edits: dict[str, Any]) -> list[tuple[str, str]]:
    """Say what config.json says differently; of a quantization its method alone."""
    shown = {key: value for key, value in edits.items() if key != "quantization_config"}
    if "quantization_config" in edits:
        section = edits["quantization_config"]
        shown["quantization_config"] = "removed" if section is None else section["quant_method"]
    return [("config.json", ", ".join(f"{k}: {v}" for k, v in shown.items()))] if shown else []


def _deltas(shares: dict[str, dict[str, float]]) -> str:
    """Say how much of what was merged the codes hold."""
    kinds = (f"{kind} {s['kept']:.0%} (noise {s['noise']:.2g})" for kind, s in shares.items())
    return f"share that the codes keep: {', '.join(kinds)}"


def _mark(found: dict[str, Any]) -> str:
    return "*" if found["is_chosen"] else ""


def _quantization(done: dict[str, Any]) -> str:
    """Say to what, and how much of the layers' outputs it costs."""
    group = done["group_size"]
    groups = "one scale per row" if group == -1 else f"groups of {group}"
    calibration = done["calibration"]
    return (
        f"{done['method']}, {done['bits']} bit, {groups}; error of the outputs "
        f"{done['mean_relative_error']:.2%} on {calibration['tokens']} tokens of "
        f"{calibration['source']}"
    )


def _shards(report: ExportReport) -> str:
    largest = max(shard["bytes"] for shard in report.shards)
    resumed = f", {report.resumed_shards} from an interrupted run" if report.resumed_shards else ""
    return f"{len(report.shards)}, the largest {_size(largest)}{resumed}"


def _shape(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape)) or "scalar"


def _size(nbytes: int) -> str:
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if nbytes >= factor:
            return (
                f"{nbytes / factor:.2f} {unit}" if unit == "GB" else f"{nbytes / factor:.0f} {unit}"
            )
    return f"{nbytes} B"


def print_rows(rows: Sequence[tuple[str, str]]) -> None:
    """Print names and what belongs to them, in two columns."""
    console = Console(soft_wrap=True, highlight=False)
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        console.print(f"{name:<{width}}  {value}", markup=False)


def print_table(columns: Sequence[str], lines: Sequence[tuple[object, ...]]) -> None:
    """Print a table without borders."""
    console = Console(highlight=False)
    table = Table(*columns, box=None, pad_edge=False)
    for line in lines:
        table.add_row(*map(str, line))
    console.print(table, width=None if console.is_terminal else 160)
