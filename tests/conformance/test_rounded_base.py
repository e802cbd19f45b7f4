"""A base as QLoRA trains on it has the values that bitsandbytes decodes from its own codes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import bitsandbytes.functional as library
import pytest
import torch
from safetensors.torch import save_file

from streammerge.checkpoint.index import open_checkpoint
from streammerge.checkpoint.reader import ReaderPool
from streammerge.codecs import rounded
from streammerge.codecs.rounded import AbsmaxStore, RoundedTensor, round_checkpoint
from streammerge.errors import UnsupportedError

if TYPE_CHECKING:
    from pathlib import Path

NAME = "model.layers.0.mlp.up_proj.weight"
# rows of whole blocks; rows that begin inside one, and end in one; more blocks than one of absmax;
# more of these than torch sums in one thread by itself
SHAPES = [(96, 192), (12, 32), (33, 70), (5, 3), (130, 576), (300, 64), (2304, 1024)]
FLOATS = [torch.bfloat16, torch.float16, torch.float32]


def random_weight(shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)
    if shape[0] > 8:
        weight[1] = 0
        weight[2] *= 1000
        weight[3, ::2] = -0.0
    return weight


def expected(weight: torch.Tensor, *, is_nested: bool) -> torch.Tensor:
    codes, state = library.quantize_4bit(weight, quant_type="nf4", compress_statistics=is_nested)
    if weight.shape[1] % 64:
        # the decoder for AVX-512 multiplies by the absmax of another block there
        state.absmax = absmax_of(state)
        values = decode_in_torch(codes, state)
        return values.to(weight.dtype).view(weight.shape)
    return library.dequantize_4bit(codes, state)


def absmax_of(state: Any) -> torch.Tensor:
    if not state.nested:
        return state.absmax
    return library.dequantize_blockwise(state.absmax, state.state2) + state.offset


def decode_in_torch(codes: torch.Tensor, state: Any) -> torch.Tensor:
    flat = codes.flatten()
    pairs = torch.stack([flat >> 4, flat & 15], dim=1).flatten()[: state.shape.numel()]
    absmax = state.absmax.repeat_interleave(64)[: len(pairs)]
    return state.code[pairs.int()] * absmax


def read(
    folder: Path, weight: torch.Tensor, *, is_nested: bool, is_turned: bool = False, chunk: int = 0
) -> torch.Tensor:
    """Store a weight, and read it rounded, in pieces that end anywhere."""
    folder.mkdir(exist_ok=True)
    save_file({NAME: weight.contiguous()}, folder / "model.safetensors")
    base = open_checkpoint(folder)
    store = AbsmaxStore(2)
    made = round_checkpoint(
        base, [NAME], store, is_nested=is_nested, is_turned=lambda _: is_turned
    ).tensors[NAME]
    assert isinstance(made, RoundedTensor)
    assert (made.dtype, made.shape) == (base.tensors[NAME].dtype, tuple(weight.shape))
    data = bytearray(made.nbytes)
    step = chunk or made.nbytes
    with ReaderPool(mode="buffered") as pool:
        for at in range(0, made.nbytes, step):
            reader = pool.reader(made.file)
            reader.read_into(made.offset + at, memoryview(data)[at : at + step])
    return torch.frombuffer(data, dtype=weight.dtype).view(weight.shape)


# with more threads the mean of absmax has other last bits in bitsandbytes
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("is_nested", [True, False])
def test_values_are_those_of_bitsandbytes(
    shape: tuple[int, int], dtype: torch.dtype, is_nested: bool, tmp_path: Path, same_bits: Any
) -> None:
    weight = random_weight(shape, dtype)
    wanted = expected(weight, is_nested=is_nested)
    same_bits({"": read(tmp_path, weight, is_nested=is_nested)}, {"": wanted})


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("is_nested", [True, False])
def test_pieces_and_chunks_change_nothing(
    is_nested: bool, tmp_path: Path, same_bits: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for shape in ((130, 576), (66, 70)):
        weight = random_weight(shape, torch.bfloat16)
        whole = read(tmp_path, weight, is_nested=is_nested)
        monkeypatch.setattr(rounded._RoundingReader, "chunk_values", 5000)
        monkeypatch.setattr(rounded, "FINISH_BLOCKS", 256)
        pieces = read(tmp_path, weight, is_nested=is_nested, chunk=7654)
        monkeypatch.undo()
        same_bits({"": pieces}, {"": whole})


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("is_nested", [True, False])
def test_turned_weights_are_coded_as_the_layer_has_them(
    is_nested: bool, tmp_path: Path, same_bits: Any
) -> None:
    weight = random_weight((192, 80), torch.bfloat16)
    wanted = expected(weight.T.contiguous(), is_nested=is_nested).T.contiguous()
    for chunk in (0, 3000):
        found = read(tmp_path, weight, is_nested=is_nested, is_turned=True, chunk=chunk)
        same_bits({"": found}, {"": wanted})


def test_the_bits_do_not_depend_on_torchs_threads(tmp_path: Path, same_bits: Any) -> None:
    weight = random_weight((2304, 1024), torch.float32)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(read(tmp_path, weight, is_nested=True))
    finally:
        torch.set_num_threads(before)
    same_bits({"": found[1]}, {"": found[0]})
    same_bits({"": found[2]}, {"": found[0]})


def test_a_weight_is_looked_at_once_while_it_is_in_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scans = []
    scan = rounded._RoundingReader._scan
    monkeypatch.setattr(
        rounded._RoundingReader, "_scan", lambda self: scans.append(1) or scan(self)
    )
    read(tmp_path, random_weight((96, 192), torch.bfloat16), is_nested=True, chunk=1000)
    assert len(scans) == 1


def test_the_store_forgets_what_was_used_least_lately(tmp_path: Path) -> None:
    weights = {}
    for number in range(3):
        save_file({NAME: torch.ones(2, 64)}, tmp_path / "model.safetensors")
        tensor = open_checkpoint(tmp_path).tensors[NAME]
        weights[number] = rounded.RoundedWeight(
            tensor, is_turned=bool(number), is_nested=number < 2
        )
    store = AbsmaxStore(2)
    asked = []

    def get(number: int) -> None:
        def scan() -> Any:
            asked.append(number)
            return number

        assert store.get(weights[number], scan) == number

    for number in (0, 1, 0, 2, 0, 1):
        get(number)
    assert asked == [0, 1, 2, 1]


@pytest.mark.parametrize(
    ("weight", "is_turned", "message"),
    [
        (torch.ones(2, 64, dtype=torch.float64), False, "weight of this dtype"),
        (torch.ones(96, 4), True, "whole blocks only"),
    ],
)
def test_what_is_not_rounded_is_an_error(
    weight: torch.Tensor, is_turned: bool, message: str, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedError, match=message):
        read(tmp_path, weight, is_nested=True, is_turned=is_turned)
