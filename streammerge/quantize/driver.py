"""Quantize a model one decoder layer at a time, its weights merged on the way.

For each layer: load its merged weights, run the calibration samples up to each group of linears
that share an input, accumulate what the method needs of it, quantize the group, put what the codes
stand for in its place, and go on to the next group; then run the samples through the quantized
layer, whose outputs are the next layer's inputs. What a layer became is one file of the work
folder. A rerun starts at the first layer that has none.

In memory: one layer, the matrices of one group, one sample's hidden states.
"""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from streammerge.backends.torch_factors import torch_dtype
from streammerge.checkpoint.header import read_header
from streammerge.errors import QuantizationError
from streammerge.quantize.around import Embedding, Reached, Recorders
from streammerge.quantize.awq import Moments, find_scales, quantize_awq
from streammerge.quantize.gptq import GptqOptions, Hessian, quantize_gptq, relative_error
from streammerge.quantize.hidden import HiddenStates
from streammerge.quantize.pack import pack_awq, pack_gptq, unpack_awq
from streammerge.quantize.rtn import quantize_rtn
from streammerge.quantize.scaling import find_previous, takes_scales

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator
    from pathlib import Path

    from streammerge.quantize.linear import QuantizedLinear
    from streammerge.quantize.scaling import Previous
    from streammerge.quantize.settings import QuantizeSettings
    from streammerge.quantize.skeleton import Skeleton
    from streammerge.quantize.source import MergedSource

__all__ = ["Driver", "LayerReport", "layer_file"]

_REPORT = "report"
# of float16: smaller scales lose bits
_LEAST_NORMAL = 2.0**-14


@dataclass(frozen=True, slots=True)
class LayerReport:
    """What a layer became."""

    layer: int
    seconds: float
    errors: dict[str, float]
    """Relative error of each linear's outputs on the calibration samples."""
    unscaled: list[str] = field(default_factory=list)
    """Linears that AWQ could only clip: no operation before them takes their inputs' scales."""


def layer_file(folder: Path, layer: int) -> Path:
    """Return the file that holds what a layer became."""
    return folder / f"layer-{layer:05d}.safetensors"


@dataclass(slots=True)
class Driver:
    """One run over the layers of a model."""

    skeleton: Skeleton
    source: MergedSource
    settings: QuantizeSettings
    samples: torch.Tensor
    """(samples, tokens) int64: token ids."""
    folder: Path
    """The work folder; belongs to this plan and these settings alone."""
    finished: Collection[str] = ()
    """Names of the layer files that a run before this one has finished."""
    on_layer: Callable[[Path], None] = lambda _: None
    """Told the file of each finished layer, which is durable."""
    dtype: torch.dtype = torch.float32
    """What layers compute in."""
    _keywords: list[dict[str, Any]] = field(default_factory=list)
    _names: dict[str, str] = field(default_factory=dict)

    @torch.no_grad()
    def run(self) -> list[LayerReport]:
        """Quantize every layer that has no file yet, and report on all of them.

        Raises:
            StreamMergeError: A layer cannot be built or quantized; finished ones are kept.
        """
        count = len(self.skeleton.layers)
        reports = self._reports(count)
        if len(reports) == count:
            return reports
        shape = (len(self.samples), self.samples.shape[1], self.skeleton.hidden_size)
        are_there = HiddenStates.are_there(self.folder, shape=shape, itemsize=self.dtype.itemsize)
        if not are_there or len(reports) != len(self.finished):
            # the states are those behind the last finished layer: none else can go on from them
            reports = []
        states = HiddenStates(self.folder, shape=shape, dtype=self.dtype)
        try:
            self._enter(states, writes=not reports)
            for number in range(len(reports), count):
                reports.append(self._layer(number, states))
                self.on_layer(layer_file(self.folder, number))
        finally:
            states.close()
        states.remove()
        return reports

    def _reports(self, count: int) -> list[LayerReport]:
        """Return what is known of the finished layers, up to the first that is not."""
        reports = []
        for number in range(count):
            path = layer_file(self.folder, number)
            if path.name not in self.finished:
                break
            reports.append(LayerReport(**json.loads(read_header(path)[1][_REPORT])))
        return reports

    # before the first layer

    def _enter(self, states: HiddenStates, *, writes: bool) -> None:
        """Find what each layer is called with, and the states before the first."""
        recorders = Recorders(self.skeleton)
        with recorders, Embedding(self.skeleton, self.source, self.samples, self.dtype):
            for number in range(states.samples if writes else 1):
                recorders.run(self.samples[number : number + 1])
                if writes:
                    states.write(0, number, recorders.first_input())
        if writes:
            states.flush(0)
        self._keywords = recorders.keywords

    # one layer

    def _layer(self, number: int, states: HiddenStates) -> LayerReport:
        started = time.perf_counter()
        layer = self.skeleton.load_layer(number, self.source, dtype=self.dtype)
        runner = _LayerRunner(layer, self._keywords[number], states, number)
        names = self._names = self.skeleton.linears(number)
        stored: dict[str, torch.Tensor] = {}
        errors, unscaled = {}, []
        is_awq = self.settings.method == "awq"
        groups = runner.groups(names)
        self._check_groups(groups, names)
        for group in groups:
            if is_awq:
                done, is_scaled = self._quantize_awq(runner, group, number, stored)
                unscaled += [] if is_scaled else [names[path] for path in group]
            else:
                done = self._quantize(runner, group)
            for path, quantized in done.items():
                if is_awq:
                    packed = pack_awq(quantized)
                else:
                    packed = pack_gptq(quantized, self.settings.checkpoint_format)
                stored.update({f"{names[path]}.{end}": t for end, t in packed.items()})
                errors[names[path]] = quantized.relative_error
                runner.weight(path).copy_(quantized.dequantize(self.dtype))
        for sample in range(states.samples):
            states.write(number + 1, sample, runner.run(sample))
        states.flush(number + 1)
        report = LayerReport(number, time.perf_counter() - started, errors, unscaled)
        self._save(number, stored, report)
        self.skeleton.release(number)
        return report

    @staticmethod
    def _check_groups(groups: list[list[str]], names: dict[str, str]) -> None:
        """Make sure that each linear gets codes, once."""
        met = [path for group in groups for path in group]
        for path, name in names.items():
            if met.count(path) != 1:
                raise QuantizationError(
                    "linear does not see each sample once",
                    where=f"'{name}'",
                    got=f"{met.count(path)} times",
                    hint="this architecture is not quantized by this version",
                )

    def _quantize(self, runner: _LayerRunner, group: list[str]) -> dict[str, QuantizedLinear]:
        """Quantize the linears of one group, which share their input."""
        settings = self.settings
        weights = {path: runner.weight(path) for path in group}
        hessian = Hessian(next(iter(weights.values())).shape[1])
        for inputs in runner.inputs(group[0]):
            hessian.add(inputs)
        done = {}
        for path, weight in weights.items():
            if settings.method == "rtn":
                done[path] = quantize_rtn(
                    weight, settings.grid, settings.group_size, name=self._names[path]
                )
                done[path].relative_error = relative_error(weight, done[path], hessian.matrix)
                continue
            options = GptqOptions(
                settings.grid,
                settings.group_size,
                damp=settings.damp,
                act_order=settings.act_order,
                desc_act=settings.desc_act,
            )
            done[path] = quantize_gptq(weight, hessian.matrix, options, name=self._names[path])
        return done

    def _quantize_awq(
        self, runner: _LayerRunner, group: list[str], number: int, stored: dict[str, torch.Tensor]
    ) -> tuple[dict[str, QuantizedLinear], bool]:
        """Quantize the linears of one group, and let the operation before them take the scales.

        Returns:
            The linears, and whether there is such an operation.
        """
        settings = self.settings
        weights = {path: runner.weight(path) for path in group}
        moments = Moments(next(iter(weights.values())).shape[1])
        for inputs in runner.inputs(group[0]):
            moments.add(inputs)
        previous = self._previous(runner, group, number, stored)
        scales = torch.ones(len(moments.magnitude))
        if previous is not None:
            wanted = find_scales(
                list(weights.values()),
                moments,
                settings.grid,
                settings.group_size,
                name=self._stored_name(number, group[0]),
            )
            if not bool((wanted == 1).all()):
                scales = self._divide(runner, previous, wanted, number, stored)
        done = {
            path: quantize_awq(
                weight,
                scales,
                moments.hessian,
                settings.grid,
                settings.group_size,
                name=self._stored_name(number, path),
            )
            for path, weight in weights.items()
        }
        return done, previous is not None

    def _previous(
        self, runner: _LayerRunner, group: list[str], number: int, stored: dict[str, torch.Tensor]
    ) -> Previous | None:
        """Return the operation that can take the scales of a group."""
        linears = [runner.layer.get_submodule(path) for path in group]
        for previous in find_previous(runner.layer, group):
            name = self._stored_name(number, previous.path)
            is_done = not previous.is_linear or f"{name}.scales" in stored
            if is_done and takes_scales(
                previous, linears, lambda: (runner.states(0), runner.run(0))
            ):
                return previous
        return None

    def _divide(
        self,
        runner: _LayerRunner,
        previous: Previous,
        scales: torch.Tensor,
        number: int,
        stored: dict[str, torch.Tensor],
    ) -> torch.Tensor:
        """Divide an operation's outputs, in the layer and in what is stored of it.

        Returns:
            (K,) float32: what they have been divided by indeed.
        """
        name = self._stored_name(number, previous.path)
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
                {end: stored[f"{name}.{end}"] for end in ends},
                group_size=self.settings.group_size,
            )
            # the codes stay, and their steps become smaller, of which float16 knows no end
            rows = quantized.scales[previous.rows]
            most = (rows.amin(dim=1) / _LEAST_NORMAL).clamp_(min=1.0)
            applied = previous.divide(torch.minimum(scales, most), dtypes.__getitem__)
            rows /= applied[:, None]
            quantized.scales = quantized.scales.half().float()
            stored.update({f"{name}.{end}": t for end, t in pack_awq(quantized).items()})
            runner.weight(previous.path).copy_(quantized.dequantize(self.dtype))
            del dtypes["weight"]
        for end, dtype in dtypes.items():
            value = previous.module.get_parameter(end).data
            stored[f"{name}.{end}"] = value.to(dtype)
        return applied

    def _stored_name(self, number: int, path: str) -> str:
        """Return the checkpoint's name of a module of a layer."""
        full = f"{self.skeleton.layer_prefix(number)}{path}.weight"
        return self.skeleton.checkpoint_name(full).removesuffix(".weight")

    def _save(self, number: int, tensors: dict[str, torch.Tensor], report: LayerReport) -> None:
        path = layer_file(self.folder, number)
        partial = path.with_suffix(".partial")
        save_file(tensors, partial, metadata={_REPORT: json.dumps(asdict(report))})
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)


class _LayerRunner:
    """Runs the calibration samples through one layer, or up to a linear of it."""

    def __init__(
        self, layer: torch.nn.Module, keywords: dict[str, Any], states: HiddenStates, number: int
    ) -> None:
        self.layer = layer
        self._keywords = keywords
        self._states = states
        self._number = number

    def weight(self, path: str) -> torch.Tensor:
        """Return the weight of a linear, (N, K)."""
        weight = self.layer.get_submodule(path).weight
        assert isinstance(weight, torch.Tensor)
        return weight.data

    def states(self, sample: int) -> torch.Tensor:
        """Return the layer's input for a sample, (1, tokens, hidden)."""
        return self._states.read(self._number, sample)

    def run(self, sample: int) -> torch.Tensor:
        """Return the layer's output for a sample, (1, tokens, hidden)."""
        output = self.layer(self._states.read(self._number, sample), **self._keywords)
        states: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return states

    def inputs(self, path: str) -> Iterator[torch.Tensor]:
        """Yield the input of a linear for each sample."""
        for sample in range(self._states.samples):
            yield self._input(path, sample)

    def groups(self, names: dict[str, str]) -> list[list[str]]:
        """Return the linears that share an input, group by group in the order of the layer's work.

        Linears that no sample reaches are not among them.
        """
        seen: list[tuple[int, tuple[int, ...], str]] = []
        hooks = []
        for path in names:

            def note(_: object, arguments: tuple[torch.Tensor, ...], path: str = path) -> None:
                # kept alive, so that no other tensor gets its address
                kept.append(arguments[0])
                seen.append((arguments[0].data_ptr(), tuple(arguments[0].shape), path))

            hooks.append(self.layer.get_submodule(path).register_forward_pre_hook(note))
        kept: list[torch.Tensor] = []
        try:
            self.run(0)
        finally:
            for hook in hooks:
                hook.remove()
        groups: list[list[str]] = []
        last: tuple[int, tuple[int, ...]] | None = None
        for pointer, shape, path in seen:
            if (pointer, shape) != last:
                groups.append([])
                last = (pointer, shape)
            groups[-1].append(path)
        return groups

    def _input(self, path: str, sample: int) -> torch.Tensor:
        found: list[torch.Tensor] = []

        def take(_: object, arguments: tuple[torch.Tensor, ...]) -> None:
            found.append(arguments[0])
            raise Reached

        hook = self.layer.get_submodule(path).register_forward_pre_hook(take)
        try:
            with suppress(Reached):
                self.run(sample)
        finally:
            hook.remove()
        return found[0]
