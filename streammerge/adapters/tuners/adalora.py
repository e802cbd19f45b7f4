"""AdaLoRA (Zhang et al. 2023): a delta in the form of a singular value decomposition.

    W + B @ (A * E) * lora_alpha / (init_r + 1e-5)

with A (R, K), E (R, 1) and B (N, R). Training starts at rank init_r everywhere, then takes singular
values away, so that R is init_r or less; what was divided by stays init_r. For convolutions A is
(R, channels * kernel). For a weight stored (K, N) the delta is transposed before it is scaled.

Source: peft.tuners.adalora (layer.py, model.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from streammerge.adapters.terms import ScaledTerm
from streammerge.adapters.tuners.base import PlannedTerm, Tuner
from streammerge.errors import AdapterError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from streammerge.adapters.options import Options
    from streammerge.adapters.terms import Weight
    from streammerge.adapters.tuners.base import AdapterModule, Layer, Shared
    from streammerge.checkpoint.header import StoredTensor

__all__ = ["TUNERS", "AdaLora", "AdaLoraSettings", "SingularValuesTerm"]

_REFUSED = {
    "use_dora": "AdaLoRA has no magnitudes",
    "loftq_config": "its base was quantized and corrected in turns",
}


@dataclass(frozen=True, slots=True)
class AdaLoraSettings:
    """What a configuration says of the merge."""

    init_rank: int
    lora_alpha: float
    ranks: Mapping[str, int]
    """What masks have left of the rank, by module."""
    reproduces_bugs: bool = False

    def rank_of(self, module: str) -> int:
        """Return the rank that is left."""
        return self.ranks.get(module, self.init_rank)

    def factor_of(self, module: str) -> float:
        """Return what the product is multiplied by before it is divided."""
        if self.lora_alpha > 0:
            return self.lora_alpha
        # trained with; PEFT goes on with the rank that is left once the adapter was saved
        return float(self.rank_of(module) if self.reproduces_bugs else self.init_rank)


@dataclass(frozen=True, slots=True)
class SingularValuesTerm(ScaledTerm):
    """`B @ (A * E) * scaling / (init_r + 1e-5)`."""

    a: StoredTensor
    """(R, K)"""
    b: StoredTensor
    """(N, R)"""
    e: StoredTensor
    """(R, 1)"""
    scaling: float
    init_rank: int
    is_transposed: bool
    """Whether the delta is added to a weight stored (K, N)."""
    is_masked: bool
    """Whether PEFT loads the factors in the weight's dtype: it makes them anew when it has masks to
    apply, after it has made the others wider.
    """

    @property
    def factors(self) -> tuple[StoredTensor, ...]:
        """The decomposition."""
        return (self.a, self.b, self.e)

    def work_bytes(self, shape: tuple[int, ...]) -> int:  # noqa: ARG002 (a term's interface)
        """Return what `A * E` holds, and the factors as they are rounded."""
        a, both = prod(self.a.shape), sum(prod(factor.shape) for factor in self.factors)
        return 8 * (a + (2 * both if self.is_masked else 0))

    def prepare(self, factors: list[torch.Tensor], weight: Weight) -> Any:
        """Multiply singular values and vectors, and find the divisor."""
        import torch  # noqa: PLC0415 (planning needs no torch)

        if self.is_masked:
            factors = [factor.to(weight.dtype).to(weight.compute_dtype) for factor in factors]
        a, b, e = factors
        # the rank is kept like a factor
        rank = torch.tensor(float(self.init_rank)).to(weight.dtype).to(weight.compute_dtype)
        return a * e, b, rank + 1e-5

    def apply(self, rows: torch.Tensor, begin: int, state: Any) -> torch.Tensor:
        """Add the delta's rows."""
        a, b, divisor = state
        end = begin + len(rows)
        delta = (b @ a[:, begin:end]).T if self.is_transposed else b[begin:end] @ a
        delta.mul_(self.scaling).div_(divisor)
        return rows.copy_(delta.add_(rows.to(delta.dtype)))


class AdaLora(Tuner):
    """`peft_type: ADALORA`."""

    peft_type = "ADALORA"
    title = "AdaLoRA"
    formula = "W + B @ (A * E) * lora_alpha / (init_r + 1e-5)"
    factors = frozenset({"lora_A", "lora_B", "lora_E"})
    # its configuration is LoRA's with more, of which most has no effect
    options = frozenset(
        """
        alpha_pattern arrow_config beta1 beta2 corda_config deltaT eva_config init_lora_weights
        init_r layer_replication lora_alpha lora_bias lora_dropout lora_ga_config megatron_config
        megatron_core orth_reg_weight qalora_group_size r rank_pattern target_parameters target_r
        tfinal tinit total_step trainable_token_indices use_qalora use_rslora
        """.split()
    )
    is_additive = True

    def read(self, options: Options) -> AdaLoraSettings:
        """Read ranks and alpha.

        Raises:
            AdapterError: They are not sound.
        """
        for option, reason in _REFUSED.items():
            if options.get(option):
                got = f"{option}: {options.get(option)!r}"[:120]
                raise AdapterError(reason, where=options.path, got=got)
        return AdaLoraSettings(
            init_rank=options.count("init_r", 12),
            lora_alpha=options.number("lora_alpha", 8),
            ranks=_ranks(options),
            reproduces_bugs=options.choices.reproduces_bugs,
        )

    def check(self, module: AdapterModule, settings: AdaLoraSettings) -> None:
        """Check the factors against each other and against the configuration.

        Raises:
            AdapterError: They do not fit.
        """
        a, b, e = module.need("lora_A", "lora_B", "lora_E")
        rank = settings.rank_of(module.module)
        if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[1] == 0 or b.shape[0] == 0:
            raise AdapterError(
                "adapter tensor is empty or flat: ZeRO-3 or FSDP shards were not gathered",
                where=module.where,
                got=f"lora_A {a.shape}, lora_B {b.shape}",
                hint="consolidate the training checkpoint (zero_to_fp32), save the adapter again",
            )
        if (a.shape[0], b.shape[1], e.shape) != (rank, rank, (rank, 1)):
            raise AdapterError(
                "rank of the tensors and of adapter_config.json disagree",
                where=module.where,
                expected=f"{rank}, from init_r and rank_pattern",
                got=f"lora_A {a.shape}, lora_B {b.shape}, lora_E {e.shape}",
                hint="adapter_config.json belongs to another adapter?",
            )

    def plan(self, layer: Layer, settings: AdaLoraSettings, shared: Shared) -> list[PlannedTerm]:
        """Plan the delta of the weight."""
        del shared
        module = layer.module
        a, b, e = module.need("lora_A", "lora_B", "lora_E")
        weight = layer.parameters.get("weight")
        delta = (b.shape[0], a.shape[1])
        if weight is None or len(weight.shape) not in {2, 4}:
            raise layer.mismatch(f"a delta of shape {delta}")
        if (layer.out_features, layer.in_features) != delta:
            raise layer.mismatch(delta[::-1] if layer.is_transposed else delta)
        term = SingularValuesTerm(
            a,
            b,
            e,
            scaling=settings.factor_of(module.module),
            init_rank=settings.init_rank,
            is_transposed=layer.is_transposed,
            is_masked=module.module in settings.ranks,
        )
        return [PlannedTerm("weight", term)]

    def describe(self, module: AdapterModule, settings: AdaLoraSettings) -> dict[str, Any]:
        """Give rank, scaling and the delta's shape."""
        a, b = module.need("lora_A", "lora_B")
        return {
            "rank": a.shape[0],
            "scaling": settings.factor_of(module.module) / (settings.init_rank + 1e-5),
            "shape": [b.shape[0], a.shape[1]],
            "dtype": a.dtype.value,
        }


TUNERS: tuple[Tuner, ...] = (AdaLora(),)


def _ranks(options: Options) -> dict[str, int]:
    """Read the masks, by the names of the singular values: `<module>.lora_E[.<adapter's name>]`.

    Raises:
        AdapterError: They are something else.
    """
    raw = options.get("rank_pattern") or {}
    if not isinstance(raw, dict):
        raise options.bad("rank_pattern", expected="a map")
    ranks = {}
    for name, mask in raw.items():
        module = name.rpartition(".lora_E")[0].removeprefix("base_model.model.")
        is_mask = isinstance(mask, list) and all(isinstance(kept, bool) for kept in mask)
        if not module or not is_mask:
            expected = "lists of true and false by names that end in lora_E"
            raise options.bad("rank_pattern", expected=expected)
        ranks[module] = sum(mask)
    return ranks
