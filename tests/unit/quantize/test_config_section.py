"""The section of config.json: what transformers makes of it, and what loaders leave out."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING, Any

import pytest
from transformers import AutoConfig
from transformers.quantizers.auto import AutoQuantizationConfig
from transformers.quantizers.quantizers_utils import should_convert_module

import streammerge
from streammerge.errors import UnsupportedError
from streammerge.quantize.config_section import check_format, quantization_section
from streammerge.quantize.settings import QuantizeSettings

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

GPTQ, AWQ, RTN = (QuantizeSettings(method=method) for method in ("gptq", "awq", "rtn"))
ATTENTION = [f"self_attn.{name}_proj" for name in "qkvo"]
MLP = [f"mlp.{name}_proj" for name in ("gate", "up", "down")]


def names(parts: Iterable[str], layers: Iterable[int], root: str = "model.layers") -> list[str]:
    return [f"{root}.{layer}.{part}" for layer, part in product(layers, parts)]


DENSE = names(ATTENTION + MLP, range(12))

# what is quantized, what is not
MODELS: dict[str, tuple[list[str], list[str]]] = {
    "plain": (DENSE, ["lm_head"]),
    "nothing kept": (DENSE, []),
    # a router's name is the beginning of another linear's in the first layer
    "experts": (
        names(ATTENTION, range(12))
        + names(MLP, [0])
        + names([f"mlp.experts.{e}.{n}_proj" for e in range(3) for n in ("up", "down")], [1, 2]),
        ["lm_head", *names(["mlp.gate"], range(1, 12))],
    ),
    "fused experts": (
        names(ATTENTION, range(12)),
        ["lm_head", *names(["mlp.experts", "mlp.gate"], range(12))],
    ),
    "tower": (
        names(ATTENTION + MLP, range(3), "model.language_model.layers"),
        ["lm_head", *names(["attn.qkv", *MLP], range(4), "model.visual.blocks")],
    ),
    "tower with a linear's name": (
        names([*ATTENTION, "mlp.proj"], range(3)),
        ["model.proj_in.proj", *names(["mlp.proj"], range(2), "model.proj.layers")],
    ),
    # the path of layer 1 is in those of layers 10 and 11
    "a layer left out": ([n for n in DENSE if ".1." not in n], names(ATTENTION + MLP, [1])),
    "one kind left out": (
        names(ATTENTION + MLP[:2], range(12)),
        ["lm_head", *names(MLP[2:], range(12))],
    ),
    "first dense": (
        names(ATTENTION, range(12)) + names(MLP, range(2)),
        names(["mlp.router", *(f"mlp.experts.{e}.up_proj" for e in range(3))], range(2, 12)),
    ),
}


# how loaders read the section


def transformers_awq(section: dict[str, Any], name: str) -> bool:
    return bool(should_convert_module(name, [*(section["modules_to_not_convert"] or [])]))


def substrings(section: dict[str, Any], name: str) -> bool:
    return not any(entry in name for entry in section["modules_to_not_convert"] or [])


def dynamic(section: dict[str, Any], name: str) -> bool:
    patterns = section.get("dynamic", {})
    assert all(pattern.startswith("-:") and not patterns[pattern] for pattern in patterns)
    return not any(re.match(pattern.removeprefix("-:"), name) for pattern in patterns)


def optimum(section: dict[str, Any], name: str) -> bool:
    ends = section.get("modules_in_block_to_quantize")
    return name.startswith(section["block_name_to_quantize"]) and (
        ends is None or any(name.endswith(end) for group in ends for end in group)
    )


def vllm_gptq(section: dict[str, Any], name: str) -> bool:
    parts = section.get("modules_in_block_to_quantize")
    is_listed = parts is None or any(part in name for group in parts for part in group)
    return is_listed and dynamic(section, name)


class TestLoaders:
    @pytest.mark.parametrize("model", MODELS)
    @pytest.mark.parametrize(
        ("settings", "reads"),
        [
            (AWQ, transformers_awq),
            (AWQ, substrings),
            (AWQ, dynamic),
            (GPTQ, dynamic),
            (GPTQ, optimum),
            (GPTQ, vllm_gptq),
        ],
        ids=lambda value: getattr(value, "__name__", None) or value.method,
    )
    def test_each_reading_parts_quantized_from_kept(
        self, model: str, settings: QuantizeSettings, reads: Any
    ) -> None:
        quantized, kept = MODELS[model]
        section = quantization_section(settings, quantized=quantized, kept=kept)
        assert [name for name in quantized if not reads(section, name)] == []
        # a head is known to be one
        assert [name for name in kept if reads(section, name) and name != "lm_head"] == []

    @pytest.mark.parametrize(("settings", "reads"), [(AWQ, substrings), (GPTQ, dynamic)])
    def test_a_tower_is_found_where_vllm_and_sglang_have_it(
        self, settings: QuantizeSettings, reads: Any
    ) -> None:
        quantized, kept = MODELS["tower"]
        section = quantization_section(settings, quantized=quantized, kept=kept)
        assert not reads(section, "visual.blocks.0.attn.qkv")
        assert reads(section, "language_model.model.layers.0.self_attn.qkv_proj")

    def test_entries_are_few(self) -> None:
        quantized, kept = MODELS["fused experts"]
        section = quantization_section(AWQ, quantized=quantized, kept=kept)
        assert section["modules_to_not_convert"] == ["lm_head", "mlp", *names(["mlp"], range(12))]
        section = quantization_section(GPTQ, quantized=quantized, kept=kept)
        assert list(section["dynamic"]) == [r"-:(?:.*\.)?mlp(?:\.|$)"]


class TestKeys:
    def test_gptq(self) -> None:
        assert quantization_section(GPTQ, quantized=DENSE, kept=["lm_head"]) == {
            "quant_method": "gptq",
            "bits": 4,
            "group_size": 128,
            "desc_act": False,
            "sym": True,
            "checkpoint_format": "gptq",
            "pack_dtype": "int32",
            "lm_head": False,
            "block_name_to_quantize": "model.layers",
            "true_sequential": True,
            "damp_percent": GPTQ.damp,
            "act_group_aware": True,
            "meta": {"quantizer": [f"streammerge:{streammerge.__version__}"]},
        }

    def test_awq(self) -> None:
        assert quantization_section(AWQ, quantized=DENSE, kept=["lm_head"]) == {
            "quant_method": "awq",
            "bits": 4,
            "group_size": 128,
            "zero_point": True,
            "version": "gemm",
            "lm_head": False,
            "modules_to_not_convert": ["lm_head"],
            "meta": {"quantizer": [f"streammerge:{streammerge.__version__}"]},
        }

    def test_rtn_is_stored_as_gptq_without_what_it_did_not_do(self) -> None:
        section = quantization_section(replace(RTN, desc_act=True), quantized=DENSE, kept=[])
        assert section["quant_method"] == "gptq"
        assert section["desc_act"] is False
        assert not {"damp_percent", "true_sequential", "act_group_aware"} & set(section)

    def test_order_of_activations(self) -> None:
        section = quantization_section(replace(GPTQ, desc_act=True), quantized=DENSE, kept=[])
        assert section["desc_act"] is True
        assert section["act_group_aware"] is False

    def test_is_json(self) -> None:
        for settings, (quantized, kept) in product((GPTQ, AWQ, RTN), MODELS.values()):
            section = quantization_section(settings, quantized=quantized, kept=kept)
            assert json.loads(json.dumps(section)) == section


class TestTransformers:
    @pytest.mark.parametrize(
        "settings",
        [
            GPTQ,
            replace(GPTQ, bits=3, group_size=-1, desc_act=True, damp=0.01),
            replace(GPTQ, bits=8, is_symmetric=False, checkpoint_format="gptq_v2"),
            replace(RTN, bits=2, group_size=32),
            AWQ,
            replace(AWQ, group_size=64, is_symmetric=False),
        ],
    )
    def test_parses_a_saved_configuration(self, tmp_path: Path, settings: QuantizeSettings) -> None:
        section = quantization_section(settings, quantized=DENSE, kept=["lm_head"])
        config = {"model_type": "llama", "hidden_size": 64, "quantization_config": section}
        (tmp_path / "config.json").write_text(json.dumps(config))
        read = AutoConfig.from_pretrained(tmp_path)
        parsed = AutoQuantizationConfig.from_dict(read.quantization_config)
        assert parsed.bits == settings.bits
        assert parsed.group_size == settings.group_size
        assert parsed.quant_method == ("awq" if settings.method == "awq" else "gptq")
        if settings.method == "awq":
            assert parsed.zero_point is True
            assert parsed.format == "gemm"
            assert parsed.modules_to_not_convert == ["lm_head"]
        else:
            assert parsed.format == settings.checkpoint_format
            assert parsed.sym == settings.is_symmetric
            assert parsed.desc_act == settings.desc_act
            assert parsed.block_name_to_quantize == "model.layers"
        if settings.method == "gptq":
            assert parsed.damp_percent == settings.damp


class TestRefusals:
    def test_awq_has_four_bits(self) -> None:
        with pytest.raises(
            UnsupportedError, match="4 bits only, in export_quantization_bit; got 8"
        ):
            check_format(replace(AWQ, bits=8))

    @pytest.mark.parametrize("settings", [GPTQ, RTN])
    def test_asymmetric_codes_want_gptq_v2(self, settings: QuantizeSettings) -> None:
        with pytest.raises(UnsupportedError, match="gptq_v2"):
            quantization_section(replace(settings, is_symmetric=False), quantized=DENSE, kept=[])
        check_format(replace(settings, is_symmetric=False, checkpoint_format="gptq_v2"))

    def test_a_name_that_ends_others_cannot_be_left_out_by_awq(self) -> None:
        with pytest.raises(UnsupportedError, match="'proj' cannot be told from"):
            quantization_section(AWQ, quantized=DENSE, kept=["proj"])
        assert quantization_section(GPTQ, quantized=DENSE, kept=["proj"])

    @pytest.mark.parametrize("quantized", [[], ["a.layers.0.q", "b.layers.0.q"]])
    def test_gptq_has_one_list_of_layers(self, quantized: list[str]) -> None:
        with pytest.raises(UnsupportedError, match="one list of layers"):
            quantization_section(GPTQ, quantized=quantized, kept=[])
