"""LoRA and its variants: `W + scaling * B @ A`, with A (R, K) and B (N, R).

| variant | merged weight |
|---|---|
| rsLoRA | scaling is `lora_alpha / sqrt(r)` |
| DoRA | with V = W + delta: `m / ||V||` per row of V as (N, K), times V |
| QA-LoRA | A's columns each stand for a group of inputs, which are averaged and scaled |
| BD-LoRA | A or B is block-diagonal |
| KaSA | W without its R smallest singular components, plus `scaling * B @ diag(d) @ A` |
| PiSSA, OLoRA | W without the factors that training started from, plus the delta |
| MonteCLoRA, VeLoRA, MiCA | the plain formula |

Sources: peft.tuners.lora (layer.py, dora.py, variants.py), and the papers that it names.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING, Any

from streammerge.adapters.terms import BiasTerm, Factor, LoraTerm
from streammerge.adapters.tuners.base import PlannedTerm, Tuner
from streammerge.adapters.tuners.lora_base import ResidualTerm
from streammerge.adapters.tuners.lora_settings import BlockDiagonal, LoraSettings, read_settings
from streammerge.errors import AdapterError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from streammerge.adapters.options import Options
    from streammerge.adapters.tuners.base import AdapterModule, Layer, Shared
    from streammerge.adapters.tuners.lora_settings import Variant
    from streammerge.checkpoint.header import StoredTensor

__all__ = [
    "TUNERS",
    "BlockDiagonal",
    "Lora",
    "LoraSettings",
    "check_pair",
]

# the variants that PEFT has for layers other than linear ones
_OF_EMBEDDINGS: frozenset[Variant] = frozenset({"DoRA", "MiCA"})
_OF_CONVOLUTIONS: frozenset[Variant] = frozenset({"DoRA"})


class Lora(Tuner):
    """`peft_type: LORA`."""

    peft_type = "LORA"
    title = "LoRA (rsLoRA, DoRA, KaSA, PiSSA, OLoRA, QA-LoRA, BD-LoRA, MonteCLoRA, VeLoRA, MiCA)"
    formula = "W + scaling * B @ A"
    factors = frozenset(
        {
            "lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector",
            "lora_diag", "lora_velora_embed", "lora_monteclora_sampler",
        }
    )  # fmt: skip
    parts = frozenset({"std_prior", "expert_weights", "expert_weights_prior", "gaussian_var_prior"})
    options = frozenset(
        """
        alora_invocation_tokens alpha_pattern arrow_config corda_config eva_config init_lora_weights
        kasa_config layer_replication loftq_config lora_alpha lora_bias lora_dropout lora_ga_config
        megatron_config megatron_core mica_config monteclora_config qalora_group_size r rank_pattern
        target_parameters trainable_token_indices use_bdlora use_dora use_qalora use_rslora
        velora_config
        """.split()
    )
    is_additive = True

    def read(self, options: Options) -> LoraSettings:
        """Read the configuration.

        Raises:
            AdapterError: It is not sound, or has no merged form.
        """
        return read_settings(options)

    def check(self, module: AdapterModule, settings: LoraSettings) -> None:
        """Check the factors against each other and against the configuration.

        Raises:
            AdapterError: They do not fit.
        """
        unused = self.unused(module)
        for tensor in module.tensors.values():
            if tensor not in unused:
                check_floating(tensor)
        names = module.tensors.keys()
        if module.is_embedding and not names.isdisjoint({"lora_A", "lora_B"}):
            message = "module has the factors of an embedding and of a layer"
            raise AdapterError(message, where=module.where)
        a, b = _pair(module)
        # of wrapped parameters the rank is asked for by the parameter's name, known with the base
        check_pair(module, a, b)
        magnitude = module.get("lora_magnitude_vector")
        if settings.use_dora != (magnitude is not None):
            raise AdapterError(
                "adapter's use_dora and its tensors disagree",
                where=module.where,
                expected=f"{'a' if settings.use_dora else 'no'} lora_magnitude_vector",
            )
        for vector in (magnitude, module.get("lora_B.bias")):
            if vector is None:
                continue
            if prod(vector.shape) != b.shape[0] or b.shape[0] not in vector.shape:
                raise AdapterError(
                    "vector does not fit lora_B",
                    where=f"key '{vector.name}' of {vector.path}",
                    expected=(b.shape[0],),
                    got=vector.shape,
                )

    def plan(self, layer: Layer, settings: LoraSettings, shared: Shared) -> Sequence[PlannedTerm]:
        """Plan `scaling * B @ A` on the weight, and what stands beside it.

        Raises:
            AdapterError: The factors are not what the configuration says, or not for such a layer.
            PlanError: They do not fit the layer.
        """
        del shared
        module = layer.module
        is_attention = "weight" not in layer.parameters and "in_proj_weight" in layer.parameters
        parameter = "in_proj_weight" if is_attention else "weight"
        term = _lora_term(layer, settings, parameter)
        _check_variant(layer, settings, is_attention=is_attention or module.is_inner)
        planned = []
        stored = layer.parameters[parameter].stored
        # what the adapter itself keeps of the base is what training went on with
        is_found = stored is not None and stored.path == term.a.tensor.path
        # PEFT leaves the weights of embeddings alone
        if settings.residual is not None and not is_found and not module.is_embedding:
            residual = ResidualTerm(settings.residual, term.rank, term.scaling, term.is_transposed)
            planned.append(PlannedTerm(parameter, residual))
        bias = module.get("lora_B.bias")
        if bias is not None and settings.use_dora:
            raise AdapterError("there is no DoRA with lora_bias", where=module.where)
        # the layer's own forward does not know of a bias of B for what it keeps in one parameter
        unused = (bias,) if is_attention and bias is not None else ()
        planned.append(PlannedTerm(parameter, term, unused))
        if module.is_inner:
            # the layer's own forward adds the delta to the weight and applies the inner layer too,
            # so that an adapter is trained with twice its delta
            planned.append(PlannedTerm(parameter, replace(term, rounds_delta=False)))
        if bias is not None and not is_attention:
            planned.append(PlannedTerm("bias", _bias_term(layer, bias, term)))
        return planned

    def unused(self, module: AdapterModule) -> list[StoredTensor]:
        """Return what training kept beside the factors, and no merge needs."""
        beside = ("lora_velora_embed", "lora_monteclora_sampler")
        return [tensor for name, tensor in module.tensors.items() if name.startswith(beside)]

    def variants(self, settings: LoraSettings) -> tuple[str, ...]:
        """Name what differs from the plain formula."""
        inits = {"pissa": "PiSSA", "olora": "OLoRA"}
        named = [
            "rsLoRA" if settings.use_rslora else None,
            settings.variant,
            inits.get(settings.residual or ""),
        ]
        return tuple(name for name in named if name is not None)

    def describe(self, module: AdapterModule, settings: LoraSettings) -> dict[str, Any]:
        """Give rank, scaling and the delta's shape."""
        a, b = _pair(module)
        return {
            "rank": a.shape[0],
            "scaling": settings.scaling_of(_wrapped_path(module)),
            "shape": [b.shape[0], prod(a.shape[1:])],
            "dtype": a.dtype.value,
        }


TUNERS: tuple[Tuner, ...] = (Lora(),)


def _wrapped_path(module: AdapterModule) -> str:
    """Return the path that patterns are matched against: of an inner layer that of the outer."""
    return module.module.rpartition(".")[0] if module.is_inner else module.module


def _pair(module: AdapterModule) -> list[StoredTensor]:
    wanted = (
        ("lora_embedding_A", "lora_embedding_B") if module.is_embedding else ("lora_A", "lora_B")
    )
    return module.need(*wanted)


def check_floating(tensor: StoredTensor) -> None:
    """Check that a tensor holds values, not codes.

    Raises:
        AdapterError: It holds whole numbers.
    """
    if not tensor.dtype.is_mergeable:
        raise AdapterError(
            "adapter tensor has a dtype that cannot be merged",
            where=f"key '{tensor.name}' of {tensor.path}",
            expected="F16, BF16, F32 or F64",
            got=tensor.dtype.value,
        )


def check_pair(module: AdapterModule, a: StoredTensor, b: StoredTensor) -> None:
    """Check that two factors can be multiplied.

    Raises:
        AdapterError: They cannot.
    """
    for tensor in (a, b):
        if 0 in tensor.shape or len(tensor.shape) < 2:
            raise AdapterError(
                "adapter tensor is empty or flat: ZeRO-3 or FSDP shards were not gathered",
                where=f"key '{tensor.name}' of {tensor.path}",
                got=f"shape {tensor.shape}",
                hint="consolidate the training checkpoint (zero_to_fp32), save the adapter again",
            )
    # the second factor of a convolution has a window of one
    if prod(b.shape[1:]) != b.shape[1] or len(a.shape) != len(b.shape):
        raise AdapterError(
            "factors of the adapter do not belong together",
            where=module.where,
            got=f"lora_A {a.shape}, lora_B {b.shape}",
        )


def _lora_term(layer: Layer, settings: LoraSettings, parameter: str) -> LoraTerm:
    module = layer.module
    a, b = _pair(module)
    path = _wrapped_path(module)
    rank = settings.rank_of(path)
    if a.shape[0] != rank:
        raise AdapterError(
            "rank of the tensors and of adapter_config.json disagree",
            where=module.where,
            expected=f"r = {rank}",
            got=f"lora_A {a.shape}, lora_B {b.shape}",
            hint="adapter_config.json belongs to another adapter?",
        )
    # both parts of a nn.MultiheadAttention are rounded, as embeddings are
    is_of_attention = parameter != "weight" or module.is_inner
    term = LoraTerm(
        *_factors(a, b, module=module, settings=settings),
        scaling=settings.scaling_of(path),
        is_transposed=module.is_embedding or layer.is_transposed,
        rounds_delta=settings.rounds_delta or module.is_embedding or is_of_attention,
        magnitude=module.get("lora_magnitude_vector"),
        gain=module.fit("lora_diag", rank) if settings.has_gain else None,
    )
    _check_fit(layer, term, parameter)
    return term


def _factors(
    a: StoredTensor, b: StoredTensor, *, module: AdapterModule, settings: LoraSettings
) -> tuple[Factor, Factor]:
    """Say how the stored tensors give A and B.

    Raises:
        AdapterError: A factor cannot be cut into the blocks of BD-LoRA.
    """
    if settings.pool > 1:
        # the mean of a group, times the number of groups
        gain = a.shape[1] / settings.pool
        return Factor(a, column_repeats=settings.pool, gain=gain), Factor(b)
    blocks = settings.block_diagonal
    if blocks is None:
        return Factor(a), Factor(b)
    # PEFT looks for these names anywhere in the last part of the path
    last = module.module.rpartition(".")[2]
    is_a, is_b = (any(name in last for name in names) for names in (blocks.in_a, blocks.in_b))
    cut = a if is_a else b
    if (is_a and is_b) or ((is_a or is_b) and cut.shape[0] % blocks.blocks):
        raise AdapterError(
            "factors of BD-LoRA cannot be cut into blocks",
            where=module.where,
            expected=f"A or B of {blocks.blocks} blocks of rows",
            got="both" if is_a and is_b else cut.shape,
        )
    return (
        Factor(a, diagonal_blocks=blocks.blocks if is_a else 1),
        Factor(b, diagonal_blocks=blocks.blocks if is_b else 1),
    )


def _check_fit(layer: Layer, term: LoraTerm, parameter: str) -> None:
    stored = layer.parameters.get(parameter)
    module = layer.module
    a, b = term.a, term.b
    delta = (b.shape[0], a.shape[1])
    if stored is None:
        raise layer.mismatch(f"a delta of shape {delta}")
    shape = stored.shape
    rows = shape[0] if shape else 1
    seen = (rows, prod(shape[1:]))
    if a.shape[0] != b.shape[1]:
        is_grouped = len(shape) > 2 and a.shape[0] % b.shape[1] == 0
        raise AdapterError(
            "a convolution in groups has no merged form: A connects each output to all inputs"
            if is_grouped
            else "rank of the two factors differs",
            where=module.where,
            got=f"lora_A {a.tensor.shape}, lora_B {b.tensor.shape}",
        )
    windows = len(a.tensor.shape) > 2 and a.tensor.shape[2:] != shape[2:]
    if len(shape) < 2 or windows or seen != (delta[::-1] if term.is_transposed else delta):
        raise layer.mismatch(
            f"{delta[::-1] if term.is_transposed else delta} from lora_A {a.tensor.shape} and "
            f"lora_B {b.tensor.shape}"
        )


def _check_variant(layer: Layer, settings: LoraSettings, *, is_attention: bool) -> None:
    """Refuse what PEFT has for other layers only, so that there is no telling what it would mean.

    Raises:
        AdapterError: The variant, or what was taken off the base, is not for such a layer.
    """
    module = layer.module
    kind, known = "", frozenset[Any]()
    if module.is_embedding:
        kind, known = "an embedding", _OF_EMBEDDINGS
    elif is_attention:
        kind = "a nn.MultiheadAttention"
    elif len(layer.weight.shape) > 2:
        kind, known = "a convolution", _OF_CONVOLUTIONS
    variant = settings.variant
    if kind and variant is not None and variant not in known:
        raise AdapterError(f"there is no {variant} for {kind}", where=module.where)
    residual = settings.residual
    if residual is None or module.is_embedding:
        return
    if kind:
        raise AdapterError(
            f"there is no init_lora_weights: {residual} for {kind}", where=module.where
        )
    rows, columns = layer.weight.shape
    rank = settings.rank_of(module.module)
    is_too_high = residual == "kasa" and rank >= min(rows, columns)
    # PEFT decomposes such a weight as it is stored, which gives factors of other shapes
    is_stored_wrong = layer.is_transposed and (
        residual == "kasa" or (residual == "olora" and rows != columns)
    )
    if is_too_high or is_stored_wrong:
        raise AdapterError(
            f"weight cannot be decomposed as {residual} does it",
            where=module.where,
            expected="a linear layer, its smaller side above the rank",
            got=f"{'a Conv1D' if layer.is_transposed else 'a weight'} of {layer.weight.shape}, "
            f"rank {rank}",
        )


def _bias_term(layer: Layer, vector: StoredTensor, term: LoraTerm) -> BiasTerm:
    bias = layer.parameters.get("bias")
    if bias is None or bias.shape != vector.shape:
        raise layer.mismatch(
            "none" if bias is None else bias.shape,
            parameter="bias",
            hint="the adapter was trained with lora_bias, but the base layer has no such bias; "
            "another base?",
        )
    return BiasTerm(vector, term.scaling)
