"""A merge onto a quantized base has the bits of PEFT's onto what its codes stand for."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    Qwen3MoeConfig,
)

import streammerge
from streammerge.checkpoint.header import TensorSpec
from streammerge.codecs.registry import find_codec
from streammerge.dtypes import Dtype
from streammerge.errors import PlanError, UnsupportedError
from streammerge.quantize.linear import Grid
from streammerge.quantize.pack import pack_awq, pack_gptq
from streammerge.quantize.rtn import quantize_rtn

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings("ignore")

_SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
MODELS: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**_SIZES),
    "moe": lambda: Qwen3MoeConfig(**_SIZES, head_dim=32, num_experts=3, num_experts_per_tok=2,
                                  moe_intermediate_size=64),
    "gpt2": lambda: GPT2Config(vocab_size=96, n_embd=128, n_layer=2, n_head=4, n_positions=64),
}  # fmt: skip
_INT4 = {
    "num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True,
    "dynamic": False,
}  # fmt: skip
_INT8 = {
    "num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True, "dynamic": False,
}  # fmt: skip
_FLOAT8 = {
    "num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False,
}  # fmt: skip
_NVFP4 = {
    "num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16,
    "symmetric": True, "dynamic": False, "scale_dtype": "torch.float8_e4m3fn",
}  # fmt: skip
_MXFP4 = {
    "num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "symmetric": True,
    "dynamic": False, "scale_dtype": "torch.uint8",
}  # fmt: skip


def compressed(form: str, weights: dict[str, Any]) -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": groups,
            "ignore": ["lm_head"]}  # fmt: skip


ENCODED: dict[str, dict[str, Any]] = {
    "nf4": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "bfloat16"},
    "fp4": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4",
            "bnb_4bit_use_double_quant": False, "bnb_4bit_compute_dtype": "bfloat16"},
    "int8": {"quant_method": "bitsandbytes", "load_in_8bit": True},
    "fp8-block": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "int4-groups": compressed("pack-quantized", _INT4),
    "int8-channels": compressed("pack-quantized", _INT8),
    "float8-channels": compressed("float-quantized", _FLOAT8),
    "nvfp4": compressed("nvfp4-pack-quantized", _NVFP4),
    "mxfp4": compressed("mxfp4-pack-quantized", _MXFP4),
}  # fmt: skip
CODES: dict[str, dict[str, Any]] = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "gptq"},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm",
            "zero_point": True},
    "aqlm": {"quant_method": "aqlm", "num_codebooks": 2, "nbits_per_codebook": 8,
             "in_group_size": 8, "out_group_size": 1, "linear_weights_not_to_quantize": []},
}  # fmt: skip


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


DTYPES = {
    Dtype.F32: torch.float32, Dtype.F16: torch.float16, Dtype.BF16: torch.bfloat16,
    Dtype.U8: torch.uint8, Dtype.I8: torch.int8, Dtype.I32: torch.int32, Dtype.I64: torch.int64,
    Dtype.F8_E4M3: torch.float8_e4m3fn,
}  # fmt: skip


def encode(
    section: dict[str, Any], name: str, weight: torch.Tensor
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Return the stored tensors of a weight, and what they decode to as a whole."""
    codec = find_codec(section, Dtype.BF16)
    encoder = codec.encoder(name, tuple(weight.shape), Dtype.BF16)
    encoder.begin()
    if encoder.needs_scan:
        encoder.scan(0, len(weight), weight)
    found = {**encoder.encode(0, len(weight), weight), **encoder.finish()}
    state = {}
    for part in encoder.weight.parts:
        flat = found[part.role].contiguous().flatten().view(torch.uint8)
        state[part.tensor.name] = flat.view(DTYPES[part.tensor.dtype]).reshape(part.tensor.shape)
    return state, decode(section, state)


def decode(section: dict[str, Any], state: dict[str, torch.Tensor]) -> torch.Tensor:
    """Decode a weight as a whole, with the codecs that are held to the formats' libraries."""
    names = {torch_dtype: dtype for dtype, torch_dtype in DTYPES.items()}
    specs = [TensorSpec(name, names[t.dtype], tuple(t.shape)) for name, t in state.items()]
    codec = find_codec(section, Dtype.BF16)
    (weight,) = codec.find(specs, lambda tensor: raw(state[tensor.name])).weights
    data = {
        extent.role: extent.take(memoryview(raw(state[weight.part(extent.role).name])))
        for extent in weight.extents(0, weight.rows)
    }
    return weight.decode(0, weight.rows, data)


def round_off(
    section: dict[str, Any], name: str, weight: torch.Tensor
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Return the stored tensors of a weight in a calibrated format, and what they stand for."""
    if section["quant_method"] == "aqlm":
        return any_codes(section, name, weight)
    is_awq = section["quant_method"] == "awq"
    codes = quantize_rtn(weight, Grid(4, is_symmetric=not is_awq), 32)
    packed = pack_awq(codes) if is_awq else pack_gptq(codes, "gptq")
    module = name.removesuffix(".weight")
    return {f"{module}.{end}": value for end, value in packed.items()}, codes.dequantize().half()


def any_codes(
    section: dict[str, Any], name: str, weight: torch.Tensor
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Return codes and codebooks of AQLM that nobody fitted to the weight, and their values."""
    module, (rows, columns) = name.removesuffix(".weight"), weight.shape
    generator = torch.Generator().manual_seed(len(name))
    codes = torch.randint(-128, 128, (rows, columns // 8, 2), generator=generator)
    state = {
        f"{module}.codes": codes.to(torch.int8),
        f"{module}.codebooks": torch.randn(2, 256, 1, 8, generator=generator).half(),
        f"{module}.scales": 0.02 * torch.rand(rows, 1, 1, 1, generator=generator).half(),
    }
    return state, decode(section, state)


class Case:
    """A quantized base, and the model that it decodes to."""

    def __init__(self, folder: Path, model: str, section: dict[str, Any]) -> None:
        self.folder, self.base, self.plain = folder, folder / "base", folder / "plain"
        self.adapter, self.out = folder / "adapter", folder / "out"
        torch.manual_seed(11)
        original: Any = AutoModelForCausalLM.from_config(MODELS[model](), dtype=torch.bfloat16)
        original.save_pretrained(self.plain)
        is_turned = model == "gpt2"
        coder: Callable[..., Any] = round_off if section["quant_method"] in CODES else encode
        stored, decoded = {}, {}
        self.coded: list[str] = []
        for name, value in load_file(self.plain / "model.safetensors").items():
            is_linear = (value.ndim == 2 and name.endswith("proj.weight")) or (
                is_turned and name.endswith(("c_attn.weight", "c_fc.weight", "c_proj.weight"))
            )  # fmt: skip
            if not is_linear:
                stored[name] = decoded[name] = value
                continue
            state, back = coder(section, name, value.T.contiguous() if is_turned else value)
            stored.update(state)
            decoded[name] = (back.T if is_turned else back).contiguous()
            self.coded.append(name)
        self.write(stored, section)
        save_file(decoded, self.plain / "model.safetensors", metadata={"format": "pt"})
        targets = ["c_attn", "c_proj"] if is_turned else ["q_proj", "o_proj"]
        tuned: Any = get_peft_model(original.float(), LoraConfig(r=4, target_modules=targets,
                                    fan_in_fan_out=is_turned, init_lora_weights=False))  # fmt: skip
        tuned.save_pretrained(self.adapter)

    def write(self, stored: dict[str, torch.Tensor], section: dict[str, Any]) -> None:
        """Write the base in two shards, so that parts of a weight may be in either."""
        self.base.mkdir()
        names = list(stored)
        halves = names[::2], names[1::2]
        weight_map = {}
        for number, half in enumerate(halves, 1):
            file = f"model-{number:05d}-of-00002.safetensors"
            save_file({name: stored[name].clone() for name in half}, self.base / file)
            weight_map.update(dict.fromkeys(half, file))
        size = sum(t.nbytes for t in stored.values())
        (self.base / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map})
        )
        config = json.loads((self.plain / "config.json").read_text())
        config["quantization_config"] = section
        (self.base / "config.json").write_text(json.dumps(config))

    def merge(self, **settings: Any) -> Any:
        return streammerge.export({
            "model_name_or_path": str(self.base), "adapter_name_or_path": str(self.adapter),
            "export_dir": str(self.out), **settings,
        })  # fmt: skip

    def expected(self) -> dict[str, torch.Tensor]:
        """Let PEFT merge onto the decoded model, each tensor in its own dtype."""
        model: Any = AutoModelForCausalLM.from_pretrained(self.plain, dtype=torch.bfloat16)
        plain = load_file(self.plain / "model.safetensors")
        for name, value in plain.items():
            # single experts are fused in memory, and have no adapter here
            if ".experts." not in name:
                model.get_parameter(name).data = value
        merged = PeftModel.from_pretrained(model, self.adapter).merge_and_unload()
        return {**plain, **merged.state_dict()}

    def check(self) -> None:
        found = {}
        for file in self.out.glob("*.safetensors"):
            found.update(load_file(file))
        expected = self.expected()
        changed = 0
        for name, value in found.items():
            assert value.dtype == expected[name].dtype, name
            assert torch.equal(value, expected[name]), name
            changed += name in self.coded
        assert changed == len(self.coded)
        config = json.loads((self.out / "config.json").read_text())
        assert "quantization_config" not in config


@pytest.mark.parametrize("form", ENCODED)
def test_a_merge_onto_any_format_has_the_bits_of_peft(tmp_path: Path, form: str) -> None:
    case = Case(tmp_path, "llama", ENCODED[form])
    report = case.merge()
    case.check()
    assert any("base is quantized" in note for note in report.notes)
    assert report.tensors_changed == len(case.coded)
    # codes are smaller than what they stand for
    assert report.bytes_read < report.bytes_written


@pytest.mark.parametrize("form", CODES)
def test_calibrated_codes_are_merged_onto_when_asked(tmp_path: Path, form: str) -> None:
    case = Case(tmp_path, "llama", CODES[form])
    with pytest.raises(PlanError, match=rf"base is quantized \({form}\).*allow_dequantize: true"):
        case.merge()
    assert not case.out.exists()
    case.merge(allow_dequantize=True)
    case.check()


@pytest.mark.parametrize("settings", [
    {"threads": 1, "max_memory": "2GB"}, {"threads": 3, "io": "direct"}, {"io": "mmap"},
    {"export_size": "1MB"},
])  # fmt: skip
def test_the_bits_do_not_depend_on_how_it_is_done(tmp_path: Path, settings: Any) -> None:
    case = Case(tmp_path, "llama", ENCODED["nf4"])
    case.merge(**settings)
    case.check()


@pytest.mark.parametrize("form", ["nf4", "fp8-block", "int4-groups"])
def test_single_experts_and_turned_weights_too(tmp_path: Path, form: str) -> None:
    for model in ("moe", "gpt2"):
        folder = tmp_path / model
        folder.mkdir()
        case = Case(folder, model, ENCODED[form])
        case.merge()
        case.check()


def test_a_quantized_base_without_an_adapter_passes_through_unless_it_is_to_be_decoded(
    tmp_path: Path,
) -> None:
    case = Case(tmp_path, "llama", ENCODED["nf4"])
    case.merge(adapter_name_or_path=None)
    stored = {k for file in case.base.glob("*.safetensors") for k in load_file(file)}
    kept = {k for file in case.out.glob("*.safetensors") for k in load_file(file)}
    assert kept == stored
    assert "quantization_config" in json.loads((case.out / "config.json").read_text())
    case.merge(adapter_name_or_path=None, allow_dequantize=True, overwrite=True)
    found = {k: v for file in case.out.glob("*.safetensors") for k, v in load_file(file).items()}
    plain = load_file(case.plain / "model.safetensors")
    assert found.keys() == plain.keys()
    assert all(torch.equal(found[name], plain[name]) for name in plain)


def test_a_format_that_is_not_known_is_named(tmp_path: Path) -> None:
    case = Case(tmp_path, "llama", ENCODED["nf4"])
    config = json.loads((case.base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "quip"}
    (case.base / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match="quant_method: quip"):
        case.merge()
    assert not case.out.exists()
