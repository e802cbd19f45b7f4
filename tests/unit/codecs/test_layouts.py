"""Weights that are not complete, or whose tensors do not fit together, are errors that name one."""

from __future__ import annotations

import json
from typing import Any

import pytest

from streammerge.checkpoint.header import TensorSpec
from streammerge.codecs.base import Extent
from streammerge.codecs.registry import find_codec
from streammerge.dtypes import Dtype
from streammerge.errors import CheckpointError, UnsupportedError

Spec = tuple[str, Dtype, tuple[int, ...]]
W = "a.weight"
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
STATE = {
    "quant_type": "nf4",
    "blocksize": 64,
    "dtype": "bfloat16",
    "shape": [8, 64],
    "nested_blocksize": 256,
    "nested_dtype": "float32",
    "nested_offset": 0.25,
}


def compressed(form: str, weights: dict[str, Any]) -> dict[str, Any]:
    groups = {"group_0": {"weights": weights}}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": groups}


SECTIONS: dict[str, dict[str, Any]] = {
    "bnb4": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "bnb8": {"quant_method": "bitsandbytes", "load_in_8bit": True},
    "fp8": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "mxfp4": {"quant_method": "mxfp4"},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 32},
    "gptq3": {"quant_method": "gptq", "bits": 3, "group_size": 32},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 32},
    "aqlm": {"quant_method": "aqlm", "nbits_per_codebook": 8, "num_codebooks": 2},
    "packed": compressed("pack-quantized", {**INT4, "symmetric": False}),
    "naive": compressed(
        "int-quantized", {"num_bits": 8, "strategy": "channel", "symmetric": False}
    ),
    "nvfp4": compressed(
        "nvfp4-pack-quantized",
        {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16},
    ),
}
SOUND: dict[str, dict[str, tuple[Dtype, tuple[int, ...]]]] = {
    "bnb4": {
        W: (Dtype.U8, (256, 1)),
        f"{W}.absmax": (Dtype.U8, (8,)),
        f"{W}.quant_map": (Dtype.F32, (16,)),
        f"{W}.nested_absmax": (Dtype.F32, (1,)),
        f"{W}.nested_quant_map": (Dtype.F32, (256,)),
        f"{W}.quant_state.bitsandbytes__nf4": (Dtype.U8, (150,)),
    },
    "bnb8": {
        W: (Dtype.I8, (8, 64)),
        "a.SCB": (Dtype.F32, (8,)),
        "a.weight_format": (Dtype.U8, ()),
    },
    "fp8": {W: (Dtype.F8_E4M3, (256, 64)), f"{W}_scale_inv": (Dtype.F32, (2, 1))},
    "mxfp4": {"a_blocks": (Dtype.U8, (2, 6, 4, 16)), "a_scales": (Dtype.U8, (2, 6, 4))},
    "gptq": {
        "a.qweight": (Dtype.I32, (12, 8)),
        "a.qzeros": (Dtype.I32, (3, 1)),
        "a.scales": (Dtype.F16, (3, 8)),
        "a.g_idx": (Dtype.I32, (96,)),
    },
    "awq": {
        "a.qweight": (Dtype.I32, (64, 2)),
        "a.qzeros": (Dtype.I32, (2, 2)),
        "a.scales": (Dtype.F16, (2, 16)),
    },
    "aqlm": {
        "a.codes": (Dtype.I8, (6, 4, 2)),
        "a.codebooks": (Dtype.F16, (2, 256, 1, 8)),
        "a.scales": (Dtype.F16, (6, 1, 1, 1)),
    },
    "packed": {
        f"{W}_packed": (Dtype.I32, (6, 8)),
        f"{W}_scale": (Dtype.BF16, (6, 2)),
        f"{W}_zero_point": (Dtype.I32, (1, 2)),
        f"{W}_shape": (Dtype.I64, (2,)),
    },
    "naive": {
        W: (Dtype.I8, (6, 8)),
        f"{W}_scale": (Dtype.BF16, (6, 1)),
        f"{W}_zero_point": (Dtype.I8, (6, 1)),
    },
    "nvfp4": {
        f"{W}_packed": (Dtype.U8, (6, 16)),
        f"{W}_scale": (Dtype.F8_E4M3, (6, 2)),
        f"{W}_global_scale": (Dtype.F32, (1,)),
    },
}
OPTIONAL = {"a.g_idx", "a.weight_format"}
# without them the others describe nothing
MARKS = {W, "a_blocks", "a.qweight", "a.codes", f"{W}_packed"}


def small(tensor: Any) -> bytes:
    if tensor.name.endswith("_shape"):
        return (6).to_bytes(8, "little") + (64).to_bytes(8, "little")
    if tensor.name.endswith("weight_format"):
        return b"\0"
    return json.dumps(STATE).encode()


def find(form: str, specs: dict[str, tuple[Dtype, tuple[int, ...]]]) -> Any:
    tensors = [TensorSpec(name, dtype, shape) for name, (dtype, shape) in specs.items()]
    return find_codec(SECTIONS[form]).find(tensors, small)


CASES = [(form, name) for form, specs in SOUND.items() for name in specs]


@pytest.mark.parametrize("form", SOUND)
def test_a_sound_weight_is_found_whatever_the_order(form: str) -> None:
    forwards = find(form, SOUND[form])
    backwards = find(form, dict(reversed(SOUND[form].items())))
    assert len(forwards.weights) == 1
    assert not forwards.plain
    assert forwards == backwards
    names = [part.tensor.name for part in forwards.weights[0].parts]
    assert sorted(names) == sorted(SOUND[form])


@pytest.mark.parametrize(("form", "name"), CASES)
def test_a_missing_tensor_is_an_error_that_names_it(form: str, name: str) -> None:
    specs = {other: spec for other, spec in SOUND[form].items() if other != name}
    is_mark = name in MARKS and form != "bnb4"
    if name in OPTIONAL:
        assert len(find(form, specs).weights) == 1
        return
    if is_mark or "quant_state" in name:
        with pytest.raises(CheckpointError, match="describes codes that are not there"):
            find(form, specs)
        return
    with pytest.raises(CheckpointError, match="quantized weight lacks a tensor") as caught:
        find(form, specs)
    assert caught.value.expected == name


@pytest.mark.parametrize(("form", "name"), CASES)
def test_a_tensor_of_another_shape_or_dtype_is_an_error_that_names_a_part(
    form: str, name: str
) -> None:
    if "quant_state" in name:
        return
    dtype, shape = SOUND[form][name]
    longer = (shape[0] + 1, *shape[1:]) if shape else (2,)
    for changed in ((dtype, longer), (dtype, (*shape, 2)), (Dtype.C64, shape)):
        if form in ("fp8", "bnb8", "naive") and name == W and changed[0] is Dtype.C64:
            continue  # a weight that is no codes is stored as it is
        with pytest.raises((CheckpointError, UnsupportedError), match="in a"):
            find(form, {**SOUND[form], name: changed})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("blocksize", 48),
        ("blocksize", [64]),
        ("dtype", "int8"),
        ("dtype", {}),
        ("quant_type", "nf3"),
        ("shape", [8]),
        ("shape", [8, -64]),
        ("shape", [8, 1 << 50]),
        ("shape", "8x64"),
        ("shape", [True, 64]),
        ("nested_blocksize", 128),
        ("nested_dtype", "float16"),
        ("nested_offset", "0.25"),
    ],
)
def test_a_description_of_nf4_is_hostile_until_checked(
    monkeypatch: pytest.MonkeyPatch, key: str, value: object
) -> None:
    monkeypatch.setitem(STATE, key, value)
    with pytest.raises(
        CheckpointError, match=rf"quant_state cannot be read, in {key} of a\.weight"
    ):
        find("bnb4", SOUND["bnb4"])


def test_a_description_of_nf4_that_is_no_json_or_contradicts_its_name() -> None:
    codec = find_codec(SECTIONS["bnb4"])
    tensors = [TensorSpec(name, *spec) for name, spec in SOUND["bnb4"].items()]
    with pytest.raises(CheckpointError, match="is not JSON"):
        codec.find(tensors, lambda tensor: b"\xff")
    with pytest.raises(CheckpointError, match="cannot be read"):
        codec.find(tensors, lambda tensor: b"[]")
    with pytest.raises(CheckpointError, match="contradicts its name"):
        codec.find(tensors, lambda tensor: json.dumps({**STATE, "quant_type": "fp4"}).encode())
    huge = TensorSpec(tensors[-1].name, Dtype.U8, (1 << 20,))
    with pytest.raises(CheckpointError, match="at most 65536 bytes"):
        codec.find([*tensors[:-1], huge], lambda tensor: b"")


def test_codes_of_three_bits_want_whole_words() -> None:
    specs: dict[str, tuple[Dtype, tuple[int, ...]]] = {
        "a.qweight": (Dtype.I32, (9, 16)),
        "a.qzeros": (Dtype.I32, (3, 2)),
        "a.scales": (Dtype.F16, (3, 16)),
        "a.g_idx": (Dtype.I32, (96,)),
    }
    with pytest.raises(CheckpointError, match="multiples of 32"):
        find("gptq3", specs)


def test_groups_out_of_order_in_compressed_tensors_are_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"out of order are not decoded, in a\.weight_g_idx"):
        find("packed", {**SOUND["packed"], f"{W}_g_idx": (Dtype.I32, (64,))})


def test_codes_in_the_layout_of_an_old_gpu_kernel_are_refused() -> None:
    tensors = [TensorSpec(name, *spec) for name, spec in SOUND["bnb8"].items()]
    with pytest.raises(UnsupportedError, match="old GPU kernel"):
        find_codec(SECTIONS["bnb8"]).find(tensors, lambda tensor: b"\1")


def test_tensors_of_other_modules_and_of_activations_are_left_alone() -> None:
    others: dict[str, tuple[Dtype, tuple[int, ...]]] = {
        "lm_head.weight": (Dtype.BF16, (10, 8)),
        "a.input_scale": (Dtype.BF16, (1,)),
        "a.bias": (Dtype.BF16, (6,)),
    }
    found = find("naive", {**SOUND["naive"], **others})
    assert [tensor.name for tensor in found.plain] == list(others)


def test_runs_of_a_tensor_are_taken_and_put() -> None:
    extent = Extent("qweight", 2, 3, count=3, stride=10)
    assert extent.total_bytes == 9
    taken = extent.take(memoryview(bytes(range(40))))
    assert list(taken) == [2, 3, 4, 12, 13, 14, 22, 23, 24]
    target = bytearray(40)
    extent.put(taken, memoryview(target))
    assert [at for at in range(40) if target[at]] == list(taken)
    assert list(Extent("weight", 5, 2).take(memoryview(bytes(range(9))))) == [5, 6]


def test_a_tile_reads_its_own_rows_only() -> None:
    (weight,) = find("gptq", SOUND["gptq"]).weights
    by_role = {extent.role: extent for extent in weight.extents(0, 8)}
    assert by_role["qweight"] == Extent("qweight", 0, 32, 12, 32)
    assert by_role["g_idx"] == Extent("g_idx", 0, 384, is_shared=True)
    (weight,) = find("awq", SOUND["awq"]).weights
    assert weight.extents(8, 16) == (
        Extent("qweight", 4, 4, 64, 8),
        Extent("qzeros", 4, 4, 2, 8),
        Extent("scales", 16, 16, 2, 32),
    )
    (weight,) = find("fp8", SOUND["fp8"]).weights
    assert weight.extents(127, 129) == (
        Extent("weight", 127 * 64, 128),
        Extent("weight_scale_inv", 0, 8),
    )
