"""What every family of adapters tells about itself: the protocol of this package.

A family is one module here with one or more `Tuner`s in its `TUNERS`, and `TunerTerm`s that do the
arithmetic if LoRA's terms do not serve. Nothing else has to know of it.

Shapes: N out_features, K in_features, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar

from streammerge.errors import AdapterError, PlanError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from streammerge.adapters.options import Options
    from streammerge.adapters.terms import Term
    from streammerge.checkpoint.header import StoredTensor
    from streammerge.dtypes import Dtype

__all__ = ["AdapterModule", "Layer", "Parameter", "PlannedTerm", "Shared", "Tuner"]

# the modules whose sizes a tokenizer decides
_OVER_VOCABULARY = frozenset({"embed_tokens", "wte", "embed_in", "lm_head", "embed_out"})


@dataclass(frozen=True, slots=True)
class AdapterModule:
    """What an adapter file holds of one module."""

    module: str
    """Path of the module in memory."""
    tensors: Mapping[str, StoredTensor]
    """By what follows the module's path, without the adapter's name and `.weight`: `lora_A`,
    `lora_B.bias`, `oft_R`, `glora_A.Xd`.
    """
    where: str
    """For messages."""
    depth: int = 0
    """How many `base_layer.` stood between path and factor: of wrapped parameters."""
    is_inner: bool = False
    """Whether the path leads through a layer that is wrapped itself: the output projection of a
    `nn.MultiheadAttention`.
    """

    @property
    def is_embedding(self) -> bool:
        """Whether the factors are those of an embedding."""
        return any("embedding" in name for name in self.tensors)

    def get(self, name: str) -> StoredTensor | None:
        """Return a tensor, or None."""
        return self.tensors.get(name)

    def need(self, *names: str) -> list[StoredTensor]:
        """Return tensors that have to be there.

        Raises:
            AdapterError: One is missing.
        """
        missing = [name for name in names if name not in self.tensors]
        if missing:
            raise AdapterError(f"module has no {' and no '.join(missing)}", where=self.where)
        return [self.tensors[name] for name in names]

    def fit(self, name: str, *shape: int) -> StoredTensor:
        """Return a tensor of a certain shape.

        Raises:
            AdapterError: It is missing, or has another shape.
        """
        (tensor,) = self.need(name)
        if tensor.shape != shape:
            raise AdapterError(
                "adapter tensor has an unexpected shape: another base?",
                where=f"key '{tensor.name}' of {tensor.path}",
                expected=shape,
                got=tensor.shape,
            )
        return tensor


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of a base layer."""

    name: str
    """In the checkpoint."""
    shape: tuple[int, ...]
    stored: StoredTensor | None = None
    """What it is made from: the base's tensor, or the one that an adapter put in its place."""
    dtype: Dtype | None = None
    """The dtype that it has in memory."""
    is_changed: bool = False
    """Whether adapters before this one change what is stored."""


@dataclass(frozen=True, slots=True)
class Layer:
    """The base layer that a module of an adapter is for."""

    module: AdapterModule
    parameters: Mapping[str, Parameter]
    """By their names in the layer: `weight`, `bias`, `in_proj_weight`."""
    is_transposed: bool
    """Whether the weight is stored (K, N): a Conv1D."""

    @property
    def weight(self) -> Parameter:
        """The weight."""
        return self.parameters["weight"]

    @property
    def out_features(self) -> int:
        """N, also of convolutions."""
        return self.weight.shape[-1 if self.is_transposed else 0]

    @property
    def in_features(self) -> int:
        """K; of a convolution with its window: all but the first dimension."""
        shape = self.weight.shape
        return shape[0] if self.is_transposed else prod(shape[1:])

    def mismatch(self, got: object, *, parameter: str = "weight", hint: str = "") -> PlanError:
        """Say that the module's tensors do not fit the layer."""
        found = self.parameters.get(parameter)
        expected = f"a change of '{found.name}' {found.shape}" if found else f"a {parameter}"
        return PlanError(
            "shape mismatch: another base?",
            where=self.module.where,
            expected=expected,
            got=got,
            hint=hint or self._hint(),
        )

    def _hint(self) -> str:
        is_over_vocabulary = self.module.is_embedding or (
            self.module.module.rpartition(".")[2] in _OVER_VOCABULARY
        )
        if is_over_vocabulary:
            return (
                "trained on a resized vocabulary? Save the adapter with "
                "save_embedding_layers=True, or resize the base first"
            )
        return "give the base that the adapter was trained on"


@dataclass(frozen=True, slots=True)
class PlannedTerm:
    """A term, and the parameter of the layer that it changes."""

    parameter: str
    term: Term
    unused: tuple[StoredTensor, ...] = ()
    """Tensors that stand beside it and have no effect on such a layer."""


@dataclass(frozen=True, slots=True)
class Shared:
    """What all modules of an adapter have in common."""

    tensors: Mapping[str, StoredTensor] = field(default_factory=dict)
    """Tensors that they share, by their names in the file without prefix and adapter name."""
    layers: tuple[Layer, ...] = ()
    """The base layers of all of them, in the order of the file."""


class Tuner:
    """One kind of adapter, as PEFT's `peft_type` names it."""

    peft_type: ClassVar[str]
    title: ClassVar[str]
    """For the table of what is supported."""
    formula: ClassVar[str]
    """The merged weight, in one line."""
    factors: ClassVar[frozenset[str]]
    """First parts of the names of its tensors: `lora_A`."""
    parts: ClassVar[frozenset[str]] = frozenset()
    """What may follow them besides `weight`, `bias` and numbers: `Xd` of `glora_A.Xd`."""
    has_free_parts: ClassVar[bool] = False
    """Whether anything may follow them; then an adapter's name cannot be told from it."""
    shared: ClassVar[frozenset[str]] = frozenset()
    """First parts of the names of tensors that all modules share: `vera_A`."""
    replaces: ClassVar[frozenset[str]] = frozenset()
    """Module names below which whole parameters are stored: `ln_tuning_layers`."""
    options: ClassVar[frozenset[str]] = frozenset()
    """The keys of adapter_config.json that it knows, beyond those common to all kinds."""
    is_additive: ClassVar[bool] = False
    """Whether all of its terms can be weighted."""
    remarks: ClassVar[str] = ""
    """What the table says beside the formula."""

    def read(self, options: Options) -> Any:
        """Read and check what the configuration says; the result is handed to `plan`.

        Raises:
            AdapterError: It is not sound, or asks for what has no merged form.
        """

    def check(self, module: AdapterModule, settings: Any) -> None:
        """Check a module's tensors against each other.

        Raises:
            AdapterError: They do not fit.
        """

    def plan(self, layer: Layer, settings: Any, shared: Shared) -> Sequence[PlannedTerm]:  # noqa: ARG002
        """Say what a module does to its layer. Every tensor of it is in a term, or in `unused`.

        A kind that stores nothing but whole tensors has no modules, and leaves this as it is.

        Args:
            layer: The base layer, and the module.
            settings: What `read` returned.
            shared: What the modules of the adapter share.

        Raises:
            PlanError: They do not fit.
        """
        return ()

    def unused(self, module: AdapterModule) -> Sequence[StoredTensor]:  # noqa: ARG002
        """Return tensors that only training needs; every other one must be in a term."""
        return ()

    def variants(self, settings: Any) -> tuple[str, ...]:  # noqa: ARG002
        """Name what differs from the plain formula."""
        return ()

    def describe(self, module: AdapterModule, settings: Any) -> dict[str, Any]:  # noqa: ARG002
        """Say what is worth knowing of a module, as JSON types."""
        return {}
