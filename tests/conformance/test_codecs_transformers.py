"""FP8 and MXFP4 as transformers stores them: values and bytes are those of its own conversion."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import FineGrainedFP8Config
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

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
    torch.uint8: Dtype.U8,
    torch.float8_e4m3fn: Dtype.F8_E4M3,
    torch.float8_e8m0fnu: Dtype.F8_E8M0,
}
FLOATS = [torch.bfloat16, torch.float16, torch.float32]


def fp8(
    block: list[int] | None, dtype: torch.dtype = torch.bfloat16, scales: str = "float"
) -> Codec:
    section = {"quant_method": "fp8", "weight_block_size": block, "scale_fmt": scales}
    return find_codec(section, DTYPES[dtype])


def hostile(shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[: shape[0] // 4] = 0
    weight[shape[0] // 2 :] *= 100
    weight[shape[0] - 1] *= torch.finfo(dtype).tiny
    return weight


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


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
            extents[role].put(memoryview(raw(tensor)), memoryview(stored[role]))
    for role, tensor in encoder.finish().items():
        stored[role][:] = raw(tensor)
    return {role: bytes(data) for role, data in stored.items()}


def find(codec: Codec, state: Mapping[str, torch.Tensor]) -> CodedWeight:
    specs = [TensorSpec(name, DTYPES[t.dtype], tuple(t.shape)) for name, t in state.items()]
    bias = TensorSpec("model.layers.0.mlp.bias", Dtype.BF16, (4,))
    found = codec.find([*specs, bias], lambda tensor: raw(state[tensor.name]))
    assert found.plain == (bias,)
    (weight,) = found.weights
    return weight


def decode(
    weight: CodedWeight, state: Mapping[str, torch.Tensor], *, rows: int = 50
) -> torch.Tensor:
    stored = {part.role: memoryview(raw(state[part.tensor.name])) for part in weight.parts}
    step = -(-rows // weight.row_step) * weight.row_step
    tiles = []
    for first in range(0, weight.rows, weight.matrix_rows):
        for begin in range(first, first + weight.matrix_rows, step):
            end = min(begin + step, first + weight.matrix_rows)
            data = {x.role: x.take(stored[x.role]) for x in weight.extents(begin, end)}
            tiles.append(weight.decode(begin, end, data))
    return torch.cat(tiles).view(weight.shape)


def transformers_fp8(
    weight: torch.Tensor, block: list[int] | None, scales: str = "float"
) -> dict[str, torch.Tensor]:
    config = FineGrainedFP8Config(weight_block_size=block, scale_fmt=scales)
    quantizer: Any = SimpleNamespace(quantization_config=config)
    return Fp8Quantize(quantizer).convert({NAME: weight})


def transformers_values(
    state: Mapping[str, torch.Tensor], dtype: torch.dtype, name: str = NAME
) -> torch.Tensor:
    operation = Fp8Dequantize(SimpleNamespace())
    return operation._dequantize_one(state[name], state[f"{name}_scale_inv"], dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("scales", ["float", "ue8m0"])
@pytest.mark.parametrize("block", [[128, 128], [16, 32], None])
def test_fp8_bytes_are_those_of_transformers(
    block: list[int] | None, scales: str, dtype: torch.dtype
) -> None:
    weight = hostile((256, 384), dtype)
    made = transformers_fp8(weight, block, scales)
    expected = {name: raw(tensor) for name, tensor in made.items()}
    codec = fp8(block, scales=scales)
    parts = codec.encoder(NAME, (256, 384), DTYPES[dtype]).weight.parts
    for rows in (16, 130, 1000):
        found = encode(codec, weight, rows=rows)
        assert {part.tensor.name: found[part.role] for part in parts} == expected


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("block", [[128, 128], [16, 32], None])
def test_fp8_values_are_those_of_transformers(block: list[int] | None, dtype: torch.dtype) -> None:
    state = transformers_fp8(hostile((256, 384), dtype), block)
    expected = transformers_values(state, dtype)
    for rows in (1, 50, 1000):
        values = decode(find(fp8(block, dtype), state), state, rows=rows)
        assert values.dtype == dtype
        assert raw(values) == raw(expected)


def test_every_code_of_fp8_with_scales_of_all_dtypes() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(2, 128).view(torch.float8_e4m3fn)
    for scale in (
        torch.tensor([[1.7], [1e-30]]),
        torch.tensor([[1.7], [-3.0]], dtype=torch.bfloat16),
        torch.tensor([[0], [255]], dtype=torch.uint8),
        torch.tensor([[130], [1]], dtype=torch.uint8).view(torch.float8_e8m0fnu),
    ):
        state = {NAME: codes, f"{NAME}_scale_inv": scale}
        expected = transformers_values(state, torch.bfloat16)
        values = decode(find(fp8([1, 128]), state), state)
        assert torch.equal(values.isnan(), expected.isnan())
        assert raw(values.nan_to_num(0)) == raw(expected.nan_to_num(0))


def test_experts_in_one_tensor() -> None:
    name = "model.layers.0.mlp.experts.gate_up_proj"
    random = torch.Generator().manual_seed(0)
    state = {
        name: torch.randn(3, 64, 96, generator=random).to(torch.float8_e4m3fn),
        f"{name}_scale_inv": torch.rand(3, 2, 3, generator=random),
    }
    values = decode(find(fp8([32, 32]), state), state, rows=20)
    assert raw(values) == raw(transformers_values(state, torch.bfloat16, name))


def test_a_block_is_what_the_configuration_says_and_not_what_shapes_suggest() -> None:
    random = torch.Generator().manual_seed(0)
    codes = torch.randn(192, 192, generator=random).to(torch.float8_e4m3fn)
    scale = torch.tensor([[1.0, 2.0], [4.0, 8.0]])
    state = {NAME: codes, f"{NAME}_scale_inv": scale}
    values = decode(find(fp8([128, 128]), state), state)
    by_hand = codes.float()
    by_hand[:128, 128:] *= 2
    by_hand[128:, :128] *= 4
    by_hand[128:, 128:] *= 8
    assert raw(values) == raw(by_hand.bfloat16())
    # transformers takes 192 / 2 for the size of a block
    wrong = transformers_values(state, torch.bfloat16)
    assert torch.equal(wrong[:96, :96], values[:96, :96])
    assert torch.equal(wrong[96:128, :96], 4 * values[96:128, :96])


@pytest.mark.parametrize("shape", [(130, 200), (5, 7), (128, 129)])
def test_blocks_cut_at_the_edges_are_encoded_by_themselves(shape: tuple[int, int]) -> None:
    weight = hostile(shape, torch.bfloat16)
    found = encode(fp8([128, 128]), weight, rows=128)
    codes = torch.frombuffer(bytearray(found["weight"]), dtype=torch.uint8)
    codes = codes.view(torch.float8_e4m3fn).view(shape)
    scales = torch.frombuffer(bytearray(found["weight_scale_inv"]), dtype=torch.float32)
    scales = scales.view(-(-shape[0] // 128), -(-shape[1] // 128))
    for row in range(0, shape[0], 128):
        for column in range(0, shape[1], 128):
            piece = weight[row : row + 128, column : column + 128]
            # one block that has the size of the whole weight
            expected = transformers_fp8(piece, None)
            assert raw(codes[row : row + 128, column : column + 128]) == raw(expected[NAME])
            scale = expected[f"{NAME}_scale_inv"].item()
            assert scales[row // 128, column // 128].item() == scale


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_mxfp4_experts_are_those_of_transformers(dtype: torch.dtype) -> None:
    name = "model.layers.0.mlp.experts.gate_up_proj"
    random = torch.Generator().manual_seed(0)

    def some_bytes(*shape: int) -> torch.Tensor:
        return torch.randint(0, 256, shape, generator=random, dtype=torch.uint8)

    state = {f"{name}_blocks": some_bytes(3, 40, 5, 16), f"{name}_scales": some_bytes(3, 40, 5)}
    weight = find(find_codec({"quant_method": "mxfp4"}, DTYPES[dtype]), state)
    assert (weight.name, weight.shape) == (name, (3, 160, 40))
    expected = convert_moe_packed_tensors(*state.values(), dtype=dtype)
    for rows in (1, 64, 1000):
        values = decode(weight, state, rows=rows)
        assert torch.equal(values.isnan(), expected.isnan())
        assert raw(values.nan_to_num(0)) == raw(expected.nan_to_num(0))
