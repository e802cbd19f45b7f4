"""Small checkpoints on disk."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Protocol

import pytest
import torch
from safetensors.torch import save_file

if TYPE_CHECKING:
    from pathlib import Path


class MakeFolder(Protocol):
    def __call__(
        self,
        shards: dict[str, dict[str, list[float]]],
        *,
        weight_map: object = None,
        index: str | None = None,
    ) -> Path: ...


@pytest.fixture
def make_folder(tmp_path: Path) -> MakeFolder:
    """Write shards, each a map of names to values, and an index if there is a `weight_map`."""

    def make(
        shards: dict[str, dict[str, list[float]]],
        *,
        weight_map: object = None,
        index: str | None = None,
    ) -> Path:
        folder = tmp_path / "checkpoint"
        folder.mkdir()
        for name, values in shards.items():
            tensors = {key: torch.tensor(value) for key, value in values.items()}
            if name.endswith(".bin"):
                torch.save(tensors, folder / name)
            else:
                save_file(tensors, folder / name)
        if weight_map is not None:
            layout = next(iter(shards))
            default = "pytorch_model.bin" if layout.endswith(".bin") else "model.safetensors"
            text = json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map})
            (folder / (index or f"{default}.index.json")).write_text(text)
        return folder

    return make
