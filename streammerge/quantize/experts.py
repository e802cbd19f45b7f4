"""The experts of a layer, one at a time.

transformers has all experts of a layer in one module with fused parameters (E, ...), which is
called with tokens, the experts that each goes to, and how much each counts:

    y_t = sum_j weight[t, j] * expert[index[t, j]](x_t)

Here the module has no parameters. What it is called with goes to a file; then each expert is
loaded, quantized if that is wanted, and run over its tokens; from then on the module gives the sums
back. In memory: one expert, and some thousand of its tokens.

An expert that few tokens go to would leave its matrix of inputs without full rank. It is shown
others of the layer's tokens besides, until there are as many as it has inputs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from streammerge.errors import UnsupportedError
from streammerge.quantize.around import Reached
from streammerge.quantize.runner import LayerRunner
from streammerge.quantize.spill import SpilledRows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from streammerge.plan.expert_layout import ExpertLayout, Piece
    from streammerge.quantize.source import MergedSource

__all__ = ["ExpertBlock", "Projection", "find_experts"]

# of one expert, at a time
CHUNK_TOKENS = 4096


@dataclass(frozen=True, slots=True)
class Projection:
    """One linear of one expert."""

    name: str
    """Of the module in a checkpoint that has each expert's linears by themselves."""
    size: tuple[int, int]
    """N and K."""
    target: str
    """The tensor that holds it."""
    part: int | None
    """Which matrix of a fused tensor; None if the tensor is a matrix."""
    rows: slice
    """Which outputs of that matrix are its own."""
    is_turned: bool
    """Whether the matrix is stored as (inputs, outputs)."""


class _Expert(torch.nn.Module):
    """One expert, its linears by themselves."""

    def __init__(self, experts: Any, weights: dict[str, torch.Tensor]) -> None:
        super().__init__()
        # not a submodule of this one
        self._activate = experts._apply_gate if experts.has_gate else experts.act_fn  # noqa: SLF001
        self._is_concatenated = bool(experts.is_concatenated)
        for name, weight in weights.items():
            linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            linear.weight = torch.nn.Parameter(weight, requires_grad=False)
            self.add_module(name, linear)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        linears: dict[str, torch.nn.Module] = dict(self.named_children())
        up = linears["up_proj"](tokens)
        if "gate_proj" in linears:
            gate = linears["gate_proj"](tokens)
            if self._is_concatenated:
                up = torch.cat([gate, up], dim=-1)
            else:
                up = torch.stack([gate, up], dim=-1).flatten(-2)
        output: torch.Tensor = linears["down_proj"](self._activate(up))
        return output


class _Tokens:
    """Rows of a file in the place of a layer's hidden states: each chunk is a sample."""

    def __init__(self, rows: SpilledRows, indices: torch.Tensor) -> None:
        self._rows = rows
        self._chunks = torch.split(indices, CHUNK_TOKENS)

    @property
    def samples(self) -> int:
        return len(self._chunks)

    def read(self, _: int, sample: int) -> torch.Tensor:
        return self._rows.read(self._chunks[sample])


@dataclass(slots=True)
class ExpertBlock:
    """The experts of one layer."""

    path: str
    """Of their module in the layer."""
    module: Any
    """transformers' module, without its parameters."""
    projections: list[dict[str, Projection]]
    """By expert and name: `gate_proj`, if there is one, `up_proj`, `down_proj`."""
    sample: int = 0
    """Which sample the layer is run with."""
    _inputs: SpilledRows | None = None
    _outputs: SpilledRows | None = None
    _routes: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    _is_done: bool = False

    @property
    def features(self) -> int:
        """Inputs of the widest of an expert's linears."""
        return max(projection.size[1] for projection in self.projections[0].values())

    def install(self) -> None:
        """Take the module's place when it is called."""
        for name in list(self.module._parameters):  # noqa: SLF001 (there is no other way)
            delattr(self.module, name)
        self.module.forward = self._forward

    def _forward(self, *arguments: Any, **keywords: Any) -> torch.Tensor:
        hidden, index, weights = [*arguments, *keywords.values()][:3]
        if self._is_done:
            tokens = hidden.numel() // hidden.shape[-1]
            places = torch.arange(self.sample * tokens, (self.sample + 1) * tokens)
            assert self._outputs is not None
            return self._outputs.read(places).to(hidden.dtype).view(hidden.shape)
        if self._inputs is None:
            return torch.zeros_like(hidden)
        flat = hidden.reshape(-1, hidden.shape[-1])
        self._inputs.write(self.sample * len(flat), flat)
        self._routes.append((index.reshape(len(flat), -1), weights.reshape(len(flat), -1)))
        raise Reached

    def run(
        self,
        runner: LayerRunner,
        source: MergedSource,
        folder: Path,
        *,
        visit: Callable[[int, LayerRunner], None] | None = None,
    ) -> dict[int, int]:
        """Run every expert over the tokens that go to it; the module then knows its outputs.

        Args:
            runner: The layer, all of which that comes before its experts is as it is to be.
            source: Gives the experts' weights.
            folder: For temporary files.
            visit: Told each expert, and what runs it over its tokens, before its outputs count.

        Returns:
            Of each expert that fewer tokens went to than it has inputs: how many.
        """
        columns = next(iter(self.projections[0].values())).size[1]
        self._inputs = SpilledRows(
            folder / f"{self.path}.inputs", columns=columns, dtype=runner.dtype
        )
        self._outputs = SpilledRows(
            folder / f"{self.path}.outputs", columns=columns, dtype=torch.float32
        )
        for sample in range(runner.samples):
            runner.reach(sample)
        index, weights = (torch.cat(parts) for parts in zip(*self._routes, strict=True))
        self._outputs.resize(len(index))
        few = {}
        for number in range(len(self.projections)):
            tokens, places = torch.where(index == number)
            if len(tokens) < self.features:
                few[number] = len(tokens)
            expert = self._load(number, source, runner.dtype)
            if visit is not None:
                seen = _fill(tokens, len(index), self.features)
                visit(number, LayerRunner(expert, {}, _Tokens(self._inputs, seen), 0))
            for begin in range(0, len(tokens), CHUNK_TOKENS):
                part = slice(begin, begin + CHUNK_TOKENS)
                output = expert(self._inputs.read(tokens[part])).to(torch.float32)
                share = weights[tokens[part], places[part], None].to(torch.float32)
                self._outputs.add(tokens[part], output * share)
        self._is_done = True
        return few

    def close(self) -> None:
        """Forget the tokens."""
        for rows in (self._inputs, self._outputs):
            if rows is not None:
                rows.close()
        self._inputs = self._outputs = None
        self._routes.clear()
        self._is_done = False

    def _load(self, number: int, source: MergedSource, dtype: torch.dtype) -> _Expert:
        weights = {}
        matrices: dict[tuple[str, int | None], torch.Tensor] = {}
        for name, projection in self.projections[number].items():
            key = projection.target, projection.part
            if key not in matrices:
                matrices[key] = source.load(projection.target, dtype, part=projection.part)
            matrix = matrices[key].T if projection.is_turned else matrices[key]
            weight = matrix[projection.rows]
            if weight.shape != projection.size:
                raise UnsupportedError(
                    "expert of the checkpoint is not what transformers builds from config.json",
                    where=f"'{projection.name}'",
                    expected=projection.size,
                    got=tuple(weight.shape),
                )
            weights[name] = weight.contiguous()
        return _Expert(self.module, weights)


def _fill(tokens: torch.Tensor, count: int, wanted: int) -> torch.Tensor:
    """Return tokens, and others evenly from all of `count` if they are fewer than `wanted`."""
    missing = min(wanted, count) - len(tokens)
    if missing <= 0:
        return tokens
    is_other = torch.ones(count, dtype=torch.bool)
    is_other[tokens] = False
    others = is_other.nonzero()[:, 0]
    picked = others[torch.arange(missing) * len(others) // missing]
    return torch.cat([tokens, picked]).sort().values


def find_experts(
    layer: torch.nn.Module, prefix: str, stored: ExpertLayout
) -> Iterator[ExpertBlock]:
    """Find the experts of a layer.

    Args:
        layer: On the meta device, with all of its parameters.
        prefix: Path of the layer, with a full stop at its end.
        stored: Where the checkpoint has their parameters.

    Raises:
        UnsupportedError: They compute what is not known here, or the checkpoint does not have them.
    """
    for path, module in layer.named_modules():
        if not _is_fused(module):
            continue
        where = f"'{prefix}{path}', {type(module).__name__}"
        if not hasattr(module, "is_concatenated"):
            raise _refusal("experts that transformers does not describe", where)
        if module.has_bias or getattr(module, "has_post_expert_norm", False):
            raise _refusal("experts with biases or norms of their own", where)
        experts: list[dict[str, Projection]] = []
        for name, parameter in module.named_parameters(recurse=False):
            found = stored.find(f"{prefix}{path}", name)
            if found is None:
                raise UnsupportedError(
                    "experts are not found in the checkpoint",
                    where=f"'{prefix}{path}.{name}'",
                    hint="this architecture is not quantized by this version",
                )
            experts = experts or [{} for _ in range(parameter.shape[0])]
            if found.experts != len(experts):
                raise UnsupportedError(
                    "checkpoint has other experts than config.json says",
                    where=where,
                    expected=len(experts),
                    got=found.experts,
                )
            for piece in found.pieces:
                is_half = len(found.pieces) == 2 * len(experts)
                experts[piece.expert].update(
                    _projections(module, name, parameter, piece, is_half=is_half)
                )
        order = ("gate_proj", "up_proj", "down_proj")
        experts = [{name: one[name] for name in order if name in one} for one in experts]
        yield ExpertBlock(path, module, experts)


def _is_fused(module: torch.nn.Module) -> bool:
    names = [name for name, _ in module.named_parameters(recurse=False)]
    return "down_proj" in names and bool({"gate_up_proj", "up_proj"} & set(names))


def _projections(
    module: Any, name: str, parameter: torch.Tensor, piece: Piece, *, is_half: bool
) -> Iterator[tuple[str, Projection]]:
    """Yield the linears that a piece of a parameter holds; half of it is gate or up."""
    outputs, inputs = parameter.shape[1:]
    if module.is_transposed:
        outputs, inputs = inputs, outputs
    is_apart = piece.region is None
    is_turned = not is_apart and piece.is_transposed != module.is_transposed
    part = None if is_apart else piece.expert

    def projection(own: str, count: int, rows: slice) -> tuple[str, Projection]:
        named = _module_name(piece, own)
        return own, Projection(named, (count, inputs), piece.target, part, rows, is_turned)

    if name != "gate_up_proj":
        yield projection(name, outputs, slice(None))
        return
    half = outputs // 2
    if is_half:
        own = "gate_proj" if piece.rows.start == 0 else "up_proj"
        yield projection(own, half, slice(None))
    elif module.is_concatenated:
        yield projection("gate_proj", half, slice(None, half))
        yield projection("up_proj", half, slice(half, None))
    else:
        yield projection("gate_proj", half, slice(0, None, 2))
        yield projection("up_proj", half, slice(1, None, 2))


def _module_name(piece: Piece, projection: str) -> str:
    """Return what a linear is called where each expert has its own."""
    stored = piece.target.removesuffix(".weight")
    if piece.region is None:
        return stored
    container = stored.rpartition(".")[0]
    experts = container if container.endswith("experts") else f"{container}.experts"
    return f"{experts}.{piece.expert}.{projection}"


def _refusal(kind: str, where: str) -> UnsupportedError:
    return UnsupportedError(
        f"{kind} are not quantized by this version",
        where=where,
        hint="remove the export_quantization keys to export in 16 bit",
    )
