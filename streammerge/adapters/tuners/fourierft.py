"""FourierFT: the delta is the inverse Fourier transform of a matrix with few trained entries.

    W + scaling * real(ifft2(S))        S (N, K), zero but for n random places, in float32

The places are the first n of a permutation that is drawn from a seed; n is the length of the
spectrum. A transform has no rows of its own, so the delta is made as a whole.

Sources: peft.tuners.fourierft; Gao et al. 2024, "Parameter-Efficient Fine-Tuning with Discrete
Fourier Transform". Shapes: N out_features, K in_features.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from streammerge.adapters.tuners.base import PlannedTerm, Tuner
from streammerge.adapters.tuners.dense import linear_size
from streammerge.adapters.tuners.seeded import WholeTerm, check_spectrum, random_places, seed_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from streammerge.adapters.options import Options
    from streammerge.adapters.terms import Weight
    from streammerge.adapters.tuners.base import AdapterModule, Layer, Shared
    from streammerge.checkpoint.header import StoredTensor

__all__ = ["TUNERS", "FourierFt", "FourierTerm"]

# of the transform when it is first used, whatever the size: 7 MB measured (torch 2.13.0 with MKL)
_FIXED_BYTES = 12 << 20


@dataclass(frozen=True, slots=True)
class FourierTerm(WholeTerm):
    """Add the transform of a spectrum."""

    spectrum: StoredTensor
    """(n,)"""
    scaling: float
    seed: int

    @property
    def factors(self) -> tuple[StoredTensor, ...]:
        """The spectrum."""
        return (self.spectrum,)

    def work_bytes(self, shape: tuple[int, ...]) -> int:
        """Return the bytes of two complex matrices; 1.01 of that measured from 2048 x 2048 on."""
        return 17 * prod(shape) + 40 * prod(self.spectrum.shape) + _FIXED_BYTES

    def delta(self, factors: list[torch.Tensor], weight: Weight) -> torch.Tensor:
        """Transform the spectrum."""
        import torch  # noqa: PLC0415 (planning needs no torch)

        (spectrum,) = factors
        outputs, inputs = self.size(weight.shape)
        places = random_places(outputs, inputs, count=len(spectrum), seed=self.seed)
        dense = torch.zeros(outputs, inputs, dtype=torch.complex64)
        dense.view(-1)[places] = spectrum.to(torch.complex64)
        # each is let go before there are three of them
        dense = torch.fft.ifft2(dense)
        delta: torch.Tensor = dense.real * self.scaling
        del dense
        if self.gain != 1.0:
            delta.mul_(self.gain)
        return delta.to(weight.compute_dtype)


@dataclass(frozen=True, slots=True)
class _Settings:
    count: int
    pattern: dict[str, int]
    scaling: float
    seed: int

    def count_of(self, module: str) -> int:
        """Return the number of entries of a module's spectrum.

        PEFT asks for something before a pattern that is a regular expression.
        """
        for pattern, count in self.pattern.items():
            if re.match(rf".*\.{pattern}$", module):
                return count
        return self.pattern.get(module, self.count)


class FourierFt(Tuner):
    """`peft_type: FOURIERFT`."""

    peft_type = "FOURIERFT"
    title = "FourierFT"
    formula = "W + scaling * real(ifft2(S))"
    factors = frozenset({"fourierft_spectrum"})
    options = frozenset({"n_frequency", "n_frequency_pattern", "random_loc_seed", "scaling"})
    is_additive = True
    remarks = "needs the whole delta, and 17 bytes per entry of it"

    def read(self, options: Options) -> _Settings:
        """Read the numbers of entries, the scaling and the seed."""
        return _Settings(
            options.count("n_frequency", 1000),
            options.pattern("n_frequency_pattern", whole=True),
            options.number("scaling", 150.0),
            seed_of(options, "random_loc_seed", 777),
        )

    def check(self, module: AdapterModule, settings: _Settings) -> None:
        """Check the spectrum's length.

        Raises:
            AdapterError: It is not that of adapter_config.json.
        """
        check_spectrum(module, "fourierft_spectrum", expected=settings.count_of(module.module))

    def plan(self, layer: Layer, settings: _Settings, shared: Shared) -> Sequence[PlannedTerm]:
        """Plan the transform."""
        del shared
        (spectrum,) = layer.module.need("fourierft_spectrum")
        if prod(spectrum.shape) > prod(linear_size(layer, allows_conv1d=True)):
            raise layer.mismatch(f"'{spectrum.name}' {spectrum.shape}, of more entries")
        term = FourierTerm(layer.is_transposed, spectrum, settings.scaling, settings.seed)
        return [PlannedTerm("weight", term)]

    def describe(self, module: AdapterModule, settings: _Settings) -> dict[str, Any]:
        """Give the number of entries and the scaling."""
        (spectrum,) = module.need("fourierft_spectrum")
        return {
            "entries": spectrum.shape[0],
            "scaling": settings.scaling,
            "dtype": spectrum.dtype.value,
        }


TUNERS: tuple[Tuner, ...] = (FourierFt(),)
