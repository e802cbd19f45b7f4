"""Compare quantizations, ours and other libraries': perplexity, time of a layer, and peak memory.

Other libraries quantize the merged checkpoint, each in an environment of its own
(requirements-gptqmodel.txt, requirements-llmcompressor.txt), on the token ids that ours gets; a
library whose interpreter is not named is left out. Every side runs in a process of its own, in
turn; wall time, CPU time and peak resident memory are those of the process. The time of a layer
leaves imports, loading a model and saving it out; ours has reading and merging the layer in it. For
the perplexity, each checkpoint's codes are decoded, and transformers runs the same model in float32
on windows spread evenly over a text.

    python benchmarks/bench_quantize.py --layers 4,16,64
    python benchmarks/bench_quantize.py --model MODEL --adapter ADAPTER --text A.txt --bits 8,4,3,2
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import (
    SHAPES,
    CaseSpec,
    check_process,
    last_json,
    make_case,
    median_of,
    new_parser,
    print_table,
    save_plot,
    split_names,
    split_numbers,
    work_folder,
    write_json,
    write_results,
)

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    import numpy as np
    from perplexity import Perplexity

GPTQMODEL_PROGRAM = """
import json, os, sys, time
# it sizes its pools of threads by this, and refuses to start on two cores
os.cpu_count = lambda: 8
from gptqmodel import BACKEND, GPTQModel
from gptqmodel.quantization.config import AWQConfig, GPTQConfig
task = json.loads(sys.argv[1])
is_awq = task["method"] == "awq"
rows = json.load(open(task["ids"]))
calibration = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows]
config = (AWQConfig if is_awq else GPTQConfig)(
    bits=task["bits"], group_size=task["group_size"], sym=not is_awq
)
model = GPTQModel.load(task["model"], config)
backend = BACKEND.TORCH_AWQ if is_awq else BACKEND.AUTO
started = time.perf_counter()
model.quantize(calibration, batch_size=1, backend=backend)
seconds = time.perf_counter() - started
model.save(task["output"])
print("\\n" + json.dumps({"seconds": seconds}))
"""

LLMCOMPRESSOR_PROGRAM = """
import json, sys, time
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from transformers import AutoModelForCausalLM
task = json.loads(sys.argv[1])
rows = json.load(open(task["ids"]))
data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(r) for r in rows]})
weights = QuantizationArgs(
    num_bits=task["bits"], strategy="group", group_size=task["group_size"], symmetric=False
)
groups = {"linears": QuantizationScheme(targets=["Linear"], weights=weights)}
recipe = [AWQModifier(), QuantizationModifier(config_groups=groups, ignore=["lm_head"])]
model = AutoModelForCausalLM.from_pretrained(task["model"], dtype="auto")
started = time.perf_counter()
oneshot(
    model=model, dataset=data, recipe=recipe, max_seq_length=len(rows[0]),
    num_calibration_samples=len(rows), shuffle_calibration_samples=False,
)
seconds = time.perf_counter() - started
model.save_pretrained(task["output"], save_compressed=True)
print("\\n" + json.dumps({"seconds": seconds}))
"""

OURS = ("gptq", "rtn", "awq")
PEERS = {
    "gptqmodel-gptq": GPTQMODEL_PROGRAM,
    "gptqmodel-awq": GPTQMODEL_PROGRAM,
    "llmcompressor-awq": LLMCOMPRESSOR_PROGRAM,
}
SIDES = (*OURS, *PEERS)
# ours, and what it is compared with
PAIRS = (
    ("gptq", "gptqmodel-gptq"),
    ("awq", "gptqmodel-awq"),
    ("awq", "llmcompressor-awq"),
    ("gptq", "rtn"),
    ("awq", "rtn"),
)
Row = dict[str, Any]


@dataclass(frozen=True)
class Subject:
    """What is quantized, and on what it is calibrated."""

    base: Path
    adapter: Path | None
    merged: Path
    """The base with the adapter, for the sides that do not merge."""
    ids: Path
    """Token ids of the calibration, as JSON."""
    digest: str
    """SHA-256 of the ids, as the export report has it."""
    layers: int


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = new_parser(__doc__)
    parser.add_argument("--model", type=Path, help="checkpoint; made by --shape if left out")
    parser.add_argument("--adapter", type=Path, help="what is merged into --model on the way")
    parser.add_argument("--shape", choices=SHAPES, default="50M", help="of made checkpoints")
    parser.add_argument("--layers", type=split_numbers, default=[4], help="of made checkpoints")
    parser.add_argument("--sides", type=split_names, default=list(SIDES))
    parser.add_argument("--bits", type=split_numbers, default=[4], help="AWQ runs with 4 only")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--calibration", default="builtin", help="export_quantization_dataset")
    parser.add_argument("--nsamples", type=int, default=8)
    parser.add_argument("--maxlen", type=int, default=128)
    parser.add_argument("--max-memory", default="8GB")
    parser.add_argument("--text", type=Path, help="text for the perplexity")
    parser.add_argument("--windows", type=int, default=32, help="of the text")
    parser.add_argument("--window-tokens", type=int, default=1024)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--gptqmodel-python", type=Path, help="interpreter that has GPTQModel")
    parser.add_argument(
        "--llmcompressor-python", type=Path, help="interpreter that has llm-compressor"
    )
    arguments = parser.parse_args()
    if unknown := set(arguments.sides) - set(SIDES):
        parser.error(f"{', '.join(sorted(unknown))}: not one of {', '.join(SIDES)}")
    arguments.sides = [s for s in arguments.sides if s in OURS or interpreter(s, arguments)]
    return arguments


def interpreter(side: str, arguments: argparse.Namespace) -> Path | None:
    """Return the interpreter of another library, if it was named."""
    is_gptqmodel = side.startswith("gptqmodel")
    path: Path | None = (
        arguments.gptqmodel_python if is_gptqmodel else arguments.llmcompressor_python
    )
    return path


def subjects(folder: Path, arguments: argparse.Namespace) -> Iterator[Subject]:
    """Yield what to quantize, one at a time; a made checkpoint is deleted afterwards."""
    if arguments.model:
        yield prepare(folder, arguments.model, arguments.adapter, arguments)
        return
    for layers in arguments.layers:
        shape = dataclasses.replace(SHAPES[arguments.shape], layers=layers)
        case = make_case(folder / "case", CaseSpec(shape))
        write_tokenizer(case.base)
        yield prepare(folder, case.base, case.adapter, arguments)
        shutil.rmtree(folder / "case")


def prepare(
    folder: Path, base: Path, adapter: Path | None, arguments: argparse.Namespace
) -> Subject:
    """Merge for the sides that do not, and write the calibration's token ids."""
    merged, ids = folder / "merged", folder / "ids.json"
    if arguments.text or set(arguments.sides) & set(PEERS):
        shutil.rmtree(merged, ignore_errors=True)
        check_process("merge", export_command(base, adapter, merged))
    samples = calibration_ids(base, arguments)
    ids.write_text(json.dumps(samples.tolist()))
    layers = json.loads((base / "config.json").read_text())["num_hidden_layers"]
    digest = hashlib.sha256(samples.astype("<i8").tobytes()).hexdigest()
    return Subject(base, adapter, merged, ids, digest, layers)


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer with one token for each byte."""
    from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: PLC0415 (made cases only)

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = models.BPE({letter: number for number, letter in enumerate(alphabet)}, [])
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})


def calibration_ids(base: Path, arguments: argparse.Namespace) -> np.ndarray[Any, Any]:
    """Return what an export with these options calibrates on, (samples, tokens)."""
    from transformers import AutoTokenizer  # noqa: PLC0415 (two seconds)

    from streammerge.quantize.settings import QuantizeSettings  # noqa: PLC0415 (needs torch)
    from streammerge.quantize.tokens import load_calibration  # noqa: PLC0415 (needs torch)

    settings = QuantizeSettings(nsamples=arguments.nsamples, maxlen=arguments.maxlen)
    tokenizer = AutoTokenizer.from_pretrained(base)
    calibration = load_calibration(arguments.calibration, tokenizer=tokenizer, settings=settings)
    return calibration.ids.numpy()


def export_command(base: Path, adapter: Path | None, output: Path, *options: str) -> list[str]:
    """Return an export, with a report in JSON."""
    merges = [f"adapter_name_or_path={adapter}"] if adapter else []
    return [
        sys.executable, "-m", "streammerge", "export", "--json", f"model_name_or_path={base}",
        *merges, f"export_dir={output}", *options,
    ]  # fmt: skip


def run_side(
    side: str, bits: int, subject: Subject, output: Path, arguments: argparse.Namespace
) -> dict[str, float]:
    """Quantize once."""
    shutil.rmtree(output, ignore_errors=True)
    method = side.rpartition("-")[2]
    if side in OURS:
        command: list[str | Path] = list(
            export_command(
                subject.base, subject.adapter, output, f"export_quantization_method={method}",
                f"export_quantization_bit={bits}", f"max_memory={arguments.max_memory}",
                f"export_quantization_group_size={arguments.group_size}",
                f"export_quantization_dataset={arguments.calibration}",
                f"export_quantization_nsamples={arguments.nsamples}",
                f"export_quantization_maxlen={arguments.maxlen}",
            )
        )  # fmt: skip
    else:
        task = {
            "model": str(subject.merged), "output": str(output), "ids": str(subject.ids),
            "method": method, "bits": bits, "group_size": arguments.group_size,
        }  # fmt: skip
        python = interpreter(side, arguments)
        assert python is not None
        command = [python, "-c", PEERS[side], json.dumps(task)]
    result = check_process(side, command)
    if side in OURS:
        report = json.loads(result.output[result.output.index("{") :])["quantization"]
        if report["calibration"]["digest"] != subject.digest:
            raise SystemExit(f"{side} calibrated on other tokens than the other sides do")
        seconds = sum(report["layer_seconds"])
    else:
        seconds = last_json(result.output)["seconds"]
    return {
        "wall_seconds": result.wall,
        "cpu_seconds": result.cpu,
        "peak_rss_bytes": result.peak_rss,
        "layer_seconds": seconds / subject.layers,
    }


def quantize(
    subject: Subject, folder: Path, arguments: argparse.Namespace, perplexity: Perplexity | None
) -> Iterator[Row]:
    """Run every side at every width, as often as asked for, and yield the medians of each."""
    for bits in arguments.bits:
        sides = [s for s in arguments.sides if bits == 4 or not s.endswith("awq")]
        runs: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
        for _ in range(arguments.runs):
            for side, found in runs.items():
                found.append(run_side(side, bits, subject, folder / side, arguments))
        for side, found in runs.items():
            medians = {key: median_of([run[key] for run in found]) for key in found[0]}
            row: Row = {"side": side, "bits": bits, "layers": subject.layers, **medians}
            if perplexity:
                row["perplexity"] = perplexity.of(folder / side)
            print(*row_cells(row), flush=True)
            yield {**row, "runs": found}


def load_perplexity(merged: Path, arguments: argparse.Namespace) -> Perplexity:
    """Return what measures checkpoints of the model."""
    from perplexity import Perplexity  # noqa: PLC0415 (imports torch and transformers)

    return Perplexity(
        merged, arguments.text, windows=arguments.windows, window_tokens=arguments.window_tokens
    )


def ratios_of(rows: list[Row]) -> dict[str, float]:
    """Compare sides: times of a layer run by run, then the median; perplexities as they are."""
    found = {(row["side"], row["bits"], row["layers"]): row for row in rows}
    ratios = {}
    for (side, bits, layers), row in found.items():
        for peer in [b for a, b in PAIRS if a == side]:
            other = found.get((peer, bits, layers))
            if other is None:
                continue
            name = f"{side}/{peer}, {bits} bit, {layers} layers"
            pairs = zip(row["runs"], other["runs"], strict=True)
            if peer != "rtn":
                times = [a["layer_seconds"] / b["layer_seconds"] for a, b in pairs]
                ratios[f"seconds of a layer, {name}"] = median_of(times)
            if "perplexity" in row:
                ratios[f"perplexity, {name}"] = row["perplexity"] / other["perplexity"]
    return ratios


def row_cells(row: Row) -> list[str]:
    """Give a row as cells of the table."""
    return [
        row["side"],
        str(row["bits"]),
        str(row["layers"]),
        f"{row['layer_seconds']:.2f} s",
        f"{row['wall_seconds']:.1f} s",
        f"{row['cpu_seconds']:.1f} s",
        f"{row['peak_rss_bytes'] / 1e6:.0f} MB",
        *([f"{row['perplexity']:.3f}"] if "perplexity" in row else []),
    ]


def draw_memory(axes: Any, rows: list[Row]) -> None:
    """Draw the peak of each side over the number of layers."""
    for side in dict.fromkeys(row["side"] for row in rows):
        own = [row for row in rows if row["side"] == side]
        peaks = [row["peak_rss_bytes"] / 1e6 for row in own]
        axes.plot([row["layers"] for row in own], peaks, "o-", label=side)
    axes.set(xlabel="layers", ylabel="peak resident memory in MB", xlim=(0, None), ylim=(0, None))
    axes.legend()


def draw_perplexity(axes: Any, rows: list[Row], unquantized: float) -> None:
    """Draw how much higher than unquantized the perplexity of each side is, by width."""
    sides = list(dict.fromkeys(row["side"] for row in rows))
    widths = sorted({row["bits"] for row in rows}, reverse=True)
    wide = 0.8 / len(sides)
    for number, side in enumerate(sides):
        own = [row for row in rows if row["side"] == side]
        places = [widths.index(row["bits"]) - 0.4 + wide * (number + 0.5) for row in own]
        axes.bar(places, [row["perplexity"] for row in own], wide, label=side)
    axes.axhline(unquantized, color="black", linewidth=1, label="unquantized")
    axes.set_xticks(range(len(widths)), [f"{bits} bit" for bits in widths])
    axes.set(ylabel="perplexity", yscale="log")
    axes.legend()


def main() -> None:
    """Quantize one checkpoint after the other."""
    arguments = parse_arguments()
    rows: list[Row] = []
    unquantized = math.nan
    with work_folder(arguments) as folder:
        for subject in subjects(folder, arguments):
            perplexity = None
            if arguments.text:
                perplexity = load_perplexity(subject.merged, arguments)
                unquantized = perplexity.of(subject.merged)
                print(f"perplexity unquantized: {unquantized:.3f}", flush=True)
            rows += quantize(subject, folder, arguments, perplexity)
        ratios = ratios_of(rows)
        write_results(
            arguments, folder, benchmark="quantize", shape=arguments.shape,
            model=arguments.model and arguments.model.name, group_size=arguments.group_size,
            nsamples=arguments.nsamples, maxlen=arguments.maxlen, results=rows, ratios=ratios,
            perplexity_unquantized=unquantized if arguments.text else None,
        )  # fmt: skip
    header = ["side", "bits", "layers", "a layer", "wall", "CPU", "peak"]
    print_table(header + ["perplexity"] * bool(arguments.text), map(row_cells, rows))
    for name, ratio in ratios.items():
        print(f"{name}: {ratio:.3f}")
    if arguments.text:
        save_plot(
            arguments.plot, "Perplexity by bits", lambda a: draw_perplexity(a, rows, unquantized)
        )
    else:
        save_plot(arguments.plot, "Peak memory by layers", lambda a: draw_memory(a, rows))


if __name__ == "__main__":
    main()
