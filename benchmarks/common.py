"""What the benchmarks share: cases to merge, processes that are measured, tables, JSON and plots.

Not a benchmark itself. A case is a base and an adapter as a user has them, made without building a
model: weights repeat one block of random values, or are holes of a sparse file.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

SHARD_BYTES = 5 * 10**9
BLOCK_BYTES = 32 << 20
DTYPES = {"BF16": ("bfloat16", 2), "F16": ("float16", 2), "F32": ("float32", 4)}
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
TARGETS = {"all": ATTENTION + MLP, "attention": ATTENTION}
Tensors = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a decoder; names of tensors are those of Llama and Qwen2."""

    name: str
    hidden: int
    intermediate: int
    kv: int
    vocabulary: int
    layers: int
    heads: int
    is_tied: bool = False
    has_qkv_bias: bool = False

    def linear(self, module: str) -> tuple[int, int]:
        """Return the shape (N, K) of a linear layer."""
        rows = {
            "k_proj": self.kv, "v_proj": self.kv,
            "gate_proj": self.intermediate, "up_proj": self.intermediate,
        }.get(module, self.hidden)  # fmt: skip
        return rows, self.intermediate if module == "down_proj" else self.hidden

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield names and shapes in the order of the model."""
        yield "model.embed_tokens.weight", (self.vocabulary, self.hidden)
        for layer in range(self.layers):
            for module in TARGETS["all"]:
                name, shape = self.module(layer, module), self.linear(module)
                yield f"{name}.weight", shape
                if self.has_qkv_bias and module in ATTENTION[:3]:
                    yield f"{name}.bias", shape[:1]
            for norm in ("input_layernorm", "post_attention_layernorm"):
                yield f"model.layers.{layer}.{norm}.weight", (self.hidden,)
        yield "model.norm.weight", (self.hidden,)
        if not self.is_tied:
            yield "lm_head.weight", (self.vocabulary, self.hidden)

    @staticmethod
    def module(layer: int, module: str) -> str:
        """Return the path of a linear layer."""
        part = "self_attn" if module in ATTENTION else "mlp"
        return f"model.layers.{layer}.{part}.{module}"

    def config(self, dtype: str) -> dict[str, Any]:
        """Return what config.json says."""
        family = "Qwen2" if self.has_qkv_bias else "Llama"
        head_dim = self.hidden // self.heads
        return {
            "model_type": family.lower(), "architectures": [f"{family}ForCausalLM"],
            "torch_dtype": DTYPES[dtype][0], "vocab_size": self.vocabulary,
            "hidden_size": self.hidden, "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers, "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv // head_dim, "head_dim": head_dim,
            "tie_word_embeddings": self.is_tied,
        }  # fmt: skip


SHAPES = {
    shape.name: shape
    for shape in (
        ModelShape("tiny", 64, 128, 32, 256, layers=2, heads=4),
        ModelShape("50M", 1024, 2816, 1024, 4096, layers=4, heads=16),
        # Llama-3.2-1B
        ModelShape("1B", 2048, 8192, 512, 128256, layers=16, heads=32, is_tied=True),
        # 1.97 GB in 16 bits
        ModelShape("2GB", 2048, 8192, 512, 32000, layers=14, heads=32),
        # Llama-2-7B
        ModelShape("7B", 4096, 11008, 4096, 32000, layers=32, heads=32),
        # Llama-3-8B
        ModelShape("8B", 4096, 14336, 1024, 128256, layers=32, heads=32),
        # Qwen2.5-32B
        ModelShape("32B", 5120, 27648, 1024, 152064, layers=64, heads=40, has_qkv_bias=True),
        # Llama-3-70B
        ModelShape("70B", 8192, 28672, 1024, 128256, layers=80, heads=64),
    )
}


@dataclass(frozen=True)
class CaseSpec:
    """What to merge into what."""

    shape: ModelShape
    dtype: str = "BF16"
    rank: int = 16
    targets: str = "all"
    is_sparse: bool = False
    """Whether the base is holes, which are read as zeros and take no disk."""

    def settings(self) -> dict[str, Any]:
        """Give the case as JSON types."""
        return {**asdict(self), "shape": self.shape.name}


@dataclass(frozen=True)
class Case:
    """A base and an adapter on disk."""

    base: Path
    adapter: Path
    base_bytes: int
    adapter_bytes: int


def make_case(folder: Path, spec: CaseSpec) -> Case:
    """Write a base, in shards of at most 5 GB, and an adapter."""
    base, adapter = folder / "base", folder / "adapter"
    base.mkdir(parents=True)
    adapter.mkdir()
    shards = _into_shards(spec.shape.tensors(), DTYPES[spec.dtype][1])
    weight_map: dict[str, str] = {}
    for number, tensors in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(base / name, tensors, spec.dtype, is_sparse=spec.is_sparse)
        weight_map.update(dict.fromkeys(tensors, name))
    total = sum(prod(shape) for shard in shards for shape in shard.values())
    metadata = {"total_size": total * DTYPES[spec.dtype][1]}
    write_json(
        base / "model.safetensors.index.json", {"metadata": metadata, "weight_map": weight_map}
    )
    write_json(base / "config.json", spec.shape.config(spec.dtype))
    write_safetensors(adapter / "adapter_model.safetensors", dict(_factors(spec)), "F32")
    write_json(
        adapter / "adapter_config.json",
        {
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": spec.rank,
            "lora_alpha": 2 * spec.rank, "target_modules": list(TARGETS[spec.targets]),
            "base_model_name_or_path": str(base),
        },
    )  # fmt: skip
    return Case(base, adapter, weight_bytes(base), weight_bytes(adapter))


def _factors(spec: CaseSpec) -> Iterator[tuple[str, tuple[int, ...]]]:
    for layer in range(spec.shape.layers):
        for module in TARGETS[spec.targets]:
            rows, columns = spec.shape.linear(module)
            key = f"base_model.model.{spec.shape.module(layer, module)}"
            yield f"{key}.lora_A.weight", (spec.rank, columns)
            yield f"{key}.lora_B.weight", (rows, spec.rank)


def _into_shards(tensors: Iterable[tuple[str, tuple[int, ...]]], item_bytes: int) -> list[Tensors]:
    shards: list[Tensors] = [{}]
    held = 0
    for name, shape in tensors:
        nbytes = prod(shape) * item_bytes
        if shards[-1] and held + nbytes > SHARD_BYTES:
            shards.append({})
            held = 0
        shards[-1][name] = shape
        held += nbytes
    return shards


def write_safetensors(path: Path, tensors: Tensors, dtype: str, *, is_sparse: bool = False) -> None:
    """Write tensors in the order of their names, as the format's own library does."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in sorted(tensors.items()):
        begin, end = end, end + prod(shape) * DTYPES[dtype][1]
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        if is_sparse:
            file.truncate(8 + len(text) + end)
            return
        block = memoryview(random_values(min(BLOCK_BYTES, end), dtype))
        for begin in range(0, end, len(block)):
            file.write(block[: end - begin])


def random_values(nbytes: int, dtype: str) -> bytes:
    """Return normal values of a standard deviation of 0.02: finite, and hard to compress."""
    count = nbytes // DTYPES[dtype][1]
    values = np.random.default_rng(0).standard_normal(count, dtype=np.float32) * np.float32(0.02)
    if dtype == "BF16":
        return (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    return values.astype(DTYPES[dtype][0]).tobytes()


def weight_bytes(folder: Path) -> int:
    """Return the bytes of a folder's safetensors files."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def write_json(path: Path, value: object) -> None:
    """Write a JSON file."""
    path.write_text(json.dumps(value, indent=1) + "\n")


def drop_cache(*folders: Path) -> None:
    """Drop the files of folders from the page cache; what is not on the disk yet goes there."""
    for path in (path for folder in folders for path in folder.iterdir() if path.is_file()):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def sync_folder(folder: Path) -> None:
    """Wait until the files of a folder are on the disk."""
    for path in (path for path in folder.rglob("*") if path.is_file()):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


class ProcessResult(NamedTuple):
    """What a process took, imports included."""

    wall: float
    cpu: float
    peak_rss: int
    rc: int
    read_bytes: int
    """From disks; what the page cache gave does not count."""
    written_bytes: int
    output: str


# a process begins with the peak of the one that started it, from before its own program was loaded:
# this one has loaded next to nothing, where a benchmark may have loaded torch
_LAUNCHER = """
import json, os, sys, time
report = int(sys.argv[1])
os.set_inheritable(report, False)
started = time.perf_counter()
pid = os.posix_spawnp(sys.argv[2], sys.argv[2:], os.environ)
_, status, usage = os.wait4(pid, 0)
wall = time.perf_counter() - started
os.write(report, json.dumps([
    wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024,
    os.waitstatus_to_exitcode(status), usage.ru_inblock * 512, usage.ru_oublock * 512,
]).encode())
"""


def run_process(command: Sequence[str | Path]) -> ProcessResult:
    """Run a program; return what it took, and what it printed.

    Its peak includes that of the launcher before it, about 10 MB: smaller ones are not told apart.
    """
    inlet, outlet = os.pipe()
    try:
        launch = [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(outlet)]
        done = subprocess.run(
            [*launch, *map(str, command)],
            pass_fds=[outlet], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, check=False,
        )  # fmt: skip
        os.close(outlet)
        outlet = -1
        report = os.read(inlet, 4096)
    finally:
        os.close(inlet)
        if outlet >= 0:
            os.close(outlet)
    if not report:
        raise SystemExit(f"cannot start {command[0]}: {done.stdout.strip()}")
    return ProcessResult(*json.loads(report), done.stdout)


def check_process(name: str, command: Sequence[str | Path]) -> ProcessResult:
    """Run a program that has to succeed."""
    result = run_process(command)
    if result.rc:
        raise SystemExit(f"{name} ended with {result.rc}:\n{result.output[-2000:]}")
    return result


def last_json(output: str) -> dict[str, Any]:
    """Return the last line that a program printed, which is JSON."""
    value: dict[str, Any] = json.loads(output.strip().splitlines()[-1])
    return value


def machine(folder: Path) -> dict[str, Any]:
    """Say what a number was measured on."""
    models = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "cores": len(os.sched_getaffinity(0)),
        "cpu": models[0] if models else platform.machine(),
        "ram_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "kernel": platform.release(),
        "file_system": _file_system(folder.resolve()),
        "torch": importlib.metadata.version("torch"),
    }


def machine_line(folder: Path) -> str:
    """Give the machine in one line."""
    found = machine(folder)
    return (
        f"{found['cores']} cores of {found['cpu']}, {found['ram_bytes'] / 1e9:.0f} GB RAM, "
        f"Linux {found['kernel']}, {found['file_system']}, torch {found['torch']}"
    )


def _file_system(path: Path) -> str:
    found = "?"
    longest = -1
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, place, kind, *_ = line.split()
        if path.is_relative_to(place) and len(place) >= longest:
            longest, found = len(place), kind
    return found


def new_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options of every benchmark."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    parser.add_argument("--plot", type=Path, help="draw them to this SVG file")
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder otherwise")
    return parser


@contextlib.contextmanager
def work_folder(arguments: argparse.Namespace) -> Iterator[Path]:
    """Yield a new folder below `--folder`, which is deleted in the end, and name the machine."""
    if arguments.plot:
        # a missing library shows before hours of measurements, not after
        import_pyplot()
    if arguments.folder:
        arguments.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="bench-") as name:
        print(machine_line(Path(name)), flush=True)
        yield Path(name)


def split_names(text: str) -> list[str]:
    """Parse a comma list."""
    return [part.strip() for part in text.split(",") if part.strip()]


def split_numbers(text: str) -> list[int]:
    """Parse a comma list of integers."""
    return [int(part) for part in split_names(text)]


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print columns: the first to the left, the others to the right."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[n]) for line in lines) for n in range(len(header))]
    for first, *others in lines:
        cells = [text.rjust(width) for text, width in zip(others, widths[1:], strict=True)]
        print("  ".join([first.ljust(widths[0]), *cells]))


def median_of(values: Sequence[float]) -> float:
    """Return the median."""
    return float(statistics.median(values))


def write_results(arguments: argparse.Namespace, folder: Path, **results: Any) -> None:
    """Write what was measured, if a file for it is named."""
    if arguments.json:
        write_json(arguments.json, {"machine": machine(folder), **results})


def import_pyplot() -> Any:
    """Import matplotlib, without a display."""
    try:
        import matplotlib as mpl  # noqa: PLC0415 (only a plot needs it)
    except ModuleNotFoundError as error:
        raise SystemExit("--plot needs matplotlib: pip install 'streammerge[bench]'") from error
    mpl.use("Agg")
    # equal numbers give an equal file
    mpl.rcParams["svg.hashsalt"] = "streammerge"
    from matplotlib import pyplot as plt  # noqa: PLC0415 (after the choice of the renderer)

    return plt


def save_plot(path: Path | None, title: str, draw: Callable[[Any], None]) -> None:
    """Draw one pair of axes to an SVG file, if one is named."""
    if path is None:
        return
    pyplot = import_pyplot()
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    axes.set_title(title)
    draw(axes)
    axes.grid(visible=True, alpha=0.3)
    figure.savefig(path, format="svg", metadata={"Date": None})
    pyplot.close(figure)
