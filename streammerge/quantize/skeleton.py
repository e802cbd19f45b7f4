"""The model without its weights: what its layers are, and how they are run one at a time.

transformers builds the model on the meta device from config.json alone. Weights are put into one
decoder layer at a time; everything that the layers need besides (rotary tables, masks) comes from
running the model around recorders that stand in the layers' places.
"""

from __future__ import annotations

import itertools
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from streammerge.errors import UnsupportedError
from streammerge.plan.expert_layout import ExpertLayout
from streammerge.plan.match import NameResolver
from streammerge.plan.slots import Slot
from streammerge.quantize.experts import find_experts
from streammerge.quantize.modules import is_linear, weight_matrix

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from streammerge.plan.ops import TensorPlan
    from streammerge.quantize.experts import ExpertBlock
    from streammerge.quantize.source import MergedSource

__all__ = ["QuantizedModule", "Skeleton", "build_skeleton"]

_OTHER_TOWERS = ("vision", "visual", "audio", "encoder", "image")
# routers decide which experts see a token; codes of theirs would move tokens to other experts
_ROUTERS = ("gate", "router", "shared_expert_gate")


@dataclass(frozen=True, slots=True)
class QuantizedModule:
    """A linear that is quantized."""

    path: str
    """In the model in memory."""
    name: str
    """In the checkpoint, without `.weight`."""
    size: tuple[int, int]
    """N and K."""
    target: str
    """The tensor whose place its codes take, maybe with those of other modules."""


@dataclass(slots=True)
class Skeleton:
    """A model on the meta device."""

    model: Any
    """The transformers model."""
    decoder: Any
    """The module whose children are embedding, layers and norm."""
    layers_name: str
    """Path of the list of layers in the model."""
    layers: torch.nn.ModuleList
    names: dict[str, str]
    """Checkpoint name of each parameter, by its path in memory."""
    hidden_size: int
    blocks: list[list[ExpertBlock]]
    """Experts of each layer."""

    def layer_prefix(self, number: int) -> str:
        """Return the path of a layer, with a full stop at its end."""
        return f"{self.layers_name}.{number}."

    def checkpoint_name(self, path: str) -> str:
        """Return the checkpoint's name of a parameter."""
        return self.names.get(path, path)

    def linears(self, number: int) -> dict[str, str]:
        """Return the linears of a layer that are quantized: checkpoint names of their modules.

        Returns:
            By path within the layer; routers are left alone, and experts are `blocks`.
        """
        return {
            path: self.module_name(number, path)
            for path, module in self.layers[number].named_modules()
            if is_linear(module) and path.rpartition(".")[2] not in _ROUTERS
        }

    def all_linears(self) -> Iterator[QuantizedModule]:
        """Yield the linears of all layers that are quantized."""
        for number, layer in enumerate(self.layers):
            for path, name in self.linears(number).items():
                rows, features = weight_matrix(layer.get_submodule(path)).shape
                full = f"{self.layer_prefix(number)}{path}"
                yield QuantizedModule(full, name, (rows, features), f"{name}.weight")
            for block in self.blocks[number]:
                for expert, projections in enumerate(block.projections):
                    for end, one in projections.items():
                        path = f"{self.layer_prefix(number)}{block.path}.{expert}.{end}"
                        yield QuantizedModule(path, one.name, one.size, one.target)

    def routers(self) -> Iterator[str]:
        """Yield the paths of what sends tokens to experts."""
        for number, layer in enumerate(self.layers):
            for path, module in layer.named_modules():
                weight = getattr(module, "weight", None)
                is_matrix = isinstance(weight, torch.Tensor) and weight.ndim == 2
                if is_matrix and path.rpartition(".")[2] in _ROUTERS:
                    yield f"{self.layer_prefix(number)}{path}"

    def module_name(self, number: int, path: str) -> str:
        """Return the checkpoint's name of a module of a layer, by its path in the layer."""
        full = f"{self.layer_prefix(number)}{path}.weight"
        return self.checkpoint_name(full).removesuffix(".weight")

    def load_layer(
        self, number: int, source: MergedSource, *, dtype: torch.dtype
    ) -> torch.nn.Module:
        """Return a layer with its merged weights; `release` takes them away again.

        Raises:
            UnsupportedError: The checkpoint does not have a parameter of the layer, or in another
                shape.
        """
        layer, prefix = self.layers[number], self.layer_prefix(number)
        state = {}
        for path in layer.state_dict():
            name = self.checkpoint_name(prefix + path)
            if name not in source:
                raise UnsupportedError(
                    "layer cannot be built from the checkpoint",
                    where=f"'{prefix}{path}'",
                    expected=f"a tensor '{name}'",
                    hint="this architecture is not quantized by this version",
                )
            wanted = source.plan(name).dtype.is_mergeable
            state[path] = source.load(name, dtype if wanted else None)
        try:
            layer.load_state_dict(state, assign=True, strict=True)
        except RuntimeError as error:
            raise UnsupportedError(
                "layer of the checkpoint is not what transformers builds from config.json",
                where=f"'{prefix}'",
                got=str(error).splitlines()[-1].strip(),
            ) from error
        layer.requires_grad_(requires_grad=False)
        return layer

    def release(self, number: int) -> None:
        """Take a layer's weights away."""
        buffers = dict(self.layers[number].named_buffers())
        self.layers[number].to("meta")
        _set_buffers(self.layers[number], buffers)


def build_skeleton(
    folder: Path,
    *,
    config_edits: Mapping[str, Any],
    tensors: Mapping[str, TensorPlan],
    is_for_codes: bool = True,
) -> Skeleton:
    """Build the model of a checkpoint on the meta device.

    Args:
        folder: The base checkpoint, for its config.json.
        config_edits: What the merge changes in it; nested maps for nested sections.
        tensors: What is planned for the merged checkpoint's tensors, by their names.
        is_for_codes: Whether the layers are to be quantized, and not only run.

    Raises:
        UnsupportedError: transformers has no such model, or its layers cannot be quantized one
            after the other.
    """
    import transformers  # noqa: PLC0415 (two seconds)

    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    for key, value in config_edits.items():
        if isinstance(value, dict) and hasattr(getattr(config, key, None), "to_dict"):
            for inner, inner_value in value.items():
                setattr(getattr(config, key), inner, inner_value)
        else:
            setattr(config, key, value)
    cls = _model_class(config, folder)
    _check_kind(config, folder)
    # not what the machine has: the codes depend on it
    config._attn_implementation = "sdpa" if cls._supports_sdpa else "eager"  # noqa: SLF001
    config.use_cache = False
    with _parameters_on_meta():
        model = cls(config)
    model.eval()
    text = config.get_text_config()
    layers_name, layers = _find_layers(model, int(text.num_hidden_layers), folder)
    found, converted = _names(model, list(tensors))
    slots = {name: Slot(tensor.source, tensor.dtype) for name, tensor in tensors.items()}
    stored = ExpertLayout(NameResolver(frozenset(slots), found), slots, config.to_dict())
    blocks = [
        list(find_experts(layer, f"{layers_name}.{number}.", stored))
        for number, layer in enumerate(layers)
    ]
    for block in itertools.chain.from_iterable(blocks):
        block.install()
    if is_for_codes:
        experts = {
            f"{layers_name}.{number}.{block.path}."
            for number, found_blocks in enumerate(blocks)
            for block in found_blocks
        }
        converted = [path for path in converted if not path.startswith(tuple(experts))]
        _check_layers(layers_name, layers, converted, folder)
    parent = layers_name.rpartition(".")[0]
    decoder = model.get_submodule(parent) if parent else model
    return Skeleton(model, decoder, layers_name, layers, found, int(text.hidden_size), blocks)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Let modules have their buffers, which are small and computed, but no weights.

    What is allocated for a weight is let go before anything is written to it.
    """
    register = torch.nn.Module.register_parameter

    def register_empty(self: torch.nn.Module, name: str, param: torch.nn.Parameter | None) -> None:
        if param is not None and param.device.type != "meta":
            param = torch.nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
        register(self, name, param)

    torch.nn.Module.register_parameter = register_empty  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.nn.Module.register_parameter = register  # type: ignore[method-assign]


def _check_kind(config: Any, folder: Path) -> None:
    """Refuse models whose layers are not all a decoder's."""
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedError(
            "encoders with a decoder are not quantized by this version",
            where=folder / "config.json",
            got=f"architectures {config.architectures!r}",
            hint="remove the export_quantization keys to export in 16 bit",
        )


def _check_layers(
    layers_name: str, layers: torch.nn.ModuleList, converted: Sequence[str], folder: Path
) -> None:
    """Refuse layers with weights that would be left out of the codes, or that are stored otherwise.

    Raises:
        UnsupportedError: They hold what is neither a linear nor known experts.
    """
    kind = None
    modules = [module for layer in layers for module in layer.modules()]
    stacked = [module for module in modules if _is_stacked(module)]
    if stacked:
        kind = f"layers with parameters of several matrices ({type(stacked[0]).__name__})"
    elif any(name.startswith(f"{layers_name}.") for name in converted):
        kind = "layers whose weights transformers converts on loading"
    elif not any(is_linear(module) for module in modules):
        kind = "layers without linears"
    if kind is not None:
        raise UnsupportedError(
            f"{kind} are not quantized by this version",
            where=folder,
            hint="remove the export_quantization keys to export in 16 bit",
        )


def _is_stacked(module: torch.nn.Module) -> bool:
    """Whether a module has matrices one upon the other, as experts are kept."""
    if isinstance(module, torch.nn.Conv1d | torch.nn.Conv2d | torch.nn.Conv3d):
        return False
    return any(parameter.ndim == 3 for parameter in module.parameters(recurse=False))


def _model_class(config: Any, folder: Path) -> Any:
    import transformers  # noqa: PLC0415 (two seconds)

    for name in config.architectures or []:
        cls = getattr(transformers, name, None)
        if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel):
            return cls
    raise UnsupportedError(
        "architecture is not known to the installed transformers",
        where=folder / "config.json",
        got=f"architectures {config.architectures!r}",
        hint="quantization runs transformers' own model; install a version that has it",
    )


def _find_layers(model: Any, count: int, folder: Path) -> tuple[str, torch.nn.ModuleList]:
    """Find the language model's list of decoder layers."""
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList)
        and len(module) == count
        and not any(tower in name for tower in _OTHER_TOWERS)
        and any(is_linear(inner) for inner in module[0].modules())
    ]
    # the outermost: a layer may hold lists of as many experts
    outermost = [one for one in found if not any(one[0].startswith(f"{o[0]}.") for o in found)]
    if len(outermost) != 1:
        raise UnsupportedError(
            "model has no single list of decoder layers",
            where=folder / "config.json",
            expected=f"a list of {count} layers",
            got=", ".join(name for name, _ in outermost) or "none",
            hint="this architecture is not quantized by this version",
        )
    return outermost[0]


def _set_buffers(module: torch.nn.Module, values: Mapping[str, torch.Tensor]) -> None:
    for path, value in values.items():
        if value.device.type == "meta":
            continue
        parent, _, name = path.rpartition(".")
        module.get_submodule(parent)._buffers[name] = value  # noqa: SLF001 (keeps it a buffer)


def _names(model: Any, names: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Map the paths of parameters to the checkpoint's names, where they differ.

    Returns:
        The map, and the paths of parameters that are not in the checkpoint as they are in memory.
    """
    from transformers import conversion_mapping, core_model_loading  # noqa: PLC0415

    steps: list[Any] = conversion_mapping.get_model_conversion_mapping(model)
    renamings = [s for s in steps if isinstance(s, core_model_loading.WeightRenaming)]
    converters = [s for s in steps if isinstance(s, core_model_loading.WeightConverter)]
    state = model.state_dict()
    found = {}
    converted = []
    for name in names:
        path, pattern = core_model_loading.rename_source_key(
            name, renamings, converters, model.base_model_prefix, state
        )
        if pattern is not None:
            converted.append(path)
        elif path != name:
            found[path] = name
    return found, converted
