"""PEANuT: a small network reads a weight, and says what is added to it.

    h = f(W.T @ A.T)                            A (R, N): a row of R numbers for each input
    h_i = f(h_(i-1) @ E_i.T), i = 1 ... depth   encoders (R, R)
    g_i = f(g_(i-1) @ D_i.T) + h_(depth - i)    decoders (R, R), from g_0 = h_depth
    W + scaling * (g @ B.T).T                   B (N, R)

with f of adapter_config.json's act_fn. All of it is in the adapter's dtype; the change is rounded
before it is added.

`W.T @ A.T` is a sum over N, which BLAS divides by the number of threads where N is above some
hundred: the bits are those of PEFT with one thread.

Source: peft.tuners.peanut, Zhong et al. 2024, arXiv:2410.01870. Shapes: N out_features, K
in_features, R rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from streammerge.adapters.terms import TunerTerm
from streammerge.adapters.tuners.base import PlannedTerm, Tuner
from streammerge.adapters.tuners.dense import check_rank, linear_size, whole_in
from streammerge.errors import AdapterError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    from streammerge.adapters.options import Options
    from streammerge.adapters.terms import Weight
    from streammerge.adapters.tuners.base import AdapterModule, Layer, Shared
    from streammerge.checkpoint.header import StoredTensor

    _Activation = Callable[[torch.Tensor], torch.Tensor]

__all__ = ["ACTIVATIONS", "TUNERS", "Peanut", "PeanutTerm"]

ACTIVATIONS = frozenset(
    """
    gelu gelu_10 gelu_accurate gelu_fast gelu_new gelu_python gelu_python_tanh gelu_pytorch_tanh
    hardswish laplace leaky_relu linear mish prelu quick_gelu relu relu2 relu6 sigmoid silu
    sqrtsoftplus swish tanh
    """.split()
)
"""Names of transformers' activations that are known here."""


@dataclass(frozen=True, slots=True)
class PeanutTerm(TunerTerm):
    """Add what the network says."""

    a: StoredTensor
    """(R, N)"""
    b: StoredTensor
    """(N, R)"""
    encoders: tuple[StoredTensor, ...]
    """(R, R) each"""
    decoders: tuple[StoredTensor, ...]
    """As many."""
    activation: str
    scaling: float

    @property
    def factors(self) -> tuple[StoredTensor, ...]:
        """A, B, encoders and decoders."""
        return (self.a, self.b, *self.encoders, *self.decoders)

    def work_bytes(self, shape: tuple[int, ...]) -> int:
        """Return what the whole weight takes, and what the network holds for each input."""
        kept = len(self.encoders) + 6
        return 8 * (prod(shape) + kept * self.a.shape[0] * shape[1])

    def prepare(self, factors: list[torch.Tensor], weight: Weight) -> Any:
        """Let the network read the weight, up to its last layer."""
        from torch.nn import functional  # noqa: PLC0415 (planning needs no torch)

        activate = _activation(self.activation)
        a, b, *hidden = factors
        depth = len(self.encoders)
        states = [activate(whole_in(a.dtype, weight).T @ a.T)]
        for encoder in hidden[:depth]:
            states.append(activate(functional.linear(states[-1], encoder)))
        state = states.pop()
        for decoder in hidden[depth:]:
            state = activate(functional.linear(state, decoder)) + states.pop()
        return state, b

    def apply(self, rows: torch.Tensor, begin: int, state: Any) -> torch.Tensor:
        """Add to these rows what is said of them."""
        hidden, b = state
        delta = (hidden @ b[begin : begin + len(rows)].T).mul_(self.scaling)
        return rows.add_(delta.T.to(rows.dtype))


@dataclass(frozen=True, slots=True)
class _Settings:
    rank: int
    depth: int
    activation: str
    scaling: float


class Peanut(Tuner):
    """`peft_type: PEANUT`."""

    peft_type = "PEANUT"
    title = "PEANuT"
    formula = "W + scaling * network(W.T).T"
    factors = frozenset({"peanut_A", "peanut_B", "peanut_decoders", "peanut_encoders"})
    options = frozenset({"act_fn", "depth", "r", "scaling"})
    remarks = "the whole weight is in memory while it is read"

    def read(self, options: Options) -> _Settings:
        """Read the network's form.

        Raises:
            AdapterError: It is not sound, or has an activation that is not known.
        """
        activation = options.text("act_fn") or "relu"
        if activation not in ACTIVATIONS:
            raise AdapterError(
                "adapter uses an activation that is not known here",
                where=options.path,
                expected=", ".join(sorted(ACTIVATIONS)),
                got=f"act_fn: {activation!r}"[:80],
                hint="merge it with PEFT",
            )
        return _Settings(
            rank=options.count("r", 32),
            depth=options.count("depth", 0, least=0),
            activation=activation,
            scaling=options.number("scaling", 1.0),
        )

    def check(self, module: AdapterModule, settings: _Settings) -> None:
        """Check the matrices against each other and against the configuration.

        Raises:
            AdapterError: They do not fit.
        """
        a, b = module.need("peanut_A", "peanut_B")
        if len(a.shape) != 2 or b.shape != a.shape[::-1]:
            raise AdapterError(
                "factors of the adapter do not belong together",
                where=module.where,
                got=f"peanut_A {a.shape}, peanut_B {b.shape}",
            )
        check_rank(module, a.shape[0], expected=settings.rank)
        for side in ("encoders", "decoders"):
            _ = _layers(module, side, settings)

    def plan(self, layer: Layer, settings: _Settings, shared: Shared) -> Sequence[PlannedTerm]:
        """Plan the addition to the weight."""
        del shared
        module = layer.module
        out_features, _ = linear_size(layer)
        a, b = module.need("peanut_A", "peanut_B")
        if b.shape[0] != out_features:
            raise layer.mismatch(f"peanut_A {a.shape}, peanut_B {b.shape}")
        term = PeanutTerm(
            a,
            b,
            _layers(module, "encoders", settings),
            _layers(module, "decoders", settings),
            settings.activation,
            settings.scaling,
        )
        return [PlannedTerm("weight", term)]

    def describe(self, module: AdapterModule, settings: _Settings) -> dict[str, Any]:
        """Give the network's form."""
        (a,) = module.need("peanut_A")
        return {
            "rank": settings.rank,
            "depth": settings.depth,
            "activation": settings.activation,
            "scaling": settings.scaling,
            "dtype": a.dtype.value,
        }


TUNERS: tuple[Tuner, ...] = (Peanut(),)


def _layers(module: AdapterModule, side: str, settings: _Settings) -> tuple[StoredTensor, ...]:
    """Return the encoders or the decoders; one too many is left for others to miss.

    Raises:
        AdapterError: One is missing, or has another shape.
    """
    rank = settings.rank
    return tuple(
        module.fit(f"peanut_{side}.{number}", rank, rank) for number in range(settings.depth)
    )


def _activation(name: str) -> _Activation:
    """Return an activation as transformers has it under a name, in the same steps."""
    import torch  # noqa: PLC0415 (planning needs no torch)
    from torch.nn import functional  # noqa: PLC0415

    def by_tanh(x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))) + 1.0

    def gelu_fast(x: torch.Tensor) -> torch.Tensor:
        inner = x * 0.7978845608 * (1.0 + 0.044715 * x * x)
        return 0.5 * x * (1.0 + torch.tanh(inner))

    def laplace(x: torch.Tensor) -> torch.Tensor:
        return 0.5 * (1.0 + torch.erf((x - 0.707107).div(0.282095 * math.sqrt(2.0))))

    def gelu_by_erf(x: torch.Tensor) -> torch.Tensor:
        return x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))

    known: dict[str, _Activation] = {
        "gelu": functional.gelu,
        "gelu_10": lambda x: torch.clip(functional.gelu(x), -10, 10),
        "gelu_accurate": lambda x: 0.5 * x * by_tanh(x),
        "gelu_fast": gelu_fast,
        "gelu_new": lambda x: 0.5 * x * by_tanh(x),
        "gelu_python": gelu_by_erf,
        "gelu_python_tanh": lambda x: x * 0.5 * by_tanh(x),
        "gelu_pytorch_tanh": lambda x: functional.gelu(x, approximate="tanh"),
        "hardswish": functional.hardswish,
        "laplace": laplace,
        "leaky_relu": functional.leaky_relu,
        "linear": lambda x: x,
        "mish": functional.mish,
        # a fresh one, as PEFT has it: its slope is not trained
        "prelu": lambda x: functional.prelu(x, x.new_tensor([0.25])),
        "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
        "relu": functional.relu,
        "relu2": lambda x: torch.square(functional.relu(x)),
        "relu6": functional.relu6,
        "sigmoid": torch.sigmoid,
        "silu": functional.silu,
        "sqrtsoftplus": lambda x: functional.softplus(x).sqrt(),
        "swish": functional.silu,
        "tanh": torch.tanh,
    }
    return known[name]
