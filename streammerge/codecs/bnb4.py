"""bitsandbytes, 4 bits: NF4 and FP4, with and without double quantization.

The weight is flattened and cut into blocks of B values; a row may begin inside a block.

    weight                  uint8 (ceil(N K / 2), 1)  two codes a byte, the high one first
    weight.absmax           float32 (ceil(N K / B),)  or uint8 codes of these
    weight.quant_map        float32 (16,)             not read: the codes are fixed
    weight.nested_absmax    float32                   one for 256 codes of absmax
    weight.nested_quant_map float32 (256,)
    weight.quant_state.bitsandbytes__nf4
                            uint8: JSON with shape, B, dtype, and the offset of absmax

A value is `code * absmax` in float32, rounded to the dtype in the JSON; with double quantization
`absmax = nested_quant_map[code] * nested_absmax + nested_offset`, in float32 too.

What is matched is bitsandbytes on a CPU. Its CUDA kernel for double quantization searches the
nearest code by another path, so that a code of `absmax` can differ there by one. Where rows do not
begin with a block, the AVX-512 decoder of bitsandbytes 0.50.2 multiplies by the absmax of another
block, and it takes subnormal bfloat16 for zero; there, what is matched is its decoder in torch.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

from streammerge.checkpoint.header import TensorSpec
from streammerge.codecs.base import (
    Codec,
    CodedWeight,
    Encoder,
    Extent,
    Found,
    Part,
    misfit,
    missing,
    sort_out,
)
from streammerge.dtypes import Dtype
from streammerge.errors import CheckpointError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    import torch

    from streammerge.codecs.base import Stored

__all__ = ["CODECS", "Bnb4Codec", "Bnb4Weight"]

QuantType = Literal["nf4", "fp4"]
NESTED_BLOCK = 256

BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
# what a float32 takes at most as Python writes it: a sign is not needed, absmax is a mean of sizes
OFFSET_CHARS = 22
_STATE = ".quant_state.bitsandbytes__"
_DTYPES = {"float16": Dtype.F16, "bfloat16": Dtype.BF16, "float32": Dtype.F32}
_SMALL_BYTES = 1 << 16
# absmax, less its mean, padded, scaled, and the codes as words of 8 bytes
_FINISH_BUFFERS = 6
_MARKS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")


@dataclass(frozen=True, slots=True, kw_only=True)
class Bnb4Weight(CodedWeight):
    """One weight of 4-bit codes."""

    quant_type: QuantType
    block: int
    """Values per `absmax`."""
    nested_offset: float | None = None
    """What is added to a decoded `absmax`; None without double quantization."""

    @property
    def row_step(self) -> int:
        """Rows after which a row begins with a block again."""
        return self.block // math.gcd(self.block, self.columns)

    @property
    def is_nested(self) -> bool:
        """Whether `absmax` is quantized too."""
        return self.nested_offset is not None

    def extents(self, begin: int, end: int) -> tuple[Extent, ...]:
        """Return the bytes that rows are decoded from."""
        self.check_tile(begin, end)
        first, last = self._blocks(begin, end)
        start = begin * self.columns // 2
        found = [Extent("weight", start, -(-end * self.columns // 2) - start)]
        if not self.is_nested:
            return (*found, Extent("absmax", 4 * first, 4 * (last - first)))
        outer, after = first // NESTED_BLOCK, -(-last // NESTED_BLOCK)
        return (
            *found,
            Extent("absmax", first, last - first),
            Extent("nested_absmax", 4 * outer, 4 * (after - outer)),
            self.whole("nested_quant_map"),
        )

    def values(self, begin: int, end: int, data: Mapping[str, memoryview]) -> torch.Tensor:
        """Return (end - begin, K) float32."""
        import torch  # noqa: PLC0415 (planning needs no torch)

        from streammerge.codecs.bnb4_codes import code_table  # noqa: PLC0415
        from streammerge.codecs.tensors import as_tensor, unpack_nibbles  # noqa: PLC0415

        count = (end - begin) * self.columns
        packed = as_tensor(data, "weight", Dtype.U8, (-(-count // 2),))
        codes = unpack_nibbles(packed, high_first=True)
        values = code_table(self.quant_type)[codes.int()]
        absmax = self._absmax(begin, end, data)
        blocks = torch.nn.functional.pad(values[:count], (0, -count % self.block))
        scaled = blocks.view(-1, self.block).mul_(absmax[:, None])
        return scaled.flatten()[:count].view(end - begin, self.columns)

    def _absmax(self, begin: int, end: int, data: Mapping[str, memoryview]) -> torch.Tensor:
        from streammerge.codecs.tensors import as_tensor  # noqa: PLC0415 (it imports torch)

        first, last = self._blocks(begin, end)
        if self.nested_offset is None:
            return as_tensor(data, "absmax", Dtype.F32, (last - first,))
        outer, after = first // NESTED_BLOCK, -(-last // NESTED_BLOCK)
        codes = as_tensor(data, "absmax", Dtype.U8, (last - first,))
        table = as_tensor(data, "nested_quant_map", Dtype.F32, (256,))
        scales = as_tensor(data, "nested_absmax", Dtype.F32, (after - outer,))
        start = first - outer * NESTED_BLOCK
        wide = scales.repeat_interleave(NESTED_BLOCK)[start : start + last - first]
        return (table[codes.int()] * wide).add_(self.nested_offset)

    def _blocks(self, begin: int, end: int) -> tuple[int, int]:
        return begin * self.columns // self.block, -(-end * self.columns // self.block)


@dataclass(frozen=True, slots=True)
class Bnb4Codec(Codec):
    """bitsandbytes with 4 bits."""

    title: ClassVar[str] = "bitsandbytes NF4, FP4"
    selector: ClassVar[str] = "quant_method: bitsandbytes, load_in_4bit"
    stored: ClassVar[str] = (
        "weight, absmax, quant_map, nested_absmax, nested_quant_map, quant_state"
    )
    reference: ClassVar[str] = "bitsandbytes on a CPU"
    encodes: ClassVar[bool] = True
    remarks: ClassVar[str] = (
        "a tile begins with a block: every row does where K is a multiple of 64"
    )

    quant_type: QuantType = "fp4"
    is_nested: bool = False
    block: int = 64

    @classmethod
    def of(cls, section: Mapping[str, Any], dtype: Dtype) -> Bnb4Codec | None:
        """Return the codec if the section selects 4 bits of bitsandbytes."""
        del dtype  # every weight says itself what it is decoded to
        if section.get("quant_method") != "bitsandbytes":
            return None
        if not (section.get("load_in_4bit") or section.get("_load_in_4bit")):
            return None
        quant_type = section.get("bnb_4bit_quant_type", "fp4")
        if quant_type not in ("nf4", "fp4"):
            raise UnsupportedError(
                "4-bit codes of this kind are unknown",
                where="quantization_config.bnb_4bit_quant_type",
                expected="nf4 or fp4",
                got=quant_type,
            )
        return cls(quant_type, bool(section.get("bnb_4bit_use_double_quant", False)))

    def find(self, tensors: Iterable[Stored], read: Callable[[Stored], bytes]) -> Found:
        """Group tensors by the JSON that every weight has."""
        by_name = {tensor.name: tensor for tensor in tensors}
        weights = [
            _weight(tensor, by_name, read) for name, tensor in by_name.items() if _STATE in name
        ]
        return sort_out(by_name, weights, marks=_MARKS)

    def like(self, weight: CodedWeight) -> Codec:
        """Return the codec with the block and the quantization of absmax that a weight has."""
        assert isinstance(weight, Bnb4Weight)
        return Bnb4Codec(weight.quant_type, weight.is_nested, weight.block)

    def encoder(self, name: str, shape: tuple[int, ...], dtype: Dtype) -> Encoder:
        """Return an encoder; the JSON is padded with spaces to a length known beforehand."""
        if len(shape) != 2 or dtype not in _DTYPES.values():
            raise UnsupportedError(
                "4-bit codes are made of matrices of 16 or 32 bits",
                where=name,
                got=f"{dtype.value} {shape}",
            )
        return _Bnb4Encoder(self._layout(name, shape, dtype))

    def _layout(self, name: str, shape: tuple[int, ...], dtype: Dtype) -> Bnb4Weight:
        count = math.prod(shape)
        blocks = -(-count // self.block)
        specs: list[tuple[str, str, Dtype, tuple[int, ...]]] = [
            ("weight", name, Dtype.U8, (-(-count // 2), 1)),
            ("absmax", f"{name}.absmax", Dtype.U8 if self.is_nested else Dtype.F32, (blocks,)),
            ("quant_map", f"{name}.quant_map", Dtype.F32, (16,)),
        ]
        if self.is_nested:
            outer = -(-blocks // NESTED_BLOCK)
            specs += [
                ("nested_absmax", f"{name}.nested_absmax", Dtype.F32, (outer,)),
                ("nested_quant_map", f"{name}.nested_quant_map", Dtype.F32, (256,)),
            ]
        weight = Bnb4Weight(
            name=name,
            shape=shape,
            dtype=dtype,
            parts=(),
            quant_type=self.quant_type,
            block=self.block,
            nested_offset=0.0 if self.is_nested else None,
        )
        length = len(_state_json(weight))
        if self.is_nested:
            length += OFFSET_CHARS - len("0.0")
            # in whole words, so that what comes next in the file is aligned
            length += -length % 8
        specs.append(("quant_state", f"{name}{_STATE}{self.quant_type}", Dtype.U8, (length,)))
        parts = tuple(
            Part(role, TensorSpec(full, stored, size)) for role, full, stored, size in specs
        )
        return replace(weight, parts=parts)


CODECS = (Bnb4Codec,)


class _Bnb4Encoder(Encoder):
    """Codes by rows; with double quantization, what describes absmax comes at the end.

    Until then it holds absmax: 4 bytes for a block. The last bits of its mean depend on torch's
    threads, so that `finish` is for a caller whose torch has one, as it has in a backend.
    """

    def __init__(self, weight: Bnb4Weight) -> None:
        self.weight: Bnb4Weight = weight
        self.row_step = weight.row_step
        self._absmax: torch.Tensor | None = None

    @property
    def held_bytes(self) -> int:
        """Absmax in float32, and what quantizing it allocates besides."""
        if not self.weight.is_nested:
            return 0
        return _FINISH_BUFFERS * 4 * self.weight.part("absmax").nbytes

    def begin(self) -> None:
        import torch  # noqa: PLC0415 (planning needs no torch)

        if self.weight.is_nested:
            self._absmax = torch.full(self.weight.part("absmax").shape, math.nan)

    def encode(self, begin: int, end: int, tile: torch.Tensor) -> dict[str, torch.Tensor]:
        self.check_tile(begin, end, tile)
        from streammerge.codecs.bnb4_codes import quantize  # noqa: PLC0415 (it imports torch)

        weight = self.weight
        flat = tile.flatten().float()
        codes, absmax = quantize(flat, quant_type=weight.quant_type, block=weight.block)
        if not weight.is_nested:
            return {"weight": codes, "absmax": absmax}
        assert self._absmax is not None, "it was not told to begin"
        first, last = self.weight._blocks(begin, end)  # noqa: SLF001 (it writes what that reads)
        self._absmax[first:last] = absmax
        return {"weight": codes}

    def finish(self) -> dict[str, torch.Tensor]:
        from streammerge.codecs.bnb4_codes import (  # noqa: PLC0415 (it imports torch)
            code_table,
            dynamic_map,
            quantize_absmax,
        )

        found = {"quant_map": code_table(self.weight.quant_type)}
        state = self.weight
        if self._absmax is not None:
            offset = self._absmax.mean()
            codes, scales = quantize_absmax(self._absmax - offset)
            found |= {"absmax": codes, "nested_absmax": scales, "nested_quant_map": dynamic_map()}
            text = _state_json(state, offset.item())
        else:
            text = _state_json(state)
        found["quant_state"] = _padded(text, state.part("quant_state").nbytes)
        return found


def _padded(text: bytes, length: int) -> torch.Tensor:
    import torch  # noqa: PLC0415 (planning needs no torch)

    return torch.frombuffer(bytearray(text.ljust(length)), dtype=torch.uint8)


def _state_json(weight: Bnb4Weight, offset: float = 0.0) -> bytes:
    """Return the JSON of a weight, with the keys in bitsandbytes' order."""
    dtype = next(name for name, dtype in _DTYPES.items() if dtype is weight.dtype)
    fields: dict[str, Any] = {
        "quant_type": weight.quant_type,
        "blocksize": weight.block,
        "dtype": dtype,
        "shape": list(weight.shape),
    }
    if weight.is_nested:
        fields |= {
            "nested_blocksize": NESTED_BLOCK,
            "nested_dtype": "float32",
            "nested_offset": offset,
        }
    return json.dumps(fields).encode()


def _weight(
    state: Stored, by_name: Mapping[str, Stored], read: Callable[[Stored], bytes]
) -> Bnb4Weight:
    """Return the weight that a JSON describes."""
    name, _, ending = state.name.partition(_STATE)
    fields = _parse_state(state, read)
    quant_type, block, shape = fields["quant_type"], fields["blocksize"], tuple(fields["shape"])
    if quant_type != ending:
        raise CheckpointError(
            "quant_state contradicts its name", where=state.name, expected=ending, got=quant_type
        )
    is_nested = "nested_offset" in fields
    count = math.prod(shape)
    blocks = -(-count // block)
    expected = [("absmax", Dtype.U8 if is_nested else Dtype.F32, blocks)]
    if is_nested:
        expected.append(("nested_absmax", Dtype.F32, -(-blocks // NESTED_BLOCK)))
        expected.append(("nested_quant_map", Dtype.F32, 256))
    expected.append(("quant_map", Dtype.F32, 16))
    if name not in by_name:
        raise missing(name, name)
    weight = by_name[name]
    # `bnb_4bit_quant_storage` may call the same bytes by another dtype
    if not 0 <= weight.nbytes - -(-count // 2) < weight.dtype.item_bytes:
        raise misfit(weight, f"{-(-count // 2)} bytes for {shape}")
    parts = [Part("weight", weight)]
    for role, dtype, length in expected:
        tensor = by_name.get(f"{name}.{role}")
        if tensor is None:
            raise missing(name, f"{name}.{role}")
        if tensor.dtype is not dtype or math.prod(tensor.shape) != length:
            raise misfit(tensor, f"{dtype.value} ({length},)")
        parts.append(Part(role, tensor))
    return Bnb4Weight(
        name=name,
        shape=shape,
        dtype=_DTYPES[fields["dtype"]],
        parts=(*parts, Part("quant_state", state)),
        quant_type=cast("QuantType", quant_type),
        block=block,
        nested_offset=float(fields["nested_offset"]) if is_nested else None,
    )


def _parse_state(state: Stored, read: Callable[[Stored], bytes]) -> dict[str, Any]:
    if state.nbytes > _SMALL_BYTES:
        raise misfit(state, f"at most {_SMALL_BYTES} bytes of JSON")
    try:
        fields = json.loads(read(state))
    except (ValueError, RecursionError) as error:
        raise CheckpointError("quant_state is not JSON", where=state.name, got=error) from error
    checks: dict[str, Callable[[Any], bool]] = {
        "blocksize": lambda value: value in BLOCKS,
        "dtype": lambda value: value in _DTYPES,
        "quant_type": lambda value: value in ("nf4", "fp4"),
        "shape": _is_matrix,
        "nested_blocksize": lambda value: value in (NESTED_BLOCK, None),
        "nested_dtype": lambda value: value in ("float32", None),
        "nested_offset": lambda value: value is None or isinstance(value, (int, float)),
    }
    is_object = isinstance(fields, dict)
    for key, check in checks.items():
        value = fields.get(key) if is_object else None
        # a list cannot be looked up in a table, and is wrong wherever a table is asked
        if (isinstance(value, (list, dict)) and key != "shape") or not check(value):
            raise CheckpointError(
                "quant_state cannot be read", where=f"{key} of {state.name}", got=repr(value)[:80]
            )
    return cast("dict[str, Any]", fields)


def _is_matrix(shape: object) -> bool:
    return (
        isinstance(shape, list)
        and len(shape) == 2
        and all(type(size) is int and 0 < size < 1 << 40 for size in shape)
    )
