"""What an export uses instead of GPUs: simulated devices, and kernels in fp64."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from simulated import SimulatedRuntime

from streammerge.backends.device_merge import Kernels
from streammerge.backends.gpus import Gpus
from streammerge_kernels.reference import dora_merge, lora_merge

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch


class ExactKernels:
    """The operations as they are meant, and how often each was asked for."""

    def __init__(self) -> None:
        self.calls: dict[str, int] = dict.fromkeys(("merge", "dora", "grouped"), 0)
        self.shapes: list[Any] = []
        self.most_grouped = 0

    def merge(
        self, weight: torch.Tensor, terms: Any, *, out: torch.Tensor, config: Any = None
    ) -> None:
        self.calls["merge"] += 1
        self.shapes.append(config)
        out.copy_(lora_merge(weight, terms, out.dtype))

    def dora(
        self,
        weight: torch.Tensor,
        terms: Any,
        magnitude: torch.Tensor,
        *,
        out: torch.Tensor,
        config: Any = None,
    ) -> None:
        self.calls["dora"] += 1
        self.shapes.append(config)
        ((a, b, scaling),) = terms
        out.copy_(dora_merge(weight, a, b, magnitude, scaling, out.dtype))

    def grouped(
        self,
        weights: Sequence[torch.Tensor],
        terms: Sequence[Any],
        *,
        out: Sequence[torch.Tensor],
        config: Any = None,
    ) -> None:
        self.calls["grouped"] += 1
        self.shapes.append(config)
        self.most_grouped = max(self.most_grouped, len(weights))
        assert len({weight.dtype for weight in weights}) == 1
        assert len({(a.dtype, b.dtype, len(a)) for a, b, _ in terms}) == 1
        for weight, term, result in zip(weights, terms, out, strict=True):
            assert weight.is_contiguous()
            result.copy_(lora_merge(weight, [term], result.dtype))

    def launchers(self) -> Kernels:
        return Kernels(self.merge, self.dora, self.grouped)


def exact_gpus() -> Gpus:
    """One device whose kernels are exact."""
    return Gpus((SimulatedRuntime(),), ExactKernels().launchers())
