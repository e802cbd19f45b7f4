"""NF4, FP4 and LLM.int8: values and bytes are those of bitsandbytes."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import bitsandbytes.functional as library
import pytest
import torch
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
from bitsandbytes.nn import Int8Params

from streammerge.checkpoint.header import TensorSpec
from streammerge.codecs.bnb4_codes import code_table, dynamic_map, quantize_absmax
from streammerge.codecs.bnb4_codes import quantize as quantize_in_blocks
from streammerge.codecs.registry import find_codec
from streammerge.codecs.tensors import torch_dtype
from streammerge.dtypes import Dtype

if TYPE_CHECKING:
    from collections.abc import Mapping

    from streammerge.codecs.base import Codec, CodedWeight

NAME = "model.layers.0.mlp.up_proj.weight"
DTYPES = {
    torch.float32: Dtype.F32,
    torch.float16: Dtype.F16,
    torch.bfloat16: Dtype.BF16,
    torch.uint8: Dtype.U8,
    torch.int8: Dtype.I8,
}
FLOATS = [torch.bfloat16, torch.float16, torch.float32]
# rows of whole blocks; rows that begin inside one; a last block that is not whole; odd ones
SHAPES = [(96, 192), (12, 32), (300, 64), (8, 96), (33, 70), (5, 3), (1, 1), (130, 576)]
INT8 = {"quant_method": "bitsandbytes", "load_in_8bit": True}


def section(quant_type: str, *, is_nested: bool) -> dict[str, Any]:
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": quant_type,
        "bnb_4bit_use_double_quant": is_nested,
    }


def hostile(shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """Return random values with rows of zeros, of subnormal and of huge numbers."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)
    if shape[0] > 8:
        weight[1] = 0
        weight[2] *= torch.finfo(dtype).tiny / 4
        weight[3] *= 1000
        weight[4, ::2] = -0.0
        # ties between two codes, and what is next to them
        weight[5] = torch.linspace(-1, 1, shape[1]).to(dtype)
    return weight


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def encode(codec: Codec, weight: torch.Tensor, *, rows: int) -> dict[str, bytes]:
    encoder = codec.encoder(NAME, tuple(weight.shape), DTYPES[weight.dtype])
    encoder.begin()
    stored = {part.role: bytearray(part.tensor.nbytes) for part in encoder.weight.parts}
    step = -(-rows // encoder.row_step) * encoder.row_step
    for begin in range(0, len(weight), step):
        end = min(begin + step, len(weight))
        extents = {extent.role: extent for extent in encoder.weight.extents(begin, end)}
        for role, tensor in encoder.encode(begin, end, weight[begin:end]).items():
            assert len(raw(tensor)) == extents[role].total_bytes
            extents[role].put(memoryview(raw(tensor)), memoryview(stored[role]))
    for role, tensor in encoder.finish().items():
        stored[role][:] = raw(tensor)
    return {role: bytes(data) for role, data in stored.items()}


def find(codec: Codec, state: Mapping[str, torch.Tensor]) -> CodedWeight:
    specs = [TensorSpec(name, DTYPES[t.dtype], tuple(t.shape)) for name, t in state.items()]
    bias = TensorSpec("model.layers.0.mlp.up_proj.bias", Dtype.BF16, (4,))
    found = codec.find([*specs, bias], lambda tensor: raw(state[tensor.name]))
    assert found.plain == (bias,)
    (weight,) = found.weights
    assert weight.name == NAME
    return weight


def decode(
    weight: CodedWeight, state: Mapping[str, torch.Tensor], *, rows: int = 8
) -> torch.Tensor:
    step = -(-rows // weight.row_step) * weight.row_step
    stored = {part.role: memoryview(raw(state[part.tensor.name])) for part in weight.parts}
    tiles = []
    for begin in range(0, weight.rows, step):
        end = min(begin + step, weight.rows)
        data = {x.role: x.take(stored[x.role]) for x in weight.extents(begin, end)}
        tiles.append(weight.decode(begin, end, data))
    return torch.cat(tiles)


def quantize(
    weight: torch.Tensor, quant_type: str, *, is_nested: bool
) -> tuple[dict[str, torch.Tensor], library.QuantState]:
    """Return what transformers would store for a layer, by full names."""
    codes, state = library.quantize_4bit(
        weight, quant_type=quant_type, compress_statistics=is_nested
    )
    stored = {f"{NAME}.{key}": value for key, value in state.as_dict(packed=True).items()}
    return {NAME: codes, **stored}, state


def test_the_table_of_8_bit_codes_is_that_of_the_library() -> None:
    assert raw(dynamic_map()) == raw(library.create_dynamic_map())


def test_the_last_block_is_divided_and_the_others_multiplied_by_an_inverse() -> None:
    bounds = (code_table("nf4")[1:] + code_table("nf4")[:-1]) / 2
    largest = torch.rand(400, generator=torch.Generator().manual_seed(0)) + 0.5
    for size in largest:
        # values at the bounds between codes, which a rounding takes to one side or the other
        ties = torch.cat([bounds * size, size[None]])
        for weight in (ties.repeat(4), ties.repeat(4)[1:]):
            codes, _ = quantize_in_blocks(weight, quant_type="nf4", block=64)
            expected, _ = library.quantize_4bit(weight, quant_type="nf4")
            assert raw(codes) == raw(expected)


def test_codes_of_absmax_are_those_of_the_library() -> None:
    sizes = torch.randn(100_007, generator=torch.Generator().manual_seed(0))
    sizes[:1024] = torch.linspace(-1, 1, 1024)
    sizes[1024:1280] = 0
    expected, state = library.quantize_blockwise(sizes, blocksize=256)
    codes, scales = quantize_absmax(sizes)
    assert raw(codes) == raw(expected)
    assert raw(scales) == raw(state.absmax)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("is_nested", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
class TestFourBits:
    def test_bytes_are_those_of_the_library(
        self, quant_type: str, is_nested: bool, shape: tuple[int, int], dtype: torch.dtype
    ) -> None:
        weight = hostile(shape, dtype)
        state, _ = quantize(weight, quant_type, is_nested=is_nested)
        codec = find_codec(section(quant_type, is_nested=is_nested))
        parts = codec.encoder(NAME, shape, DTYPES[dtype]).weight.parts
        assert [part.tensor.name for part in parts] == list(state)
        for rows in (3, 1000):
            found = encode(codec, weight, rows=rows)
            for part in parts[:-1]:
                assert found[part.role] == raw(state[part.tensor.name]), part.role
            # its length is planned before the offset in it is known
            described = raw(state[parts[-1].tensor.name])
            assert found["quant_state"].rstrip(b" ") == described
            assert json.loads(found["quant_state"]) == json.loads(described)

    def test_what_is_written_is_read_by_the_library(
        self, quant_type: str, is_nested: bool, shape: tuple[int, int], dtype: torch.dtype
    ) -> None:
        weight = hostile(shape, dtype)
        codec = find_codec(section(quant_type, is_nested=is_nested))
        parts = codec.encoder(NAME, shape, DTYPES[dtype]).weight.parts
        stored = encode(codec, weight, rows=16)
        tensors = {
            part.tensor.name: torch.frombuffer(bytearray(stored[part.role]), dtype=torch.uint8)
            .view(torch_dtype(part.tensor.dtype))
            .view(part.tensor.shape)
            for part in parts
        }
        codes = tensors.pop(NAME)
        state = library.QuantState.from_dict(tensors, device=torch.device("cpu"))
        expected = library.quantize_4bit(
            weight, quant_type=quant_type, compress_statistics=is_nested
        )
        assert raw(library.dequantize_4bit(codes, state)) == raw(library.dequantize_4bit(*expected))

    def test_values_are_those_of_the_library(
        self, quant_type: str, is_nested: bool, shape: tuple[int, int], dtype: torch.dtype
    ) -> None:
        tensors, state = quantize(hostile(shape, dtype), quant_type, is_nested=is_nested)
        absmax = state.absmax
        if is_nested:
            absmax = library.dequantize_blockwise(state.absmax, state.state2) + state.offset
        in_torch = _dequantize_4bit_compute(
            tensors[NAME].reshape(-1), absmax, state.code, 64, shape, dtype
        )
        codec = find_codec(section(quant_type, is_nested=is_nested))
        weight = find(codec, tensors)
        assert weight.shape == shape
        assert weight.dtype is DTYPES[dtype]
        for rows in (3, 1000):
            values = decode(weight, tensors, rows=rows)
            assert raw(values) == raw(in_torch)
        if shape[1] % 64 == 0:
            # the kernel takes subnormal numbers of bfloat16 for zero on CPUs with AVX512_BF16
            in_kernel = library.dequantize_4bit(tensors[NAME], state)
            is_normal = in_torch.abs() >= torch.finfo(dtype).tiny
            assert raw(values[is_normal]) == raw(in_kernel[is_normal])


def test_every_code_in_both_halves_of_a_byte() -> None:
    for quant_type in ("nf4", "fp4"):
        tensors, state = quantize(torch.ones(8, 64), quant_type, is_nested=False)
        tensors[NAME] = torch.arange(256, dtype=torch.uint8)[:, None]
        weight = find(find_codec(section(quant_type, is_nested=False)), tensors)
        expected = library.dequantize_4bit(tensors[NAME], state)
        assert raw(decode(weight, tensors)) == raw(expected)


def test_scales_that_are_not_finite_or_subnormal() -> None:
    tensors, state = quantize(torch.ones(8, 64), "nf4", is_nested=False)
    hostile_scales = [float("inf"), float("nan"), 1e-40, -2.0, 3e38, 0.0, -0.0, 1.0]
    state.absmax = tensors[f"{NAME}.absmax"] = torch.tensor(hostile_scales)
    weight = find(find_codec(section("nf4", is_nested=False)), tensors)
    expected = library.dequantize_4bit(tensors[NAME], state)
    values = decode(weight, tensors)
    assert torch.equal(values.isnan(), expected.isnan())
    assert raw(values.nan_to_num(0)) == raw(expected.nan_to_num(0))


def test_codes_may_be_stored_as_another_dtype() -> None:
    weight = hostile((96, 192), torch.bfloat16)
    tensors, _ = quantize(weight, "nf4", is_nested=True)
    codec = find_codec(section("nf4", is_nested=True))
    expected = decode(find(codec, tensors), tensors)
    # `bnb_4bit_quant_storage: bfloat16`, which FSDP wants
    other = {**tensors, NAME: tensors[NAME].flatten().view(torch.bfloat16)[:, None]}
    assert raw(decode(find(codec, other), other)) == raw(expected)


class TestEightBits:
    def state(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        module = NAME.removesuffix(".weight")
        made = Int8Params(weight, requires_grad=False)._quantize("cpu")
        return {
            NAME: made.data,
            f"{module}.SCB": made.SCB,
            f"{module}.weight_format": torch.zeros((), dtype=torch.uint8),
        }

    @pytest.mark.parametrize("dtype", FLOATS)
    @pytest.mark.parametrize("shape", [(40, 96), (33, 7), (1, 1)])
    def test_bytes_are_those_of_the_library(
        self, shape: tuple[int, int], dtype: torch.dtype
    ) -> None:
        weight = hostile(shape, dtype)
        state = self.state(weight)
        codec = find_codec(INT8)
        parts = codec.encoder(NAME, shape, DTYPES[dtype]).weight.parts
        assert [part.tensor.name for part in parts] == list(state)
        for rows in (1, 16, 1000):
            found = encode(codec, weight, rows=rows)
            assert found == {part.role: raw(state[part.tensor.name]) for part in parts}

    @pytest.mark.parametrize("shape", [(40, 96), (33, 7), (1, 1)])
    def test_values_are_those_of_the_library(self, shape: tuple[int, int]) -> None:
        state = self.state(hostile(shape, torch.float16))
        module = NAME.removesuffix(".weight")
        state[NAME].view(-1)[0] = -128
        expected = library.int8_vectorwise_dequant(state[NAME], state[f"{module}.SCB"])
        for rows in (1, 8, 1000):
            assert raw(decode(find(find_codec(INT8), state), state, rows=rows)) == raw(expected)
