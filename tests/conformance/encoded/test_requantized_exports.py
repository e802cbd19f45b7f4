"""Merges that are stored in the base's own format again: `export_requantize: same`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import libraries
import numpy as np
import pytest
import torch
from models import assert_same, load_folder, merge_by_peft, raw, section_in
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from streammerge.errors import PlanError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from models import Merge

pytestmark = pytest.mark.filterwarnings("ignore")

# format, options of its library, and the dtype that its codes stand for
FORMS: dict[str, tuple[str, dict[str, Any], torch.dtype]] = {
    "nf4": ("nf4", {}, torch.bfloat16),
    "fp4 plain": ("fp4", {"is_nested": False}, torch.bfloat16),
    "int8": ("int8", {}, torch.float32),
    "fp8": ("fp8", {}, torch.bfloat16),
    "fp8-block": ("fp8-block", {}, torch.bfloat16),
    "mxfp4": ("mxfp4", {}, torch.bfloat16),
    "nvfp4": ("nvfp4", {}, torch.bfloat16),
    "w4a16": ("w4a16", {"group_size": 32}, torch.bfloat16),
    "w8a16": ("w8a16", {"group_size": -1}, torch.bfloat16),
}
KEYS = {"group_size": "export_quantization_group_size", "is_nested": "export_quantization_double"}


def encode_base(merge: Merge, folder: Path, case: str) -> Path:
    """Store a base in a format; its bytes are the subject of other tests."""
    form, options, _ = FORMS[case]
    settings = {KEYS[key]: value for key, value in options.items()}
    merge.export(
        folder / "coded", adapter_name_or_path=None, export_quantization_method=form, **settings
    )
    return folder / "coded"


def merge_again(merge: Merge, base: Path, output: Path, **settings: Any) -> Any:
    return merge.export(output, model_name_or_path=str(base), export_requantize="same", **settings)


def decoded_and_merged(
    merge: Merge, base: Path, case: str
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return what the base's codes stand for, and what PEFT makes of that."""
    form, options, dtype = FORMS[case]
    stored = load_folder(base)
    model: Any = AutoModelForCausalLM.from_pretrained(merge.base)
    before = {}
    for name in merge.linears:
        if form == "fp8-block" and f"{name}_scale_inv" not in stored:
            continue
        weight = libraries.decode(form, name, stored, dtype, **options)
        model.get_parameter(name).data = before[name] = weight.to(dtype)
    # the model's tensors change in place
    before = {name: tensor.clone() for name, tensor in before.items()}
    merged = merge_by_peft(model, merge.adapters).state_dict()
    return before, {name: merged[name].detach() for name in before}


@pytest.mark.parametrize("case", FORMS)
def test_merged_weights_are_encoded_again_and_others_keep_their_bytes(
    case: str, merge_of: Callable[..., Merge], tmp_path: Path
) -> None:
    form, options, _ = FORMS[case]
    merge = merge_of("llama", "bfloat16", "few")
    base = encode_base(merge, tmp_path, case)
    report = merge_again(merge, base, tmp_path / "out")
    _, merged = decoded_and_merged(merge, base, case)
    changed = [name for name in merged if "q_proj" in name or "down_proj" in name]
    assert len(changed) == 4
    if form == "nvfp4":
        # with the scale of the whole weight the others of a joined one change too
        changed = [name for name in merged if ".self_attn." in name or "down_proj" in name]
        changed = [name for name in changed if "o_proj" not in name]
    again = libraries.encode_all(form, merged, changed, **options)
    expected = {**load_folder(base), **{k: t for k, t in again.items() if k not in merged}}
    expected.update({name: again[name] for name in changed if name in again})
    assert_same(load_folder(tmp_path / "out"), expected)
    assert section_in(tmp_path / "out") == section_in(base)
    assert any("quantized again" in note for note in report.notes)
    assert report.deltas.keys() == {"q_proj", "down_proj"}


@pytest.mark.parametrize("case", ["nf4", "int8", "nvfp4"])
def test_the_share_of_deltas_is_that_of_their_definition(
    case: str, merge_of: Callable[..., Merge], tmp_path: Path
) -> None:
    form, options, dtype = FORMS[case]
    merge = merge_of("llama", "bfloat16", "few")
    base = encode_base(merge, tmp_path, case)
    report = merge_again(merge, base, tmp_path / "out")
    before, merged = decoded_and_merged(merge, base, case)
    stored = load_folder(tmp_path / "out")
    along, squares, error = 0.0, 0.0, 0.0
    for name in before:
        if "q_proj" not in name:
            continue
        middle = slice((len(before[name]) - 64) // 2, (len(before[name]) + 64) // 2)
        after = libraries.decode(form, name, stored, dtype, **options)
        w, m, q = (
            t.double().numpy()[middle] for t in (before[name], merged[name], after.to(dtype))
        )
        along += float(np.sum((q - w) * (m - w)))
        squares += float(np.sum((m - w) ** 2))
        error += float(np.sum((q - m) ** 2))
    found = report.deltas["q_proj"]
    assert found["weights"] == 2
    assert found["kept"] == pytest.approx(along / squares, rel=1e-9)
    assert found["noise"] == pytest.approx((error / squares) ** 0.5, rel=1e-9)


def test_eight_bits_keep_deltas(merge_of: Callable[..., Merge], tmp_path: Path) -> None:
    merge = merge_of("llama", "bfloat16", "few")
    base = encode_base(merge, tmp_path, "int8")
    report = merge_again(merge, base, tmp_path / "out")
    for share in report.deltas.values():
        assert 0.9 < share["kept"] < 1.1
        assert 0 < share["noise"] < 1


def test_what_scales_inputs_and_caches_is_kept(
    merge_of: Callable[..., Merge], tmp_path: Path
) -> None:
    merge = merge_of("llama", "bfloat16", "few")
    base = encode_base(merge, tmp_path, "fp8")
    stored = load_folder(base)
    scales = {
        "model.layers.0.self_attn.q_proj.input_scale": torch.tensor([0.5], dtype=torch.bfloat16),
        "model.layers.1.mlp.down_proj.input_scale": torch.tensor([2.5], dtype=torch.bfloat16),
        "model.layers.0.self_attn.k_scale": torch.tensor([1.5], dtype=torch.bfloat16),
        "model.layers.0.self_attn.v_scale": torch.tensor([3.5], dtype=torch.bfloat16),
    }
    save_file({**stored, **scales}, base / "model.safetensors", metadata={"format": "pt"})
    merge_again(merge, base, tmp_path / "out")
    found = load_folder(tmp_path / "out")
    assert found.keys() == {**stored, **scales}.keys()
    assert all(raw(found[name]) == raw(scale) for name, scale in scales.items())


def test_shards_of_the_base_can_be_kept(merge_of: Callable[..., Merge], tmp_path: Path) -> None:
    merge = merge_of("llama", "bfloat16", "few")
    merge.export(
        tmp_path / "coded",
        adapter_name_or_path=None,
        export_quantization_method="nf4",
        export_size="60KB",
    )
    merge_again(merge, tmp_path / "coded", tmp_path / "one")
    merge_again(merge, tmp_path / "coded", tmp_path / "kept", export_size="keep", threads=3)
    assert_same(load_folder(tmp_path / "kept"), load_folder(tmp_path / "one"))
    index = "model.safetensors.index.json"
    maps = [json.loads((tmp_path / name / index).read_text()) for name in ("coded", "kept")]
    assert maps[0]["weight_map"] == maps[1]["weight_map"]


def test_a_base_that_is_not_quantized_has_no_format(
    merge_of: Callable[..., Merge], tmp_path: Path
) -> None:
    merge = merge_of("llama", "bfloat16", "few")
    with pytest.raises(PlanError, match=r"base is not quantized.*export_quantization_method"):
        merge_again(merge, merge.base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("section", [
    {"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "gptq"},
    {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True},
], ids=lambda section: section["quant_method"])  # fmt: skip
def test_calibrated_codes_are_not_made_again(
    section: dict[str, Any], merge_of: Callable[..., Merge], tmp_path: Path
) -> None:
    merge = merge_of("llama", "bfloat16", "few")
    base = tmp_path / "calibrated"
    base.mkdir()
    config = json.loads((merge.base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": section}))
    (base / "model.safetensors").write_bytes((merge.base / "model.safetensors").read_bytes())
    with pytest.raises(PlanError, match="base is quantized"):
        merge_again(merge, base, tmp_path / "out")
    with pytest.raises(UnsupportedError, match="cannot be made without calibration"):
        merge_again(merge, base, tmp_path / "out", allow_dequantize=True)
    assert not (tmp_path / "out").exists()
