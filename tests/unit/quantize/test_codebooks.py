"""The layout of AQLM: bytes as the codec reads them, shapes that are refused, what loaders see."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import AutoConfig
from transformers.quantizers.auto import AutoQuantizationConfig
from transformers.quantizers.quantizers_utils import should_convert_module

from streammerge.checkpoint.header import TensorSpec
from streammerge.codecs.aqlm import AqlmCodec
from streammerge.config.codebooks import Codebooks
from streammerge.dtypes import Dtype
from streammerge.errors import QuantizationError
from streammerge.quantize.codebooks import CodebookLayout, CodebookLinear, pack_codebooks
from streammerge.quantize.config_section import quantization_section
from streammerge.quantize.layout import layout_of
from streammerge.quantize.settings import QuantizeSettings

if TYPE_CHECKING:
    from pathlib import Path

ROWS, FEATURES = 300, 96
SCHEMES = [Codebooks(2, 8, 8), Codebooks(1, 10, 4), Codebooks(3, 4, 16), Codebooks(4, 1, 2)]
DTYPES = {torch.int8: Dtype.I8, torch.int16: Dtype.I16, torch.float16: Dtype.F16}


def settings_of(books: Codebooks) -> QuantizeSettings:
    return QuantizeSettings("aqlm", books.weight_bits, codebooks=books)


def random_linear(books: Codebooks) -> CodebookLinear:
    generator = torch.Generator().manual_seed(3)
    shape = ROWS, FEATURES // books.group_size, books.count
    codes = torch.randint(books.entries, shape, generator=generator, dtype=torch.int32)
    # the first and the last entry, and those beside the sign
    edges = [0, books.entries - 1, books.entries // 2 - 1, books.entries // 2]
    codes[0, :4, 0] = torch.tensor(edges, dtype=torch.int32)
    tables = torch.randn(books.count, books.entries, books.group_size, generator=generator)
    scales = torch.rand(ROWS, generator=generator) + 0.1
    return CodebookLinear(codes, tables.half().float(), scales.half().float())


def section_of(books: Codebooks, kept: list[str]) -> dict[str, Any]:
    quantized = [f"model.layers.{number}.mlp.up_proj" for number in range(12)]
    return quantization_section(settings_of(books), quantized=quantized, kept=kept)


@pytest.mark.parametrize("books", [*SCHEMES, Codebooks(1, 16, 8)])
def test_the_codec_reads_what_was_meant(books: Codebooks) -> None:
    linear = random_linear(books)
    packed = pack_codebooks(linear)
    specs = [TensorSpec(f"m.{end}", DTYPES[t.dtype], tuple(t.shape)) for end, t in packed.items()]
    codec = AqlmCodec.of(section_of(books, []), Dtype.F16)
    assert codec is not None
    (weight,) = codec.find(specs, lambda _: b"").weights
    data = {end: memoryview(tensor.numpy().tobytes()) for end, tensor in packed.items()}
    got = weight.values(0, ROWS, data)
    # a value is rounded after each entry is added and after the scale is applied
    most = sum(book.abs().amax() for book in linear.books) * linear.scales.amax()
    bound = (books.count + 1) * 2.0**-11 * float(most)
    assert float((got - linear.dequantize()).abs().max()) <= bound


@pytest.mark.parametrize("books", SCHEMES)
def test_what_is_stored_is_what_the_layout_says(books: Codebooks) -> None:
    packed = pack_codebooks(random_linear(books))
    layout = layout_of(settings_of(books))
    *specs, bias = layout.tensors("m", rows=ROWS, features=FEATURES, bias=Dtype.BF16)
    assert bias == TensorSpec("m.bias", Dtype.BF16, (ROWS,))
    assert specs == [
        TensorSpec(f"m.{end}", DTYPES[t.dtype], tuple(t.shape)) for end, t in packed.items()
    ]
    assert all(spec.name.endswith(layout.ends) for spec in specs)
    assert layout.weights({spec.name: spec.shape for spec in specs}) == ROWS * FEATURES


def test_values_that_float16_rounds_are_refused() -> None:
    linear = random_linear(SCHEMES[0])
    with pytest.raises(QuantizationError, match="rounded on storing"):
        pack_codebooks(replace(linear, scales=linear.scales * 1.0001))
    with pytest.raises(QuantizationError, match="rounded on storing"):
        pack_codebooks(replace(linear, books=linear.books * 1.0001))


@pytest.mark.parametrize(
    ("books", "rows", "features", "match"),
    [
        (Codebooks(2, 8, 8), 64, 100, "groups of 8; got 64 x 100.*in_group_size"),
        (Codebooks(1, 16, 8), 192, 576, "65536 groups of 8.*got 13824.*such as 2x8"),
        (Codebooks(2, 8, 8), 2, 96, "more entries than the weight has groups"),
    ],
)
def test_shapes_that_are_refused(books: Codebooks, rows: int, features: int, match: str) -> None:
    with pytest.raises(QuantizationError, match=match) as caught:
        CodebookLayout(books).check(rows, features, where="layers.0.k_proj")
    assert "layers.0.k_proj" in str(caught.value)


def test_a_scheme_is_read() -> None:
    books = Codebooks.of("2x8", 8)
    assert books == Codebooks(2, 8, 8)
    assert (books.entries, books.weight_bits, books.table_bytes) == (256, 2, 2 * 256 * 8 * 2)
    assert Codebooks.of("1x12", 8).weight_bits == 1.5
    assert Codebooks.of("1x16", 8).entries == 65536


@pytest.mark.parametrize(
    "scheme", ["", "2", "x8", "2x", "0x8", "2x0", "2x17", "9x8", "2X8", "2x8 "]
)
def test_what_is_no_scheme(scheme: str) -> None:
    with pytest.raises(ValueError, match="codebooks x bits"):
        Codebooks.of(scheme, 8)


def test_transformers_knows_the_section(tmp_path: Path) -> None:
    kept = ["lm_head", "model.layers.1.mlp.gate"]
    config = {"model_type": "llama", "quantization_config": section_of(SCHEMES[0], kept)}
    (tmp_path / "config.json").write_text(json.dumps(config))
    read = AutoConfig.from_pretrained(tmp_path)
    parsed = AutoQuantizationConfig.from_dict(read.quantization_config)
    assert parsed.quant_method == "aqlm"
    assert (parsed.num_codebooks, parsed.nbits_per_codebook) == (2, 8)
    assert (parsed.in_group_size, parsed.out_group_size) == (8, 1)
    left_out = parsed.linear_weights_not_to_quantize
    assert {"lm_head", "lm_head.weight"} <= set(left_out)
    assert not any(should_convert_module(name, left_out) for name in kept)
    for number in range(12):
        assert should_convert_module(f"model.layers.{number}.mlp.up_proj", left_out)
        # not a part of the router's name
        assert should_convert_module(f"model.layers.{number}.mlp.gate_proj", left_out)
