"""Compare whole merges: streammerge, PEFT's merge_and_unload + save_pretrained, and a plain copy.

Each side runs in a process of its own, in turn; the base is dropped from the page cache before.
Wall time and peak resident memory are those of the process, imports included.

    python benchmarks/bench_merge.py --size 2 --runs 3
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file

PEFT_PROGRAM = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, output = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
model.merge_and_unload().save_pretrained(output, max_shard_size="5GB")
"""
HIDDEN, INTERMEDIATE, VOCABULARY, KV, RANK = 2048, 8192, 32000, 512, 16


@dataclass
class Side:
    """One way to merge, and what its runs took."""

    name: str
    command: list[str]
    seconds: list[float] = field(default_factory=list)
    peak_bytes: list[int] = field(default_factory=list)


def make_case(folder: Path, size_gb: float) -> tuple[Path, Path]:
    """Write a llama-shaped bf16 base of about `size_gb` GB and an all-linear adapter of rank 16."""
    layers = max(1, round((size_gb * 1e9 - 4 * VOCABULARY * HIDDEN) / 121.6e6))
    random = torch.Generator().manual_seed(0)
    base, adapter = folder / "base", folder / "adapter"
    base.mkdir()
    adapter.mkdir()
    shapes = {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (KV, HIDDEN),
        "self_attn.v_proj": (KV, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
        "mlp.up_proj": (INTERMEDIATE, HIDDEN),
        "mlp.down_proj": (HIDDEN, INTERMEDIATE),
    }

    def values(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random).mul_(0.02)

    weight_map: dict[str, str] = {}
    factors = {}
    names = [f"model-{n:05d}-of-{layers + 1:05d}.safetensors" for n in range(1, layers + 2)]
    for number, name in enumerate(names):
        if number == layers:
            shard = {
                "model.embed_tokens.weight": values(VOCABULARY, HIDDEN).bfloat16(),
                "model.norm.weight": torch.ones(HIDDEN, dtype=torch.bfloat16),
                "lm_head.weight": values(VOCABULARY, HIDDEN).bfloat16(),
            }
        else:
            prefix = f"model.layers.{number}."
            shard = {f"{prefix}{m}.weight": values(*s).bfloat16() for m, s in shapes.items()}
            for norm in ("input_layernorm", "post_attention_layernorm"):
                shard[f"{prefix}{norm}.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
            for module, (rows, columns) in shapes.items():
                key = f"base_model.model.{prefix}{module}"
                factors[f"{key}.lora_A.weight"] = values(RANK, columns)
                factors[f"{key}.lora_B.weight"] = values(rows, RANK)
        save_file(shard, base / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, name))
    save_file(factors, adapter / "adapter_model.safetensors")
    write_json(base / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    write_json(
        base / "config.json",
        {
            "model_type": "llama", "architectures": ["LlamaForCausalLM"], "torch_dtype": "bfloat16",
            "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE,
            "num_hidden_layers": layers, "num_attention_heads": 32, "num_key_value_heads": 8,
            "head_dim": 64, "tie_word_embeddings": False,
        },
    )  # fmt: skip
    targets = [module.partition(".")[2] for module in shapes]
    write_json(
        adapter / "adapter_config.json",
        {"peft_type": "LORA", "r": RANK, "lora_alpha": 32, "target_modules": targets},
    )
    return base, adapter


def write_json(path: Path, value: object) -> None:
    """Write a JSON file."""
    path.write_text(json.dumps(value))


def drop_cache(folder: Path) -> None:
    """Drop a folder's files from the page cache."""
    for path in folder.iterdir():
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def run_once(side: Side, base: Path, output: Path) -> None:
    """Run one merge in a process of its own and note what it took."""
    shutil.rmtree(output, ignore_errors=True)
    drop_cache(base)
    os.sync()
    started = time.perf_counter()
    process = subprocess.Popen(side.command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    # the others leave their output in the page cache: wait until it is on the disk, as ours is
    os.sync()
    if status:
        msg = f"{side.name} failed with status {status}"
        raise RuntimeError(msg)
    side.seconds.append(time.perf_counter() - started)
    side.peak_bytes.append(usage.ru_maxrss * 1024)


def main() -> None:
    """Run the benchmark and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=float, default=2.0, help="size of the base in GB")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--max-memory", default="800MB")
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder otherwise")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        # in a process of its own: what this one holds counts as its children's peak when they start
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            base, adapter = pool.apply(make_case, (folder, arguments.size))
        output = folder / "merged"
        ours = [
            sys.executable, "-m", "streammerge", "export", f"model_name_or_path={base}",
            f"adapter_name_or_path={adapter}", f"export_dir={output}",
            f"max_memory={arguments.max_memory}",
        ]  # fmt: skip
        theirs = [sys.executable, "-c", PEFT_PROGRAM, str(base), str(adapter), str(output)]
        copy = ["cp", "-r", str(base), str(output)]
        sides = [Side("streammerge", ours), Side("PEFT", theirs), Side("cp -r", copy)]
        for _ in range(arguments.runs):
            for side in sides:
                run_once(side, base, output)
        total = sum(path.stat().st_size for path in base.glob("*.safetensors"))
        print(f"{total / 1e9:.2f} GB bf16 base, rank {RANK}, all linear; {platform.machine()},")
        print(
            f"{os.cpu_count()} cores, torch {torch.__version__}; median of {arguments.runs}, cold"
        )
        for side in sides:
            line = f"{side.name:<12} {statistics.median(side.seconds):7.1f} s"
            # a copy holds nothing: what counts as its peak is this process's, from before it started
            peak = f"  {statistics.median(side.peak_bytes) / 1e6:8.0f} MB"
            print(line + (peak if side.command is not copy else ""))


if __name__ == "__main__":
    main()
