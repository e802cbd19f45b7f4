"""Small adapters on disk."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Protocol

import pytest
import torch
from safetensors.torch import save_file

if TYPE_CHECKING:
    from pathlib import Path


class MakeAdapter(Protocol):
    def __call__(
        self,
        tensors: dict[str, torch.Tensor] | None = None,
        *,
        legacy: bool = False,
        **options: Any,
    ) -> Path: ...


@pytest.fixture
def make_adapter(tmp_path: Path) -> MakeAdapter:
    """Write an adapter folder; `options` go into adapter_config.json beside a plain LoRA's."""

    def make(
        tensors: dict[str, torch.Tensor] | None = None, *, legacy: bool = False, **options: Any
    ) -> Path:
        folder = tmp_path / "adapter"
        folder.mkdir(exist_ok=True)
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, **options}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        if tensors is not None and legacy:
            torch.save(tensors, folder / "adapter_model.bin")
        elif tensors is not None:
            save_file(tensors, folder / "adapter_model.safetensors")
        return folder

    return make
