"""IA3 (Liu et al. 2022): a vector that multiplies what a layer gives, or what it is given.

    W * l,  bias * l        l (N, 1): the outputs
    W * l                   l (1, K): the inputs, of layers in feedforward_modules

For a weight stored (K, N) it is the transpose that is multiplied. For convolutions l is
(1, channels, 1, ...) either way; the input channels of a convolution with groups are those of its
groups, one after the other.

Source: peft.tuners.ia3.layer.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from streammerge.adapters.options import Options
from streammerge.adapters.terms import TunerTerm
from streammerge.adapters.tuners.base import PlannedTerm, Tuner
from streammerge.errors import AdapterError

if TYPE_CHECKING:
    import torch

    from streammerge.adapters.terms import Weight
    from streammerge.adapters.tuners.base import AdapterModule, Layer, Shared
    from streammerge.checkpoint.header import StoredTensor

__all__ = ["TUNERS", "Ia3", "Ia3Settings", "ScaleTerm"]


@dataclass(frozen=True, slots=True)
class Ia3Settings:
    """What a configuration says of the merge."""

    feedforward: str | tuple[str, ...] | None
    """A pattern, or ends of paths, of the layers whose inputs are multiplied; None if not said."""

    def is_feedforward(self, module: str) -> bool | None:
        """Whether a layer's inputs are multiplied; None if it is not said."""
        if self.feedforward is None:
            return None
        if isinstance(self.feedforward, str):
            return re.fullmatch(self.feedforward, module) is not None
        return module.endswith(self.feedforward)


@dataclass(frozen=True, slots=True)
class ScaleTerm(TunerTerm):
    """Multiply the rows or the columns by a vector."""

    vector: StoredTensor
    is_of_rows: bool
    groups: int = 1
    """Of a convolution whose columns are multiplied: each group of rows has its own part of the
    vector.
    """

    @property
    def factors(self) -> tuple[StoredTensor, ...]:
        """The vector."""
        return (self.vector,)

    def work_bytes(self, shape: tuple[int, ...]) -> int:
        """Return what the vector holds when there is a number for each column."""
        return 0 if self.is_of_rows else 8 * self.groups * prod(shape[1:])

    def prepare(self, factors: list[torch.Tensor], weight: Weight) -> Any:
        """Give every row, or every column, its number."""
        (vector,) = factors
        if self.is_of_rows:
            return vector.reshape(-1, 1)
        window = prod(weight.shape[2:])
        return vector.reshape(self.groups, -1).repeat_interleave(window, dim=1), (
            weight.shape[0] // self.groups
        )

    def apply(self, rows: torch.Tensor, begin: int, state: Any) -> torch.Tensor:
        """Multiply these rows."""
        import torch  # noqa: PLC0415 (planning needs no torch)

        end = begin + len(rows)
        if self.is_of_rows:
            scale = state[begin:end]
        else:
            scale, per_group = state
            if self.groups > 1:
                scale = scale[torch.arange(begin, end) // per_group]
        return rows.copy_(rows.to(scale.dtype) * scale)


class Ia3(Tuner):
    """`peft_type: IA3`."""

    peft_type = "IA3"
    title = "IA3"
    formula = "W * l, with the bias where l is of the outputs"
    factors = frozenset({"ia3_l"})
    options = frozenset({"feedforward_modules", "init_ia3_weights"})

    def read(self, options: Options) -> Ia3Settings:
        """Read which layers' inputs are multiplied.

        Raises:
            AdapterError: It is not sound.
        """
        raw = options.get("feedforward_modules")
        if raw is None:
            return Ia3Settings(None)
        if not isinstance(raw, str):
            return Ia3Settings(options.names("feedforward_modules"))
        # a pattern of a file that nobody vouches for, checked like those of ranks
        key = "feedforward_modules"
        _ = Options({key: {raw: 1}}, options.path).pattern(key, whole=True)
        return Ia3Settings(raw)

    def check(self, module: AdapterModule, settings: Ia3Settings) -> None:
        """Check that there is a vector.

        Raises:
            AdapterError: The tensor is something else.
        """
        del settings
        (vector,) = module.need("ia3_l")
        if len(vector.shape) < 2 or 0 in vector.shape or prod(vector.shape) != max(vector.shape):
            raise AdapterError(
                "adapter tensor is no vector",
                where=f"key '{vector.name}' of {vector.path}",
                got=f"shape {vector.shape}",
            )

    def plan(self, layer: Layer, settings: Ia3Settings, shared: Shared) -> list[PlannedTerm]:
        """Plan the product, and that of the bias."""
        del shared
        module = layer.module
        (vector,) = module.need("ia3_l")
        weight = layer.parameters.get("weight")
        if weight is None or len(weight.shape) not in {2, 4, 5}:
            raise layer.mismatch(f"a vector {vector.shape}")
        of_inputs = _is_of_inputs(layer, vector, settings.is_feedforward(module.module))
        groups = 1
        wanted: tuple[int, ...] = (1, layer.in_features) if of_inputs else (layer.out_features, 1)
        if len(weight.shape) > 2:
            channels = weight.shape[0]
            if of_inputs:
                # their number is not stored, but that of one group is
                groups = max(1, vector.shape[1] // weight.shape[1])
                channels = groups * weight.shape[1]
            wanted = (1, channels, *([1] * len(weight.shape[2:])))
        if vector.shape != wanted or weight.shape[0] % groups:
            raise layer.mismatch(f"a vector {vector.shape} where {wanted} fits")
        is_of_rows = of_inputs == layer.is_transposed
        planned = [PlannedTerm("weight", ScaleTerm(vector, is_of_rows, groups))]
        bias = layer.parameters.get("bias")
        if bias is not None and not of_inputs:
            if bias.shape != (layer.out_features,):
                raise layer.mismatch(f"a vector {vector.shape}", parameter="bias")
            planned.append(PlannedTerm("bias", ScaleTerm(vector, is_of_rows=True)))
        return planned

    def describe(self, module: AdapterModule, settings: Ia3Settings) -> dict[str, Any]:
        """Give the vector's shape, and what it multiplies if the configuration says it."""
        (vector,) = module.need("ia3_l")
        described: dict[str, Any] = {"shape": list(vector.shape), "dtype": vector.dtype.value}
        of_inputs = settings.is_feedforward(module.module)
        if of_inputs is not None:
            described["multiplies"] = "inputs" if of_inputs else "outputs"
        return described


TUNERS: tuple[Tuner, ...] = (Ia3(),)


def _is_of_inputs(layer: Layer, vector: StoredTensor, said: bool | None) -> bool:  # noqa: FBT001
    """Find out what a vector is for, if the configuration does not say it.

    Raises:
        PlanError: The shape does not say it either.
    """
    if said is not None:
        return said
    shape = layer.weight.shape
    if len(shape) == 2:
        return vector.shape[0] == 1 and vector.shape[1] == layer.in_features
    if vector.shape[1] not in {shape[0], shape[1]} or shape[0] == shape[1]:
        raise layer.mismatch(
            f"a vector {vector.shape}, of inputs or of outputs",
            hint="adapter_config.json has no feedforward_modules, which would say it",
        )
    return vector.shape[1] == shape[1]
