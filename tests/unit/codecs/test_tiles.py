"""Any cut of a weight into tiles gives the values, and the bytes, of all of it at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from streammerge.codecs.registry import all_codecs, find_codec
from streammerge.dtypes import Dtype

M = "model.layers.0.mlp.up_proj"
FLOAT8: dict[str, Any] = {"num_bits": 8, "type": "float"}
INT: dict[str, Any] = {"type": "int", "strategy": "group", "group_size": 32}
NVFP4: dict[str, Any] = {"type": "float", "strategy": "tensor_group", "group_size": 16}
MXFP4: dict[str, Any] = {"type": "float", "strategy": "group", "group_size": 32}


def compressed(form: str, **weights: Any) -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": groups}


def bnb(quant_type: str, *, is_nested: bool) -> dict[str, Any]:
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": quant_type,
        "bnb_4bit_use_double_quant": is_nested,
    }


# with shapes whose rows begin inside blocks, and that are cut at the edges
ENCODED: dict[str, tuple[dict[str, Any], tuple[int, int]]] = {
    "nf4": (bnb("nf4", is_nested=False), (36, 96)),
    "nf4, rows of whole blocks": (bnb("nf4", is_nested=True), (36, 128)),
    "nf4, double quantization": (bnb("nf4", is_nested=True), (522, 40)),
    "fp4, odd": (bnb("fp4", is_nested=False), (131, 3)),
    "int8 of bitsandbytes": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, (19, 33)),
    "fp8 blocks": ({"quant_method": "fp8", "weight_block_size": [8, 16]}, (37, 40)),
    "fp8 tensor": ({"quant_method": "fp8"}, (19, 33)),
    "fp8 channel": (compressed("float-quantized", **FLOAT8, strategy="channel"), (19, 33)),
    "fp8 tensor of compressed-tensors": (compressed("float-quantized", **FLOAT8), (19, 33)),
    "int4": (compressed("pack-quantized", **INT, num_bits=4), (19, 64)),
    "int4 asymmetric": (
        compressed("pack-quantized", **INT, num_bits=4, symmetric=False),
        (37, 64),
    ),
    "int5 asymmetric": (
        compressed("pack-quantized", **INT, num_bits=5, symmetric=False),
        (70, 64),
    ),
    "nvfp4": (compressed("nvfp4-pack-quantized", **NVFP4, num_bits=4), (19, 48)),
    "mxfp4": (compressed("mxfp4-pack-quantized", **MXFP4, num_bits=4), (19, 64)),
}


@dataclass
class Case:
    section: dict[str, Any]
    tensors: dict[str, torch.Tensor]


def some_bytes(*shape: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(len(shape))
    return torch.randint(0, 256, shape, generator=random, dtype=torch.uint8)


def read_only() -> dict[str, Case]:
    """Return a weight of each format that is only read."""
    scales = torch.rand(3, 64, generator=torch.Generator().manual_seed(0)).half()
    gptq = {
        f"{M}.qweight": some_bytes(12, 64, 4).view(torch.int32).squeeze(-1),
        f"{M}.qzeros": some_bytes(3, 8, 4).view(torch.int32).squeeze(-1),
        f"{M}.scales": scales,
        f"{M}.g_idx": (some_bytes(96) % 3).int(),
    }
    awq = {
        f"{M}.qweight": some_bytes(96, 8, 4).view(torch.int32).squeeze(-1),
        f"{M}.qzeros": gptq[f"{M}.qzeros"],
        f"{M}.scales": scales,
    }
    aqlm = {
        f"{M}.codes": some_bytes(12, 6, 2).view(torch.int8),
        f"{M}.codebooks": torch.randn(2, 256, 2, 8).half(),
        f"{M}.scales": torch.randn(12, 1, 1, 1).half(),
    }
    experts = {f"{M}_blocks": some_bytes(3, 10, 4, 16), f"{M}_scales": some_bytes(3, 10, 4) % 200}
    fp8 = {
        f"{M}": torch.randn(3, 20, 24).to(torch.float8_e4m3fn),
        f"{M}_scale_inv": torch.rand(3, 3, 2),
    }
    block: dict[str, Any] = {"strategy": "block", "block_structure": [8, 16]}
    blocks = {
        f"{M}.weight": torch.randn(20, 24).to(torch.float8_e4m3fn),
        f"{M}.weight_scale": torch.rand(3, 2),
    }
    layout = {"out_group_size": 2, "num_codebooks": 2, "nbits_per_codebook": 8}
    return {
        "gptq": Case({"quant_method": "gptq", "bits": 4, "group_size": 32}, gptq),
        "awq": Case({"quant_method": "awq", "bits": 4, "group_size": 32}, awq),
        "aqlm": Case({"quant_method": "aqlm", **layout}, aqlm),
        "mxfp4 experts": Case({"quant_method": "mxfp4"}, experts),
        "fp8 experts": Case({"quant_method": "fp8", "weight_block_size": [8, 16]}, fp8),
        "fp8 blocks": Case(compressed("float-quantized", **FLOAT8, **block), blocks),
    }


READ_ONLY = read_only()
random_cuts = st.sets(st.integers(0, 600), max_size=6)
# a fixture that holds no state does not have to be made anew for each example
quietly = settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def legal(cuts: set[int], step: int, rows: int, matrix: int) -> list[int]:
    """Return cuts moved to where tiles may end."""
    firsts = [cut // matrix * matrix for cut in cuts if cut < rows]
    inside = [cut % matrix // step * step for cut in cuts if cut < rows]
    return [first + cut for first, cut in zip(firsts, inside, strict=True)]


def random_weight(shape: tuple[int, int]) -> torch.Tensor:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(7)).bfloat16()
    weight[shape[0] // 2] *= 50
    weight[shape[0] // 3] = 0
    return weight


@pytest.mark.parametrize("name", ENCODED)
@given(cuts=random_cuts)
@quietly
def test_any_tiles_encode_to_the_same_bytes(bench: Any, name: str, cuts: set[int]) -> None:
    section, shape = ENCODED[name]
    weight = random_weight(shape)
    codec = find_codec(section)
    whole = bench.encode(codec.encoder(f"{M}.weight", shape, Dtype.BF16), weight)
    encoder = codec.encoder(f"{M}.weight", shape, Dtype.BF16)
    step = max(encoder.row_step, encoder.weight.row_step)
    tiled = bench.encode(encoder, weight, legal(cuts, step, *[shape[0]] * 2))
    assert tiled == whole


@pytest.mark.parametrize("name", ENCODED)
@given(cuts=random_cuts)
@quietly
def test_any_tiles_decode_to_the_same_values(bench: Any, name: str, cuts: set[int]) -> None:
    section, shape = ENCODED[name]
    codec = find_codec(section)
    encoder = codec.encoder(f"{M}.weight", shape, Dtype.BF16)
    stored = bench.encode(encoder, random_weight(shape))
    specs = {part.tensor.name: part for part in encoder.weight.parts}
    found = codec.find(
        [part.tensor for part in encoder.weight.parts],
        lambda tensor: stored[specs[tensor.name].role],
    )
    (weight,) = found.weights
    assert (weight.name, weight.shape) == (f"{M}.weight", shape)
    views = {role: memoryview(data) for role, data in stored.items()}

    def decode(ends: list[int]) -> torch.Tensor:
        tiles = []
        for begin, end in zip([0, *ends], ends, strict=False):
            data = {x.role: x.take(views[x.role]) for x in weight.extents(begin, end)}
            tiles.append(weight.decode(begin, end, data))
        return torch.cat(tiles)

    ends = sorted({*legal(cuts, weight.row_step, *[shape[0]] * 2), shape[0]} - {0})
    assert bench.raw(decode(ends)) == bench.raw(decode([shape[0]]))


@pytest.mark.parametrize("name", READ_ONLY)
@given(cuts=random_cuts)
@quietly
def test_any_tiles_of_what_is_only_read(bench: Any, name: str, cuts: set[int]) -> None:
    case = READ_ONLY[name]
    weight = bench.find(find_codec(case.section), case.tensors)
    ends = legal(cuts, weight.row_step, weight.rows, weight.matrix_rows)
    whole = bench.decode(weight, case.tensors)
    assert whole.shape == (weight.rows, weight.columns)
    assert bench.raw(bench.decode(weight, case.tensors, ends)) == bench.raw(whole)


def test_every_format_is_cut_here() -> None:
    sections = [section for section, _ in ENCODED.values()]
    sections += [case.section for case in READ_ONLY.values()]
    assert {type(find_codec(section)) for section in sections} == set(all_codecs())
    encoded = {type(find_codec(section)) for section, _ in ENCODED.values()}
    assert encoded == {codec for codec in all_codecs() if codec.encodes}


@pytest.mark.parametrize("name", READ_ONLY)
def test_what_is_no_tile_is_refused(bench: Any, name: str) -> None:
    case = READ_ONLY[name]
    weight = bench.find(find_codec(case.section), case.tensors)
    rows, step = weight.matrix_rows, weight.row_step
    wrong = [(0, 0), (-step, step), (step, 0), (0, weight.rows + step)]
    if step > 1:
        wrong += [(1, step), (0, step + 1)]
    if weight.rows > rows:
        wrong.append((0, 2 * rows))
    for begin, end in wrong:
        with pytest.raises(ValueError, match="are no tile"):
            weight.extents(begin, end)


def test_tiles_to_encode_are_checked() -> None:
    codec = find_codec({"quant_method": "fp8", "weight_block_size": [8, 16]})
    encoder = codec.encoder(f"{M}.weight", (20, 16), Dtype.BF16)
    with pytest.raises(ValueError, match="in steps of 8 rows; got 4:20"):
        encoder.encode(4, 20, torch.zeros(16, 16))
    with pytest.raises(ValueError, match=r"shape \(9, 16\) for rows 0 to 8"):
        encoder.encode(0, 8, torch.zeros(9, 16))
