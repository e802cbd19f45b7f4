"""Merged tensors by name are those of an export."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file

import streammerge
from streammerge.config import parse_config
from streammerge.engine.prepare import prepare
from streammerge.errors import NonFiniteError
from streammerge.quantize import source as source_module
from streammerge.quantize.source import MergedSource

if TYPE_CHECKING:
    from pathlib import Path

PROJECTION, EMBEDDING = "model.layers.0.self_attn.q_proj.weight", "model.embed_tokens.weight"


@pytest.fixture
def config(tmp_path: Path) -> dict[str, str]:
    torch.manual_seed(2)
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    adapter.mkdir()
    tensors = {PROJECTION: torch.randn(37, 24), EMBEDDING: torch.randn(50, 24)}
    save_file({k: v.bfloat16() for k, v in tensors.items()}, base / "model.safetensors")
    (base / "config.json").write_text(json.dumps({"model_type": "llama"}))
    key = "base_model.model.model.layers.0.self_attn.q_proj"
    factors = {
        f"{key}.lora_A.weight": torch.randn(4, 24), f"{key}.lora_B.weight": torch.randn(37, 4),
    }  # fmt: skip
    save_file(factors, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]})
    )
    return {
        "model_name_or_path": str(base),
        "adapter_name_or_path": str(adapter),
        "export_dir": str(tmp_path / "out"),
    }


def open_source(config: dict[str, str]) -> MergedSource:
    plan = prepare(parse_config(config))
    return MergedSource(plan)


@pytest.mark.parametrize("piece_bytes", [1, 500, 16 << 20])
@pytest.mark.parametrize("infer_dtype", ["auto", "float32"])
def test_bits_are_those_of_an_export(
    config: dict[str, str], piece_bytes: int, infer_dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config["infer_dtype"] = infer_dtype
    monkeypatch.setattr(source_module, "PIECE_BYTES", piece_bytes)
    streammerge.export(config)
    expected = load_file(f"{config['export_dir']}/model.safetensors")
    with open_source(config) as source:
        assert sorted(source.names) == sorted(expected)
        for name, tensor in expected.items():
            assert name in source
            assert torch.equal(source.load(name), tensor)
            assert torch.equal(source.load(name, torch.float32), tensor.float())
            begins, parts = zip(*((b, p.clone()) for b, p in source.pieces(name)), strict=True)
            assert begins[0] == 0
            assert torch.equal(torch.cat(parts), tensor)
            for chosen in ([0], [3, 4, 36], list(range(37)), []):
                rows = source.rows(name, torch.tensor(chosen, dtype=torch.int64))
                assert torch.equal(rows, tensor[chosen])


def test_a_broken_merge_is_refused(config: dict[str, str]) -> None:
    path = f"{config['adapter_name_or_path']}/adapter_model.safetensors"
    factors = load_file(path)
    next(iter(factors.values()))[0, 0] = float("nan")
    save_file(factors, path)
    threads = torch.get_num_threads()
    with open_source(config) as source, pytest.raises(NonFiniteError, match="q_proj"):
        source.load(PROJECTION)
    assert torch.get_num_threads() == threads


def test_threads_are_those_of_the_plan_and_are_given_back(config: dict[str, str]) -> None:
    before = torch.get_num_threads()
    plan = prepare(parse_config({**config, "threads": before + 2}))
    with MergedSource(plan) as source:
        assert torch.get_num_threads() == before + 2
        source.load(PROJECTION)
        assert torch.get_num_threads() == before + 2
    assert torch.get_num_threads() == before
