"""What all formats of compressed-tensors share: the section of config.json, and finding scales.

A value is `(code - zero) * scale`, rounded once to the dtype of the scales. Scales come per tensor
(1,), per channel (N, 1), per group of G inputs (N, K / G), or per block of B0 x B1 values
(ceil(N / B0), ceil(K / B1)).
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast, get_args

from streammerge.codecs.base import Codec, CodedWeight, Extent, Found, missing, sort_out
from streammerge.dtypes import Dtype
from streammerge.errors import UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    import torch

    from streammerge.codecs.base import Stored

__all__ = ["CompressedCodec", "ScaledWeight", "WeightArgs"]

Strategy = Literal["tensor", "channel", "group", "tensor_group", "block"]
SCALE_DTYPES = (Dtype.F16, Dtype.BF16, Dtype.F32)
ROLES = (
    "weight",
    "weight_packed",
    "weight_scale",
    "weight_zero_point",
    "weight_global_scale",
    "weight_shape",
    "weight_g_idx",
)
_MARKS = tuple(f".{role}" for role in ROLES[1:])
_SECTION = "quantization_config"


@dataclass(frozen=True, slots=True)
class WeightArgs:
    """How the weights of a checkpoint are quantized, as its configuration says."""

    bits: int
    kind: Literal["int", "float"]
    strategy: Strategy
    is_symmetric: bool
    group_size: int | None
    """Inputs per group; None unless the strategy is one of groups."""
    block: tuple[int, int] | None

    @classmethod
    def of(cls, raw: Mapping[str, Any]) -> WeightArgs:
        """Read `weights` of a group.

        Raises:
            UnsupportedError: A value is none that compressed-tensors knows.
        """
        size = raw.get("group_size")
        strategy = raw.get("strategy")
        if strategy is None:
            # what compressed-tensors infers
            strategy = "tensor" if size is None else "channel" if size == -1 else "group"
        block = raw.get("block_structure")
        checks = {
            "num_bits": (raw.get("num_bits", 8) in range(1, 9), "1 to 8"),
            "type": (raw.get("type", "int") in ("int", "float"), "int or float"),
            "strategy": (strategy in get_args(Strategy), ", ".join(get_args(Strategy))),
            "group_size": (size is None or type(size) is int, "a number"),
            "block_structure": (
                strategy != "block" or _is_block(block),
                "two positive numbers",
            ),
        }
        for key, (is_right, expected) in checks.items():
            if not is_right:
                raise refusal(f"weights.{key}", expected, raw.get(key))
        if "group" in strategy and not (size and size > 0):
            raise refusal("weights.group_size", "a number of inputs", size)
        return cls(
            bits=raw.get("num_bits", 8),
            kind=raw.get("type", "int"),
            strategy=cast("Strategy", strategy),
            is_symmetric=bool(raw.get("symmetric", True)),
            group_size=size if "group" in strategy else None,
            block=(block[0], block[1]) if block and strategy == "block" else None,
        )

    def grid(self, rows: int, columns: int) -> tuple[int, ...]:
        """Return the shape of the scales of an (N, K) weight."""
        if self.strategy == "tensor":
            return (1,)
        if self.block is not None:
            return (-(-rows // self.block[0]), -(-columns // self.block[1]))
        return (rows, 1 if self.group_size is None else columns // self.group_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaledWeight(CodedWeight):
    """One weight of a compressed-tensors checkpoint."""

    args: WeightArgs

    def scale_extent(self, role: str, begin: int, end: int) -> Extent:
        """Return the bytes of scales, or of zeros stored like these."""
        if self.args.strategy == "tensor":
            return self.whole(role)
        return self.by_rows(role, begin, end, step=self.args.block[0] if self.args.block else 1)

    def load_scales(
        self, role: str, begin: int, end: int, data: Mapping[str, memoryview]
    ) -> torch.Tensor:
        """Return scales, or zeros stored like these, in float32, as wide as `spread` wants them."""
        from streammerge.codecs.tensors import as_tensor  # noqa: PLC0415 (it imports torch)

        tensor, args = self.part(role), self.args
        if args.strategy == "tensor":
            return as_tensor(data, role, tensor.dtype, (1, 1)).float()
        lines = end - begin
        if args.block is not None:
            lines = -(-end // args.block[0]) - begin // args.block[0]
        return as_tensor(data, role, tensor.dtype, (lines, tensor.shape[1])).float()

    def spread(self, scales: torch.Tensor, begin: int, end: int) -> torch.Tensor:
        """Return one number for each value from one for each group or block.

        One for a row, or for all, is left to broadcasting.
        """
        import torch  # noqa: PLC0415 (planning needs no torch)

        if self.args.group_size is not None:
            return scales.repeat_interleave(self.args.group_size, dim=1)
        if self.args.block is None:
            return scales
        high, wide = self.args.block
        columns = scales.repeat_interleave(wide, dim=1)[:, : self.columns]
        return columns[torch.arange(begin, end) // high - begin // high]


@dataclass(frozen=True, slots=True)
class CompressedCodec(Codec):
    """A format of compressed-tensors."""

    formats: ClassVar[tuple[str, ...]]
    """What `format` is called."""
    coded: ClassVar[str]
    """The role of the codes."""

    args: WeightArgs

    @classmethod
    def of(cls, section: Mapping[str, Any], dtype: Dtype) -> CompressedCodec | None:
        """Return the codec if the section selects one of its formats."""
        del dtype  # values are rounded to the dtype of the scales
        if section.get("quant_method") != "compressed-tensors":
            return None
        found = _schemes(section)
        formats = {form for form, _ in found}
        if not formats & set(cls.formats):
            return None
        sparsity = (section.get("sparsity_config") or {}).get("format", "dense")
        if sparsity != "dense":
            raise refusal("sparsity_config.format", "dense", sparsity)
        if len(set(found)) != 1:
            raise refusal("config_groups", "the same codes for all modules", f"{len(found)} kinds")
        args = found[0][1]
        cls.check(args)
        return cls(args)

    @classmethod
    @abstractmethod
    def check(cls, args: WeightArgs) -> None:
        """Make sure that this kind of codes can be decoded.

        Raises:
            UnsupportedError: It cannot.
        """

    def find(self, tensors: Iterable[Stored], read: Callable[[Stored], bytes]) -> Found:
        """Group tensors by their module."""
        by_name = {tensor.name: tensor for tensor in tensors}
        weights = []
        for name, codes in by_name.items():
            module, _, role = name.rpartition(".")
            if role != self.coded or not self.is_coded(codes):
                continue
            parts = {role: by_name.get(f"{module}.{role}") for role in ROLES}
            held = {role: tensor for role, tensor in parts.items() if tensor is not None}
            if "weight_scale" not in held:
                raise missing(name, f"{module}.weight_scale")
            if "weight_g_idx" in held:
                raise UnsupportedError(
                    "groups of inputs out of order are not decoded",
                    where=held["weight_g_idx"].name,
                    hint="compressed-tensors stopped to read them too",
                )
            weights.append(self.weight(f"{module}.weight", held, read))
        return sort_out(by_name, weights, marks=_MARKS)

    def is_coded(self, tensor: Stored) -> bool:
        """Tell whether a tensor of the right name holds codes."""
        del tensor
        return True

    @abstractmethod
    def weight(
        self, name: str, held: Mapping[str, Stored], read: Callable[[Stored], bytes]
    ) -> ScaledWeight:
        """Return the weight that tensors make up.

        Raises:
            CheckpointError: They do not fit together.
        """

    def require(self, held: Mapping[str, Stored], role: str, name: str) -> Stored:
        """Return one of the tensors of a weight.

        Raises:
            CheckpointError: It is missing.
        """
        if role not in held:
            raise missing(name, f"{name}{role.removeprefix('weight')}")
        return held[role]

    def holds_whole(self, shape: tuple[int, ...]) -> bool:
        """Tell whether the inputs of a weight divide into whole groups."""
        return shape[-1] % (self.args.group_size or 1) == 0

    def check_encoded(self, name: str, shape: tuple[int, ...], dtype: Dtype) -> None:
        """Make sure that a weight can be encoded.

        Raises:
            UnsupportedError: It cannot.
        """
        size = self.args.group_size or 1
        is_named = name.endswith(".weight")
        if len(shape) != 2 or dtype not in SCALE_DTYPES or not is_named or shape[1] % size:
            raise UnsupportedError(
                "codes are made of matrices of 16 or 32 bits called `.weight`, in whole groups",
                where=name,
                expected=f"in_features in groups of {size}",
                got=f"{dtype.value} {shape}",
            )


def refusal(key: str, expected: object, got: object) -> UnsupportedError:
    """Return the error that a value of the section cannot be used."""
    return UnsupportedError(
        "codes of compressed-tensors of this variety are not handled",
        where=f"{_SECTION}.{key}",
        expected=expected,
        got=repr(got)[:80],
    )


def find_scales(
    low: torch.Tensor, high: torch.Tensor, args: WeightArgs
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Choose scales, and zeros unless codes are symmetric, from the extremes of what shares one.

    Everything is computed in the dtype of the extremes, which is that of the weight.

    Returns:
        Both as (...), zeros as int8.
    """
    import torch  # noqa: PLC0415 (planning needs no torch)

    lowest, highest = code_range(args)
    low, high = low.clamp(max=0), high.clamp(min=0)
    zeros = None
    if args.is_symmetric:
        scales = torch.maximum(low.abs(), high) / ((highest - lowest) / 2)
    else:
        scales = (high - low) / (highest - lowest)
        shift = (lowest - low / scales).clamp_(lowest, highest)
        # a group of zeros has no scale; its zero is of no consequence, and bytes are those of NaN
        zeros = shift.clamp_(-128, 127).round_().to(torch.int8)
    smallest = torch.finfo(scales.dtype).eps
    return torch.where(scales == 0, smallest, scales), zeros


def code_range(args: WeightArgs) -> tuple[float, float]:
    """Return the least and the greatest value of a code."""
    if args.kind == "float":
        limit = 448.0 if args.bits == 8 else 6.0
        return -limit, limit
    half = 2.0 ** (args.bits - 1)
    return -half, half - 1


def round_to_codes(
    values: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, args: WeightArgs
) -> torch.Tensor:
    """Return values in units of their scales, within the range of codes, in the dtype they have."""
    steps = values / scales
    if zeros is not None:
        steps += zeros.to(values.dtype)
    return steps.clamp_(*code_range(args))


def _schemes(section: Mapping[str, Any]) -> list[tuple[str, WeightArgs]]:
    """Return format and weights of each group."""
    groups = section.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise refusal("config_groups", "at least one group", groups)
    found = []
    for key, group in groups.items():
        raw = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(raw, dict):
            raise refusal(f"config_groups.{key}.weights", "an object", raw)
        form = group.get("format") or section.get("format")
        found.append((str(form), WeightArgs.of(raw)))
    return found


def _is_block(block: object) -> bool:
    return (
        isinstance(block, (list, tuple))
        and len(block) == 2
        and all(type(size) is int and size > 0 for size in block)
    )
