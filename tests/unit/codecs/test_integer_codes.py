"""GPTQ, AWQ and AQLM: values are those of their libraries, and of the definition of the format."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from streammerge.codecs.registry import find_codec
from streammerge.errors import CheckpointError

if TYPE_CHECKING:
    from numpy.typing import NDArray

M = "model.layers.0.mlp.up_proj"
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}

# GPTQModel 7.6.0 on a CPU: `convert_gptq_v1_to_v2_format_module`, `TorchLinear.dequantize_weight`;
# digests of (64, 96) float16 out of the words that `gptq_tensors` makes
GPTQ_GOLDEN = {
    (2, "gptq"): "b28423b67690939f",
    (2, "gptq_v2"): "5d41ef720e70ba85",
    (3, "gptq"): "9d985117b7ab38bb",
    (3, "gptq_v2"): "db25174cfdfe00ca",
    (4, "gptq"): "8c181670edd7ea5d",
    (4, "gptq_v2"): "f9c58d1dc7ac3105",
    (8, "gptq"): "e2cc3e5952309299",
    (8, "gptq_v2"): "bb9b46e11d177b1b",
}
# GPTQModel 7.6.0, `dequantize_gemm`: (40, 64) float16
AWQ_GOLDEN = "023eb68c92b07e25"
# aqlm 1.1.7, `_dequantize_weight`: (24, 64); bits, codebooks, out_group_size, in_group_size
AQLM_GOLDEN = {
    (8, 2, 1, 8, torch.float16): "0c2107ab7ce80b62",
    (8, 2, 1, 8, torch.bfloat16): "fe7f44f2adbcd3a9",
    (16, 1, 1, 8, torch.float16): "76454e95ca0f7dd0",
    (8, 1, 2, 4, torch.float16): "bcb49a59347c3624",
    (8, 4, 1, 8, torch.float16): "5001f2dda2cfd585",
    (8, 4, 1, 8, torch.bfloat16): "b7d8f3583f9a1c07",
    (8, 4, 1, 8, torch.float32): "b598eec116422398",
    (12, 3, 2, 8, torch.float16): "c6faf7cd05335ce2",
}


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def scales_of(groups: int, rows: int, random: torch.Generator) -> torch.Tensor:
    scales = (torch.randn(groups, rows, generator=random) * 0.1).half()
    # a subnormal number, the largest, none
    scales[0, :3] = torch.tensor([6e-8, 65504.0, 0.0])
    return scales


def gptq_tensors(bits: int, checkpoint_format: str) -> dict[str, torch.Tensor]:
    """Return random words, so that all codes and zeros are there, and groups in any order."""
    version = 2 if checkpoint_format == "gptq_v2" else 1
    random = torch.Generator().manual_seed(10 * bits + version)

    def words(*shape: int) -> torch.Tensor:
        wide = torch.randint(-(2**31), 2**31, shape, generator=random, dtype=torch.int64)
        return wide.to(torch.int32)

    return {
        f"{M}.qweight": words(3 * bits, 64),
        f"{M}.qzeros": words(3, 2 * bits),
        f"{M}.scales": scales_of(3, 64, random),
        f"{M}.g_idx": torch.randint(0, 3, (96,), generator=random, dtype=torch.int32),
    }


def awq_tensors() -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(5)

    def words(*shape: int) -> torch.Tensor:
        wide = torch.randint(-(2**31), 2**31, shape, generator=random, dtype=torch.int64)
        return wide.to(torch.int32)

    return {
        f"{M}.qweight": words(64, 5),
        f"{M}.qzeros": words(2, 5),
        f"{M}.scales": scales_of(2, 40, random),
    }


def aqlm_tensors(
    bits: int, number: int, high: int, wide: int, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(bits + number)
    half = 1 << (bits - 1)
    shape = (24 // high, 64 // wide, number)
    codes = torch.randint(-half, half, shape, generator=random)
    return {
        f"{M}.codes": codes.to(torch.int8 if bits <= 8 else torch.int16),
        f"{M}.codebooks": torch.randn(number, 1 << bits, high, wide, generator=random).to(dtype),
        f"{M}.scales": torch.randn(24 // high, 1, 1, 1, generator=random).to(dtype),
    }


def gptq(bits: int, checkpoint_format: str = "gptq", group_size: int = 32) -> Any:
    return find_codec(
        {
            "quant_method": "gptq",
            "bits": bits,
            "group_size": group_size,
            "checkpoint_format": checkpoint_format,
        }
    )


def bit_stream(words: NDArray[Any], bits: int, count: int) -> NDArray[Any]:
    """Read codes from each row of words as one long number, lowest bits first."""
    rows = [int.from_bytes(row.tobytes(), "little") for row in np.ascontiguousarray(words)]
    mask = (1 << bits) - 1
    return np.array([[row >> bits * place & mask for place in range(count)] for row in rows])


@pytest.mark.parametrize(("bits", "checkpoint_format"), GPTQ_GOLDEN)
def test_gptq_values_are_those_of_gptqmodel(bench: Any, bits: int, checkpoint_format: str) -> None:
    tensors = gptq_tensors(bits, checkpoint_format)
    weight = bench.find(gptq(bits, checkpoint_format), tensors)
    assert (weight.name, weight.shape) == (f"{M}.weight", (64, 96))
    values = bench.decode(weight, tensors, cuts=[32])
    assert values.dtype == torch.float16
    assert digest(bench.raw(values)) == GPTQ_GOLDEN[bits, checkpoint_format]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_values_are_those_of_the_definition(bench: Any, bits: int) -> None:
    tensors = gptq_tensors(bits, "gptq_v2")
    qweight, qzeros, scales, g_idx = (tensor.numpy() for tensor in tensors.values())
    codes = bit_stream(qweight.T, bits, 96)
    zeros = bit_stream(qzeros, bits, 64).T
    expected = (codes - zeros[:, g_idx]) * scales.T.astype(np.float64)[:, g_idx]
    weight = bench.find(gptq(bits, "gptq_v2"), tensors)
    values = bench.decode(weight, tensors, dtype=torch.float32)
    np.testing.assert_array_equal(values.numpy(), expected)


@pytest.mark.parametrize(("rows", "features"), [(8, 8), (3, 20), (1, 5), (9, 33)])
def test_gptq_of_shapes_that_fill_no_words(bench: Any, rows: int, features: int) -> None:
    words = -(-features // 8)
    tensors = {
        f"{M}.qweight": bench.words(words, rows, seed=1),
        f"{M}.qzeros": bench.words(1, -(-rows // 8), seed=2),
        f"{M}.scales": torch.ones(1, rows, dtype=torch.float16),
        f"{M}.g_idx": torch.zeros(features, dtype=torch.int32),
    }
    weight = bench.find(gptq(4, "gptq_v2", group_size=-1), tensors)
    assert weight.shape == (rows, features)
    codes = bit_stream(tensors[f"{M}.qweight"].numpy().T, 4, features)
    zeros = bit_stream(tensors[f"{M}.qzeros"].numpy(), 4, rows).T
    np.testing.assert_array_equal(bench.decode(weight, tensors).numpy(), codes - zeros)


def test_groups_follow_one_another_where_no_order_is_stored(bench: Any) -> None:
    tensors = gptq_tensors(4, "gptq")
    ordered = {**tensors, f"{M}.g_idx": (torch.arange(96) // 32).int()}
    expected = bench.decode(bench.find(gptq(4), ordered), ordered)
    del tensors[f"{M}.g_idx"]
    assert torch.equal(bench.decode(bench.find(gptq(4), tensors), tensors), expected)


@pytest.mark.parametrize("index", [-1, 3])
def test_an_input_in_no_group_is_an_error(bench: Any, index: int) -> None:
    tensors = gptq_tensors(4, "gptq")
    tensors[f"{M}.g_idx"][7] = index
    weight = bench.find(gptq(4), tensors)
    with pytest.raises(CheckpointError, match=r"in no group, in .*g_idx; expected 0 to 2"):
        bench.decode(weight, tensors)


def test_awq_values_are_those_of_gptqmodel(bench: Any) -> None:
    tensors = awq_tensors()
    weight = bench.find(find_codec(AWQ), tensors)
    assert weight.shape == (40, 64)
    assert digest(bench.raw(bench.decode(weight, tensors, cuts=[16, 24]))) == AWQ_GOLDEN


def test_awq_values_are_those_of_the_definition(bench: Any) -> None:
    tensors = awq_tensors()
    qweight, qzeros, scales = (tensor.numpy() for tensor in tensors.values())
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    outputs = np.concatenate([8 * word + np.array(order) for word in range(5)])
    codes, zeros = np.zeros((64, 40)), np.zeros((2, 40))
    codes[:, outputs] = bit_stream(qweight, 4, 40)
    zeros[:, outputs] = bit_stream(qzeros, 4, 40)
    wide = (codes - zeros.repeat(32, axis=0)) * scales.astype(np.float64).repeat(32, axis=0)
    weight = bench.find(find_codec(AWQ), tensors)
    values = bench.decode(weight, tensors, dtype=torch.float32)
    np.testing.assert_array_equal(values.numpy(), wide.T)


@pytest.mark.parametrize(("bits", "number", "high", "wide", "dtype"), AQLM_GOLDEN)
def test_aqlm_values_are_those_of_aqlm(
    bench: Any, bits: int, number: int, high: int, wide: int, dtype: torch.dtype
) -> None:
    tensors = aqlm_tensors(bits, number, high, wide, dtype)
    codec = find_codec(
        {
            "quant_method": "aqlm",
            "nbits_per_codebook": bits,
            "num_codebooks": number,
            "out_group_size": high,
            "in_group_size": wide,
        }
    )
    weight = bench.find(codec, tensors)
    assert weight.shape == (24, 64)
    values = bench.decode(weight, tensors, cuts=[8, 20])
    assert digest(bench.raw(values)) == AQLM_GOLDEN[bits, number, high, wide, dtype]


def test_aqlm_values_are_those_of_the_definition(bench: Any) -> None:
    tensors = aqlm_tensors(8, 2, 2, 8, torch.float16)
    # sums and products that float16 can hold
    tensors[f"{M}.codebooks"] = (8 * tensors[f"{M}.codebooks"]).round() / 8
    tensors[f"{M}.scales"] = tensors[f"{M}.scales"].sign() / 4
    section = {"quant_method": "aqlm", "nbits_per_codebook": 8, "num_codebooks": 2}
    weight = bench.find(find_codec({**section, "out_group_size": 2}), tensors)
    codes, books, scales = (tensor.numpy() for tensor in tensors.values())
    expected = np.zeros((24, 64))
    for line, group in np.ndindex(12, 8):
        first, second = codes[line, group].astype(np.uint8)
        piece = (books[0, first] + books[1, second]) * scales[line, 0, 0, 0]
        expected[2 * line : 2 * line + 2, 8 * group : 8 * group + 8] = piece
    np.testing.assert_array_equal(bench.decode(weight, tensors).numpy(), expected)
