"""Which codec a configuration selects, what is refused by name, and the table in the docs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from streammerge.codecs.registry import all_codecs, find_codec
from streammerge.codecs.support import format_table, update
from streammerge.dtypes import Dtype
from streammerge.errors import UnsupportedError

PAGE = Path(__file__).parents[3] / "docs" / "codecs.md"
BNB = {"quant_method": "bitsandbytes"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128}
AQLM = {"quant_method": "aqlm", "num_codebooks": 2, "nbits_per_codebook": 8}


def compressed(form: str | None, *weights: dict[str, Any], **others: Any) -> dict[str, Any]:
    groups = {f"group_{number}": {"weights": each} for number, each in enumerate(weights)}
    section = {"quant_method": "compressed-tensors", "config_groups": groups, **others}
    return section if form is None else {**section, "format": form}


INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128}
FP8 = {"num_bits": 8, "type": "float", "strategy": "channel"}
NVFP4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}

SELECTED = [
    ({**BNB, "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "bitsandbytes NF4, FP4"),
    ({**BNB, "_load_in_4bit": True}, "bitsandbytes NF4, FP4"),
    ({**BNB, "load_in_8bit": True}, "bitsandbytes LLM.int8"),
    ({"quant_method": "fp8"}, "FP8, block and per tensor"),
    ({"quant_method": "mxfp4"}, "MXFP4, gpt-oss's experts"),
    (GPTQ, "GPTQ, 2, 3, 4 and 8 bits"),
    ({**GPTQ, "dynamic": {"-:.*gate.*": {}}}, "GPTQ, 2, 3, 4 and 8 bits"),
    (
        {"quant_method": "awq", "w_bit": 4, "q_group_size": 64, "version": "GEMM"},
        "AWQ gemm, 4 bits",
    ),
    (AQLM, "AQLM"),
    (compressed("pack-quantized", INT4), "compressed-tensors packed integers, 1 to 8 bits"),
    (compressed("pack-quantized", INT4, INT4), "compressed-tensors packed integers, 1 to 8 bits"),
    (compressed("float-quantized", FP8), "compressed-tensors FP8 and INT8"),
    (compressed("nvfp4-pack-quantized", NVFP4), "compressed-tensors NVFP4 and MXFP4"),
]


@pytest.mark.parametrize(("section", "title"), SELECTED)
def test_a_configuration_selects_one_codec(section: dict[str, Any], title: str) -> None:
    assert find_codec(section).title == title
    chosen = [codec for codec in all_codecs() if codec.of(section, Dtype.BF16) is not None]
    assert [codec.title for codec in chosen] == [title]


def test_the_format_of_a_group_goes_before_that_of_the_section() -> None:
    section = compressed("mixed-precision", INT4)
    section["config_groups"]["group_0"]["format"] = "pack-quantized"
    assert find_codec(section).title.startswith("compressed-tensors packed")


REFUSED = [
    ({"quant_method": "hqq"}, "is not decoded.*got quant_method: hqq"),
    ({}, "got quant_method: None"),
    (BNB, "got quant_method: bitsandbytes"),
    ({**BNB, "load_in_4bit": True, "bnb_4bit_quant_type": "int4"}, "bnb_4bit_quant_type"),
    ({"quant_method": "fp8", "weight_block_size": [128]}, "weight_block_size"),
    ({"quant_method": "fp8", "weight_block_size": [0, 128]}, "weight_block_size"),
    ({"quant_method": "fp8", "fmt": "e5m2"}, "fmt; expected e4m3; got e5m2"),
    ({"quant_method": "fp8", "scale_fmt": "ue4m3"}, "scale_fmt; expected float or ue8m0"),
    ({**GPTQ, "bits": 5}, "quantization_config.bits"),
    ({**GPTQ, "group_size": 0}, "group_size"),
    ({**GPTQ, "group_size": True}, "group_size"),
    ({**GPTQ, "checkpoint_format": "marlin"}, "checkpoint_format"),
    ({**GPTQ, "pack_dtype": "int8"}, "pack_dtype"),
    ({**GPTQ, "dynamic": {"+:.*up.*": {"bits": 8}}}, "dynamic"),
    ({**AWQ, "bits": 8}, "bits; expected 4; got 8"),
    ({**AWQ, "version": "gemv"}, "version; expected gemm; got gemv"),
    ({**AWQ, "zero_point": False}, "zero_point"),
    ({**AWQ, "group_size": "128"}, "group_size"),
    ({**AQLM, "num_codebooks": 0}, "num_codebooks"),
    ({**AQLM, "nbits_per_codebook": 24}, "nbits_per_codebook; expected at most 16"),
    (compressed("marlin-24", INT4), "format: marlin-24"),
    (compressed("pack-quantized"), "config_groups"),
    (compressed("pack-quantized", {**INT4, "num_bits": 9}), "num_bits; expected 1 to 8"),
    (compressed("pack-quantized", {**INT4, "type": "bool"}), "weights.type"),
    (compressed("pack-quantized", {**INT4, "strategy": "token"}), "weights.strategy"),
    (compressed("pack-quantized", {**INT4, "group_size": None}), "weights.group_size"),
    (compressed("pack-quantized", {**INT4, "group_size": "x"}), "weights.group_size"),
    (compressed("pack-quantized", INT4, {**INT4, "group_size": 64}), "got '2 kinds'"),
    (compressed("pack-quantized", {**FP8, "num_bits": 4}), "weights.type; expected int"),
    (
        compressed("float-quantized", {**FP8, "strategy": "block", "block_structure": [1]}),
        "block_structure",
    ),
    (compressed("float-quantized", {**FP8, "num_bits": 4}), "num_bits; expected 8"),
    (compressed("nvfp4-pack-quantized", {**NVFP4, "group_size": 64}), "expected 16 or 32"),
    (compressed("nvfp4-pack-quantized", {**NVFP4, "symmetric": False}), "symmetric floats"),
    (compressed("pack-quantized", INT4, sparsity_config={"format": "sparse-bitmask"}), "sparsity"),
]


@pytest.mark.parametrize(("section", "message"), REFUSED)
def test_a_variety_that_is_not_decoded_is_refused_by_name(
    section: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnsupportedError, match=message):
        find_codec(section)


@pytest.mark.parametrize("codec", [codec for codec in all_codecs() if not codec.encodes])
def test_what_is_only_read_refuses_to_encode(codec: Any) -> None:
    section = {"GPTQ": GPTQ, "AWQ": AWQ, "AQLM": AQLM, "MXFP4": {"quant_method": "mxfp4"}}
    found = find_codec(section[codec.title.split(",")[0].split()[0]])
    assert type(found) is codec
    with pytest.raises(UnsupportedError, match="it is only read"):
        found.encoder("layer.weight", (64, 64), Dtype.BF16)


ENCODED = [
    {**BNB, "load_in_4bit": True},
    {**BNB, "load_in_8bit": True},
    {"quant_method": "fp8"},
    compressed("pack-quantized", INT4),
    compressed("float-quantized", FP8),
    compressed("nvfp4-pack-quantized", NVFP4),
]


@pytest.mark.parametrize("section", ENCODED)
def test_what_cannot_be_encoded_is_refused(section: dict[str, Any]) -> None:
    codec = find_codec(section)
    for shape, dtype in (((4, 64, 128), Dtype.BF16), ((64, 128), Dtype.I8)):
        with pytest.raises(UnsupportedError, match=r"in layer\.weight"):
            codec.encoder("layer.weight", shape, dtype)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (compressed("pack-quantized", INT4), r"groups of 128; got BF16 \(64, 100\)"),
        (
            compressed("float-quantized", {**FP8, "symmetric": False}),
            "tensor or channel, symmetric",
        ),
        (compressed("pack-quantized", {"num_bits": 4}), "channel or group"),
    ],
)
def test_a_variety_that_is_only_read_refuses_to_encode(
    section: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnsupportedError, match=message):
        find_codec(section).encoder("layer.weight", (64, 100), Dtype.BF16)


def test_finding_a_codec_and_its_layouts_needs_no_torch() -> None:
    program = (
        "import sys\n"
        "from streammerge.checkpoint.header import TensorSpec\n"
        "from streammerge.codecs.registry import find_codec\n"
        "from streammerge.dtypes import Dtype\n"
        "codec = find_codec({'quant_method': 'fp8', 'weight_block_size': [128, 128]})\n"
        "codes = TensorSpec('a.weight', Dtype.F8_E4M3, (256, 256))\n"
        "scales = TensorSpec('a.weight_scale_inv', Dtype.F32, (2, 2))\n"
        "weight, = codec.find([codes, scales], lambda tensor: b'').weights\n"
        "weight.extents(0, 128)\n"
        "codec.encoder('a.weight', (256, 256), Dtype.BF16)\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


class TestPage:
    def test_it_is_up_to_date(self) -> None:
        text = PAGE.read_text(encoding="utf-8")
        assert format_table() in text
        assert update(text) == text, "run: make docs"

    def test_every_format_is_a_row(self) -> None:
        rows = format_table().splitlines()[2:]
        assert [row.split("|")[1].strip() for row in rows] == [c.title for c in all_codecs()]
        assert all(row.count("|") == 7 for row in rows)

    def test_it_is_written_in_place(self, tmp_path: Path) -> None:
        page = tmp_path / "page.md"
        page.write_text("before\n<!-- formats: generated -->\nold\n<!-- end -->\nafter\n")
        program = [sys.executable, "-m", "streammerge.codecs.support", str(page)]
        subprocess.run(program, check=True)
        middle = f"<!-- formats: generated -->\n{format_table()}<!-- end -->"
        assert page.read_text() == f"before\n{middle}\nafter\n"
