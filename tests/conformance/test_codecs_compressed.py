"""Formats of compressed-tensors: values and bytes are those of the library."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

from streammerge.checkpoint.header import TensorSpec
from streammerge.codecs.registry import find_codec
from streammerge.dtypes import Dtype

if TYPE_CHECKING:
    from collections.abc import Mapping

    from streammerge.codecs.base import Codec, CodedWeight

NAME = "model.layers.0.mlp.up_proj.weight"
DTYPES = {
    torch.float32: Dtype.F32,
    torch.float16: Dtype.F16,
    torch.bfloat16: Dtype.BF16,
    torch.int8: Dtype.I8,
    torch.uint8: Dtype.U8,
    torch.int32: Dtype.I32,
    torch.int64: Dtype.I64,
    torch.float8_e4m3fn: Dtype.F8_E4M3,
}
FLOATS = [torch.bfloat16, torch.float16, torch.float32]

FP8: dict[str, Any] = {"num_bits": 8, "type": "float"}
INT: dict[str, Any] = {"type": "int", "strategy": "group", "group_size": 32}
NVFP4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
MXFP4 = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}
SCALE_DTYPES = {"nvfp4-pack-quantized": torch.float8_e4m3fn, "mxfp4-pack-quantized": torch.uint8}

ENCODED = {
    "fp8 channel": ("float-quantized", {**FP8, "strategy": "channel"}),
    "fp8 tensor": ("float-quantized", {**FP8, "strategy": "tensor"}),
    "int8 channel": ("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}),
    "int4 group": ("pack-quantized", {**INT, "num_bits": 4}),
    "int4 group asymmetric": ("pack-quantized", {**INT, "num_bits": 4, "symmetric": False}),
    "int8 group asymmetric": ("pack-quantized", {**INT, "num_bits": 8, "symmetric": False}),
    "int3 group asymmetric": ("pack-quantized", {**INT, "num_bits": 3, "symmetric": False}),
    "int4 channel": ("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "channel"}),
    "int8 channel packed": (
        "pack-quantized",
        {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": False},
    ),
    "nvfp4": ("nvfp4-pack-quantized", NVFP4),
    "mxfp4": ("mxfp4-pack-quantized", MXFP4),
}
SHAPES = {"small": (40, 96), "odd rows": (37, 64), "one row": (1, 32)}


def section(form: str, args: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": dict(args)}},
        "ignore": ["lm_head"],
    }


def scheme(form: str, args: Mapping[str, Any]) -> QuantizationScheme:
    extra = {"scale_dtype": SCALE_DTYPES[form]} if form in SCALE_DTYPES else {}
    return QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**args, **extra))


def hostile(shape: tuple[int, int], dtype: torch.dtype, *, seed: int = 0) -> torch.Tensor:
    """Return random values with rows of zeros, subnormal, huge, and all of one sign."""
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=random, dtype=torch.float32).to(dtype)
    if shape[0] > 8:
        weight[1] = 0
        weight[2] *= torch.finfo(dtype).tiny / 4
        weight[3] = weight[3].abs()
        weight[4, : shape[1] // 2] = -0.0
        weight[5] *= 100
    return weight


def reference_bytes(
    weight: torch.Tensor, form: str, args: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    """Encode as a model-free run of llm-compressor does: extremes, scales, compress."""
    kind = scheme(form, args)
    weights = kind.weights
    assert weights is not None
    size = weights.group_size or weight.shape[1]
    groups = weight.unflatten(1, (-1, size))
    low, high = groups.amin(dim=-1), groups.amax(dim=-1)
    state = {"weight": weight}
    if form == "nvfp4-pack-quantized":
        state["weight_global_scale"] = generate_gparam(weight.min(), weight.max())
    if weights.strategy == "tensor":
        low, high = weight.min(), weight.max()
    scales, zeros = calculate_qparams(low, high, weights, state.get("weight_global_scale"))
    state["weight_scale"] = scales
    if not weights.symmetric:
        state["weight_zero_point"] = zeros
    return BaseCompressor.get_value_from_registry(form).compress(state, kind)


def raw(tensor: torch.Tensor) -> bytes:
    flat = tensor.flatten().clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8).numpy().tobytes()


def encode(codec: Codec, weight: torch.Tensor, *, rows: int) -> dict[str, bytes]:
    encoder = codec.encoder(NAME, tuple(weight.shape), DTYPES[weight.dtype])
    encoder.begin()
    stored = {part.role: bytearray(part.tensor.nbytes) for part in encoder.weight.parts}
    step = -(-rows // encoder.row_step) * encoder.row_step
    cuts = [(at, min(at + step, len(weight))) for at in range(0, len(weight), step)]
    if encoder.needs_scan:
        for begin, end in reversed(cuts):
            encoder.scan(begin, end, weight[begin:end])
    for begin, end in cuts:
        extents = {extent.role: extent for extent in encoder.weight.extents(begin, end)}
        for role, tensor in encoder.encode(begin, end, weight[begin:end]).items():
            assert len(raw(tensor)) == extents[role].total_bytes
            extents[role].put(memoryview(raw(tensor)), memoryview(stored[role]))
    for role, tensor in encoder.finish().items():
        stored[role][:] = raw(tensor)
    return {role: bytes(data) for role, data in stored.items()}


def find(codec: Codec, state: Mapping[str, torch.Tensor]) -> CodedWeight:
    module = NAME.removesuffix(".weight")
    names = {f"{module}.{role}": tensor for role, tensor in state.items()}
    specs = [TensorSpec(name, DTYPES[t.dtype], tuple(t.shape)) for name, t in names.items()]
    bias = TensorSpec(f"{module}.bias", Dtype.BF16, (4,))
    found = codec.find([*specs, bias], lambda tensor: raw(names[tensor.name]))
    assert found.plain == (bias,)
    (weight,) = found.weights
    assert weight.name == NAME
    return weight


def decode(
    weight: CodedWeight, state: Mapping[str, torch.Tensor], *, rows: int = 8
) -> torch.Tensor:
    step = -(-rows // weight.row_step) * weight.row_step
    stored = {role: memoryview(raw(tensor)) for role, tensor in state.items()}
    tiles = []
    for begin in range(0, weight.rows, step):
        end = min(begin + step, weight.rows)
        data = {x.role: x.take(stored[x.role]) for x in weight.extents(begin, end)}
        tiles.append(weight.decode(begin, end, data))
    return torch.cat(tiles)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("form", ENCODED)
def test_bytes_are_those_of_the_library(
    form: str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    name, args = ENCODED[form]
    weight = hostile(shape, dtype)
    expected = {role: raw(t) for role, t in reference_bytes(weight, name, args).items()}
    codec = find_codec(section(name, args))
    for rows in (1, 16, 1000):
        assert encode(codec, weight, rows=rows) == expected


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("form", ENCODED)
def test_values_are_those_of_the_library(form: str, dtype: torch.dtype) -> None:
    name, args = ENCODED[form]
    state = reference_bytes(hostile((40, 96), dtype), name, args)
    kind = scheme(name, args)
    expected = BaseCompressor.get_value_from_registry(name).decompress(dict(state), kind)["weight"]
    codec = find_codec(section(name, args))
    for rows in (1, 8, 1000):
        values = decode(find(codec, state), state, rows=rows)
        assert values.dtype == expected.dtype
        assert raw(values) == raw(expected)


@pytest.mark.parametrize("shape", [(256, 256), (200, 130), (5, 7)])
def test_values_of_blocks_cut_at_the_edges_are_those_of_the_library(
    shape: tuple[int, int],
) -> None:
    args = {**FP8, "strategy": "block", "block_structure": [128, 128]}
    random = torch.Generator().manual_seed(0)
    grid = (-(-shape[0] // 128), -(-shape[1] // 128))
    state = {
        "weight": torch.randn(shape, generator=random).to(torch.float8_e4m3fn),
        "weight_scale": torch.rand(grid, generator=random).to(torch.bfloat16),
    }
    kind = scheme("float-quantized", args)
    library = BaseCompressor.get_value_from_registry("float-quantized")
    expected = library.decompress(dict(state), kind)["weight"]
    codec = find_codec(section("float-quantized", args))
    assert raw(decode(find(codec, state), state, rows=50)) == raw(expected)


@pytest.mark.parametrize(("form", "args"), [ENCODED["nvfp4"], ENCODED["mxfp4"]])
def test_every_code_with_every_scale(form: str, args: dict[str, Any]) -> None:
    packed = torch.arange(256, dtype=torch.uint8).repeat(256, 1)[:, : args["group_size"] * 4]
    scales = torch.arange(256, dtype=torch.uint8)[:, None].expand(256, 8).contiguous()
    if form == "nvfp4-pack-quantized":
        scales = scales.view(torch.float8_e4m3fn)
    state = {"weight_packed": packed, "weight_scale": scales}
    if form == "nvfp4-pack-quantized":
        state["weight_global_scale"] = torch.tensor([3.7])
    library = BaseCompressor.get_value_from_registry(form)
    expected = library.decompress(dict(state), scheme(form, args))["weight"]
    values = decode(find(find_codec(section(form, args)), state), state)
    assert torch.equal(values.isnan(), expected.isnan())
    assert raw(values[~values.isnan()]) == raw(expected[~expected.isnan()])


@pytest.mark.parametrize("kind", ["int", "float"])
def test_every_code_of_a_byte(kind: str) -> None:
    codes = torch.arange(256, dtype=torch.uint8)[None]
    codes = codes.view(torch.float8_e4m3fn if kind == "float" else torch.int8)
    args = {"num_bits": 8, "type": kind, "strategy": "tensor"}
    state = {"weight": codes, "weight_scale": torch.tensor([0.7], dtype=torch.bfloat16)}
    library = BaseCompressor.get_value_from_registry("naive-quantized")
    expected = library.decompress(dict(state), scheme("naive-quantized", args))["weight"]
    values = decode(find(find_codec(section("naive-quantized", args)), state), state)
    assert torch.equal(values.isnan(), expected.isnan())
    assert raw(values.nan_to_num(0)) == raw(expected.nan_to_num(0))
