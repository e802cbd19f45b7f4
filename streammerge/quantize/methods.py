"""What each method does to a group of linears that share their input."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch

from streammerge.codecs.tensors import torch_dtype
from streammerge.quantize.aqlm import AqlmOptions, CodebookInputs, quantize_aqlm
from streammerge.quantize.aqlm_search import CHUNK_VALUES
from streammerge.quantize.awq import Moments, find_scales, quantize_awq
from streammerge.quantize.codebooks import pack_codebooks
from streammerge.quantize.gptq import (
    CHUNK_ROWS,
    Factored,
    GptqOptions,
    Hessian,
    quantize_gptq,
    relative_error,
)
from streammerge.quantize.pack import pack_awq, pack_gptq, unpack_awq
from streammerge.quantize.rtn import quantize_rtn
from streammerge.quantize.scaling import find_previous, takes_scales

if TYPE_CHECKING:
    from collections.abc import Callable

    from streammerge.quantize.linear import Decoded, QuantizedLinear
    from streammerge.quantize.runner import LayerRunner
    from streammerge.quantize.scaling import Previous
    from streammerge.quantize.settings import Method, QuantizeSettings
    from streammerge.quantize.source import MergedSource

__all__ = ["LayerMethod", "method_of"]

# of float16: smaller scales lose bits
_LEAST_NORMAL = 2.0**-14


class LayerMethod(ABC):
    """Quantizes one layer, group by group, in the order of the layer's work."""

    def __init__(
        self,
        runner: LayerRunner,
        settings: QuantizeSettings,
        source: MergedSource,
        name_of: Callable[[str], str],
    ) -> None:
        """Begin a layer.

        Args:
            runner: The layer, whose weights become what their codes stand for.
            settings: How to quantize.
            source: What is stored of the layer unquantized.
            name_of: Gives the checkpoint's name of a module by its path in the layer.
        """
        self.runner, self.settings, self.source, self.name_of = runner, settings, source, name_of
        self.stored: dict[str, torch.Tensor] = {}
        """What the layer has become, by the checkpoint's names."""
        self.errors: dict[str, float] = {}
        """Relative error of each linear's outputs."""
        self.unscaled: list[str] = []
        """Linears whose inputs nothing could scale, where the method would."""

    @abstractmethod
    def quantize(self, group: list[str]) -> None:
        """Quantize the linears of a group."""

    @classmethod
    def work_bytes(cls, settings: QuantizeSettings, rows: int, features: int) -> int:
        """Return what it takes to quantize one linear of (N, K), its weight apart."""
        del settings
        # rounding in chunks; the matrix of inputs is needed for the error
        return 4 * features * features + 3 * rows * features

    def hessian(self, group: list[str], features: int) -> torch.Tensor:
        """Return the matrix of the inputs that a group shares, (K, K) float32."""
        accumulated = Hessian(features)
        for inputs in self.runner.inputs(group[0]):
            accumulated.add(inputs)
        return accumulated.matrix

    def weights(self, group: list[str]) -> dict[str, torch.Tensor]:
        """Return the weights of a group, all (N, K) of one K."""
        return {path: self.runner.weight(path) for path in group}

    def keep(self, path: str, quantized: Decoded, packed: dict[str, torch.Tensor]) -> None:
        """Store a linear, and go on with what its codes stand for."""
        name = self.name_of(path)
        self.stored.update({f"{name}.{end}": tensor for end, tensor in packed.items()})
        weight = self.runner.weight(path)
        weight.copy_(quantized.dequantize(weight.dtype))


class PlainMethod(LayerMethod):
    """GPTQ, and rounding: each linear by itself."""

    @classmethod
    def work_bytes(cls, settings: QuantizeSettings, rows: int, features: int) -> int:
        """Return what it takes to quantize one linear of (N, K), its weight apart."""
        if settings.method == "rtn":
            return super().work_bytes(settings, rows, features)
        # the matrix of inputs, its factor, and rows on their way from one to the other; the weight
        # by input, its permuted copy, its codes
        return 8 * features * features + 8 * CHUNK_ROWS * features + 9 * rows * features

    def quantize(self, group: list[str]) -> None:
        """Quantize the linears of a group."""
        weights = self.weights(group)
        hessian = self.hessian(group, next(iter(weights.values())).shape[1])
        codes_of = self._codes_of(hessian, name=self.name_of(group[0]))
        for path, weight in weights.items():
            quantized = codes_of(weight, self.name_of(path))
            self.errors[self.name_of(path)] = quantized.relative_error
            self.keep(path, quantized, pack_gptq(quantized, self.settings.checkpoint_format))

    def _codes_of(
        self, hessian: torch.Tensor, *, name: str
    ) -> Callable[[torch.Tensor, str], QuantizedLinear]:
        """Return what gives codes to a weight, by its name, that has these inputs."""
        settings = self.settings

        def rounded(weight: torch.Tensor, name: str) -> QuantizedLinear:
            found = quantize_rtn(weight, settings.grid, settings.group_size, name=name)
            found.relative_error = relative_error(weight, found, hessian)
            return found

        if settings.method == "rtn":
            return rounded
        options = GptqOptions(
            settings.grid,
            settings.group_size,
            damp=settings.damp,
            act_order=settings.act_order,
            desc_act=settings.desc_act,
        )
        factored = Factored(hessian, options, name=name)
        return lambda weight, name: quantize_gptq(weight, factored, options, name=name)


class AwqMethod(LayerMethod):
    """AWQ: the operation before a group takes the scales of its inputs."""

    def quantize(self, group: list[str]) -> None:
        """Quantize the linears of a group, and divide the outputs of the operation before them."""
        settings = self.settings
        weights = self.weights(group)
        moments = Moments(next(iter(weights.values())).shape[1])
        for inputs in self.runner.inputs(group[0]):
            moments.add(inputs)
        scales = torch.ones(len(moments.magnitude))
        previous = self._previous(group)
        if previous is None:
            self.unscaled += [self.name_of(path) for path in group]
        else:
            wanted = find_scales(
                list(weights.values()),
                moments,
                settings.grid,
                settings.group_size,
                name=self.name_of(group[0]),
            )
            if not bool((wanted == 1).all()):
                scales = self._divide(previous, wanted)
        done = {
            path: quantize_awq(
                weight,
                scales,
                moments.hessian,
                settings.grid,
                settings.group_size,
                name=self.name_of(path),
            )
            for path, weight in weights.items()
        }
        for path, quantized in done.items():
            self.errors[self.name_of(path)] = quantized.relative_error
            self.keep(path, quantized, pack_awq(quantized))

    def _previous(self, group: list[str]) -> Previous | None:
        """Return the operation that can take the scales of a group."""
        runner = self.runner
        linears = [runner.layer.get_submodule(path) for path in group]
        for previous in find_previous(runner.layer, group):
            is_done = (
                not previous.is_linear or f"{self.name_of(previous.path)}.scales" in self.stored
            )
            if is_done and takes_scales(
                previous, linears, lambda: (runner.states(0), runner.run(0))
            ):
                return previous
        return None

    def _divide(self, previous: Previous, scales: torch.Tensor) -> torch.Tensor:
        """Divide an operation's outputs, in the layer and in what is stored of it.

        Returns:
            (K,) float32: what they have been divided by indeed.
        """
        name = self.name_of(previous.path)
        dtypes = {
            end: torch_dtype(self.source.plan(f"{name}.{end}").dtype)
            for end in ("weight", "bias")
            if f"{name}.{end}" in self.source
        }
        if not previous.is_linear:
            applied = previous.divide(scales, dtypes.__getitem__)
        else:
            ends = ("qweight", "qzeros", "scales")
            quantized = unpack_awq(
                {end: self.stored[f"{name}.{end}"] for end in ends},
                group_size=self.settings.group_size,
            )
            # the codes stay, and their steps become smaller, of which float16 knows no end
            rows = quantized.scales[previous.rows]
            most = (rows.amin(dim=1) / _LEAST_NORMAL).clamp_(min=1.0)
            applied = previous.divide(torch.minimum(scales, most), dtypes.__getitem__)
            rows /= applied[:, None]
            quantized.scales = quantized.scales.half().float()
            self.keep(previous.path, quantized, pack_awq(quantized))
            # fused experts have no tensor of this name
            dtypes.pop("weight", None)
        for end, dtype in dtypes.items():
            value = previous.module.get_parameter(end).data
            self.stored[f"{name}.{end}"] = value.to(dtype)
        return applied


class AqlmMethod(LayerMethod):
    """AQLM: each linear by itself, with codebooks of its own."""

    @classmethod
    def work_bytes(cls, settings: QuantizeSettings, rows: int, features: int) -> int:
        """Return what it takes to quantize one linear of (N, K), its weight apart."""
        books = settings.codebooks
        assert books is not None
        # the matrix of inputs, its factor, and rows on their way from one to the other
        matrices = 8 * features * features + 8 * CHUNK_ROWS * features
        # codes, those before them, and those of rows in the search
        codes = 3 * 4 * books.count * rows * (features // books.group_size)
        # codebooks with what conjugate gradients have besides; chunks of the search and of fits
        return matrices + codes + 12 * 2 * books.table_bytes + 14 * 4 * CHUNK_VALUES

    def quantize(self, group: list[str]) -> None:
        """Quantize the linears of a group."""
        settings, weights = self.settings, self.weights(group)
        assert settings.codebooks is not None
        options = AqlmOptions(settings.codebooks, damp=settings.damp, seed=settings.seed)
        hessian = self.hessian(group, next(iter(weights.values())).shape[1])
        inputs = CodebookInputs(hessian, options, name=self.name_of(group[0]))
        for path, weight in weights.items():
            linear = quantize_aqlm(weight, inputs, options, name=self.name_of(path))
            self.errors[self.name_of(path)] = linear.relative_error
            self.keep(path, linear, pack_codebooks(linear))


_METHODS: dict[Method, type[LayerMethod]] = {
    "gptq": PlainMethod,
    "rtn": PlainMethod,
    "awq": AwqMethod,
    "aqlm": AqlmMethod,
}


def method_of(settings: QuantizeSettings) -> type[LayerMethod]:
    """Return what does a method to a layer."""
    return _METHODS[settings.method]
