"""A small llama-shaped checkpoint and a LoRA for it, written with numpy: no model is built."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import numpy as np
import pytest
from safetensors.numpy import save_file

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

HIDDEN, VOCAB, LAYERS, RANK = 32, 64, 2, 4
Arrays = dict[str, "np.ndarray[tuple[int, ...], np.dtype[np.float32]]"]


class Case:
    """A base, an adapter and an output folder below one folder."""

    def __init__(self, folder: Path) -> None:
        self.base = folder / "base"
        self.adapter = folder / "adapter"
        self.output = folder / "out" / "merged"
        self.config = folder / "export.yaml"
        random = np.random.default_rng(3)

        def values(*shape: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
            return random.standard_normal(shape, dtype=np.float32)

        shards: list[Arrays] = [
            {"model.embed_tokens.weight": values(VOCAB, HIDDEN)},
            {
                f"model.layers.{n}.self_attn.q_proj.weight": values(HIDDEN, HIDDEN)
                for n in range(LAYERS)
            },
        ]
        self.base.mkdir()
        names = [f"model-{n:05d}-of-00002.safetensors" for n in (1, 2)]
        for name, shard in zip(names, shards, strict=True):
            save_file(shard, self.base / name, metadata={"format": "pt"})
        weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        total = sum(array.nbytes for shard in shards for array in shard.values())
        self.write_json(
            self.base / "model.safetensors.index.json",
            {"metadata": {"total_size": total}, "weight_map": weight_map},
        )
        self.write_json(
            self.base / "config.json", {"model_type": "llama", "tie_word_embeddings": True}
        )
        self.adapter.mkdir()
        self.factors: Arrays = {}
        for n in range(LAYERS):
            key = f"base_model.model.model.layers.{n}.self_attn.q_proj"
            self.factors[f"{key}.lora_A.weight"] = values(RANK, HIDDEN)
            self.factors[f"{key}.lora_B.weight"] = values(HIDDEN, RANK)
        self.write_adapter()
        self.write_json(
            self.adapter / "adapter_config.json",
            {"peft_type": "LORA", "r": RANK, "lora_alpha": 8, "target_modules": ["q_proj"]},
        )
        self.config.write_text(
            f"model_name_or_path: {self.base}\nadapter_name_or_path: {self.adapter}\n"
            f"export_dir: {self.output}\n"
        )

    def write_adapter(self) -> None:
        save_file(self.factors, self.adapter / "adapter_model.safetensors")

    @staticmethod
    def write_json(path: Path, value: object) -> None:
        path.write_text(json.dumps(value))

    def left_behind(self) -> list[str]:
        """What stands in the output's parent folder."""
        parent = self.output.parent
        return sorted(p.name for p in parent.iterdir()) if parent.exists() else []


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path)


@pytest.fixture
def run_cli() -> Callable[..., tuple[int, str, str]]:
    """Run the command line in a process of its own: exit code, stdout, stderr."""

    def run(*arguments: object, **options: object) -> tuple[int, str, str]:
        done = subprocess.run(
            [sys.executable, "-m", "streammerge", *map(str, arguments)],
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
            **options,  # type: ignore[call-overload]
        )
        return done.returncode, done.stdout, done.stderr

    return run
