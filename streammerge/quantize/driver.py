"""Quantize a model one decoder layer at a time, its weights merged on the way.

For each layer: load its merged weights, run the calibration samples up to each group of linears
that share an input, accumulate what the method needs of it, quantize the group, put what the codes
stand for in its place, and go on to the next group; then run the samples through the quantized
layer, whose outputs are the next layer's inputs. What a layer became is one file of the work
folder. A rerun starts at the first layer that has none.

In memory: one layer without its experts, or one expert; the matrices of one group; one sample's
hidden states.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from streammerge.checkpoint.header import read_header
from streammerge.errors import QuantizationError
from streammerge.quantize.around import Embedding, Recorders
from streammerge.quantize.hidden import HiddenStates
from streammerge.quantize.methods import method_of
from streammerge.quantize.runner import LayerRunner

if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from pathlib import Path

    from streammerge.quantize.experts import ExpertBlock
    from streammerge.quantize.methods import LayerMethod
    from streammerge.quantize.settings import QuantizeSettings
    from streammerge.quantize.skeleton import Skeleton
    from streammerge.quantize.source import MergedSource

__all__ = ["Driver", "LayerReport", "layer_file"]

_REPORT = "report"


@dataclass(frozen=True, slots=True)
class LayerReport:
    """What a layer became."""

    layer: int
    seconds: float
    errors: dict[str, float]
    """Relative error of each linear's outputs on the calibration samples."""
    unscaled: list[str] = field(default_factory=list)
    """Linears that AWQ could only clip: no operation before them takes their inputs' scales."""
    few_tokens: dict[str, int] = field(default_factory=dict)
    """Tokens that went to an expert, by its path, where they were fewer than its inputs."""


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
        blocks = self.skeleton.blocks[number]
        runner = LayerRunner(layer, self._keywords[number], states, number, blocks)
        names = self.skeleton.linears(number)
        steps = runner.steps(names)
        self._check_steps(steps, names)
        method = self._method(runner, lambda path: self.skeleton.module_name(number, path))
        few: dict[str, int] = {}
        for step in steps:
            if isinstance(step, list):
                method.quantize(step)
            else:
                few |= self._experts(step, runner, method)
        runner.advance(states)
        for block in blocks:
            block.close()
        states.flush(number + 1)
        seconds = time.perf_counter() - started
        report = LayerReport(number, seconds, method.errors, method.unscaled, few)
        self._save(number, method.stored, report)
        self.skeleton.release(number)
        return report

    def _method(self, runner: LayerRunner, name_of: Callable[[str], str]) -> LayerMethod:
        return method_of(self.settings)(runner, self.settings, self.source, name_of)

    def _experts(
        self, block: ExpertBlock, runner: LayerRunner, layer: LayerMethod
    ) -> dict[str, int]:
        """Quantize experts; add what they become to what the layer does.

        Returns:
            How many tokens went to those that few went to, by their paths.
        """

        def visit(number: int, one: LayerRunner) -> None:
            projections = block.projections[number]
            method = self._method(one, lambda path: projections[path].name)
            for group in one.steps(dict.fromkeys(projections, "")):
                assert isinstance(group, list)
                method.quantize(group)
            layer.stored |= method.stored
            layer.errors |= method.errors
            layer.unscaled += method.unscaled

        few = block.run(runner, self.source, self.folder, visit=visit)
        return {f"{block.path}.{number}": tokens for number, tokens in few.items()}

    @staticmethod
    def _check_steps(steps: list[list[str] | ExpertBlock], names: dict[str, str]) -> None:
        """Make sure that each linear gets codes, once."""
        met = [path for step in steps if isinstance(step, list) for path in step]
        for path, name in names.items():
            if met.count(path) != 1:
                raise QuantizationError(
                    "linear does not see each sample once",
                    where=f"'{name}'",
                    got=f"{met.count(path)} times",
                    hint="this architecture is not quantized by this version",
                )

    def _save(self, number: int, tensors: dict[str, torch.Tensor], report: LayerReport) -> None:
        path = layer_file(self.folder, number)
        partial = path.with_suffix(".partial")
        save_file(tensors, partial, metadata={_REPORT: json.dumps(asdict(report))})
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
