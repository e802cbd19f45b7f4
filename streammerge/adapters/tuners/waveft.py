"""WaveFT: the delta is the inverse wavelet transform of a matrix with few trained entries.

    W + scaling * idwt2(S)        S (N, K) with a margin, zero but for n random places
    W + scaling * S               with use_idwt: false, S (N, K)

The places are the first n of a permutation that is drawn from a seed; n is the length of the
spectrum. S is cut into four bands (4, H, V) of half its height and width; with a filter f of L taps
and g of `g[i] = (-1)^i f[L - 1 - i]` the transform is

    out[y, x] = sum over bands c and 2 h + i = y, 2 v + j = x of S[c, h, v] * F[c, i, j]
    F = f x f, g x f, f x g, g x g

without L - 2 rows and columns at each edge. It is made with one thread, a range of rows after the
other, so that it needs little more than the delta. For the Haar wavelet (db1, the default) these
are PEFT's bits; for longer filters torch's last digits depend on the number of threads, and these
are PEFT's bits with one, but for coif4 on matrices that take several ranges.

Sources: peft.tuners.waveft; Bilican et al. 2025, "Exploring Sparsity for Parameter Efficient Fine
Tuning Using Wavelets". Shapes: N out_features, K in_features.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from streammerge.adapters.options import first_match
from streammerge.adapters.tuners.base import PlannedTerm, Tuner
from streammerge.adapters.tuners.dense import linear_size
from streammerge.adapters.tuners.seeded import WholeTerm, check_spectrum, random_places, seed_of
from streammerge.adapters.tuners.wavelets import lowpass, wavelet_names
from streammerge.dtypes import Dtype
from streammerge.errors import AdapterError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from streammerge.adapters.options import Options
    from streammerge.adapters.terms import Weight
    from streammerge.adapters.tuners.base import AdapterModule, Layer, Shared
    from streammerge.checkpoint.header import StoredTensor

__all__ = ["TUNERS", "WaveFt", "WaveTerm"]

# of oneDNN when it is first used: 11 MB measured (torch 2.13.0, AVX-512)
_FIXED_BYTES = 16 << 20
# products of entries and taps for one range of rows: where torch has no better way it keeps them
_PRODUCTS = 8 << 20


@dataclass(frozen=True, slots=True)
class _Bands:
    """How a spectrum (N, K) lies in the four bands of a transform."""

    outputs: int
    inputs: int
    taps: int

    @property
    def height(self) -> int:
        """H: half of the rows, with a margin for what the filter takes away."""
        return (self.outputs + self.taps - 1) // 2

    @property
    def width(self) -> int:
        """V."""
        return (self.inputs + self.taps - 1) // 2

    @property
    def step(self) -> int:
        """Rows of the result that are made at a time."""
        rows = _PRODUCTS // (self.taps**2 * self.width)
        # the rows of bands at the edges are used twice
        return max(self.taps, 2 * rows - self.taps)

    def place(self, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return band, row and column of positions in the order of rows."""
        rows = places // self.inputs + (2 * self.height - self.outputs) // 2
        columns = places % self.inputs + (2 * self.width - self.inputs) // 2
        is_low, is_right = rows >= self.height, columns >= self.width
        band = is_low * 2 + is_right
        return band, rows - is_low * self.height, columns - is_right * self.width

    def needed(self, begin: int, end: int) -> tuple[int, int, int]:
        """Return the rows of bands for a range of the result's, and where that begins in theirs."""
        first, edge = begin // 2, self.taps - 2
        last = min(self.height, (end + edge - 1) // 2 + 1)
        return first, last, begin + edge - 2 * first


@dataclass(frozen=True, slots=True)
class WaveTerm(WholeTerm):
    """Add a spectrum, or its transform."""

    spectrum: StoredTensor
    """(n,)"""
    scaling: float
    seed: int
    wavelet: str | None
    """None if the entries are the delta's."""
    item_bytes: int
    """Of an entry of the delta."""

    @property
    def factors(self) -> tuple[StoredTensor, ...]:
        """The spectrum."""
        return (self.spectrum,)

    def work_bytes(self, shape: tuple[int, ...]) -> int:
        """Return the bytes of the permutation, or of what comes after it.

        That is the delta, and what the transform of a range of rows takes.
        """
        permutation = 8 * prod(shape)
        sparse = 150 * prod(self.spectrum.shape) + _FIXED_BYTES
        if self.wavelet is None:
            return permutation + sparse
        bands = _Bands(*self.size(shape), len(lowpass(self.wavelet)))
        height = (min(bands.step, bands.outputs) + bands.taps) // 2 + 1
        # bands and result, both of the range before as well, a copy, and at worst all products
        piece = (height + 1) * (bands.width + bands.taps) * (4 * 5 + bands.taps**2)
        return max(permutation, self.item_bytes * (prod(shape) + piece)) + sparse

    def delta(self, factors: list[torch.Tensor], weight: Weight) -> torch.Tensor:
        """Transform the spectrum."""
        (spectrum,) = factors
        outputs, inputs = self.size(weight.shape)
        places = random_places(outputs, inputs, count=len(spectrum), seed=self.seed)
        delta = spectrum.new_zeros(outputs, inputs)
        if self.wavelet is None:
            delta.view(-1)[places] = spectrum
        else:
            filters = _filters(self.wavelet, spectrum)
            bands = _Bands(outputs, inputs, filters.shape[-1])
            _transform(delta, spectrum, places, bands=bands, filters=filters)
        delta.mul_(self.scaling)
        return delta if self.gain == 1.0 else delta.mul_(self.gain)


@dataclass(frozen=True, slots=True)
class _Settings:
    count: int
    pattern: dict[str, int]
    is_proportional: bool
    scaling: float
    seed: int
    wavelet: str | None
    """None if the entries are the delta's."""


class WaveFt(Tuner):
    """`peft_type: WAVEFT`."""

    peft_type = "WAVEFT"
    title = "WaveFT"
    formula = "W + scaling * idwt2(S)"
    factors = frozenset({"waveft_spectrum"})
    options = frozenset(
        {
            "n_frequency", "n_frequency_pattern", "proportional_parameters", "random_loc_seed",
            "scaling", "use_idwt", "wavelet_family",
        }
    )  # fmt: skip
    is_additive = True
    remarks = "needs the whole delta, and 8 bytes per entry of it"

    def read(self, options: Options) -> _Settings:
        """Read the numbers of entries, the scaling, the seed and the wavelet.

        Raises:
            AdapterError: The wavelet is one that PEFT has no right filter of.
        """
        wavelet = options.text("wavelet_family") or "db1"
        has_transform = options.flag("use_idwt", default=True)
        if has_transform and wavelet not in wavelet_names():
            raise AdapterError(
                "adapter uses a wavelet that PEFT has no usable filter of",
                where=options.path,
                expected=", ".join(wavelet_names()),
                got=f"wavelet_family: {wavelet[:40]!r}",
            )
        return _Settings(
            options.count("n_frequency", 2592),
            options.pattern("n_frequency_pattern", whole=True),
            options.flag("proportional_parameters"),
            options.number("scaling", 25.0),
            seed_of(options, "random_loc_seed", 777),
            wavelet if has_transform else None,
        )

    def check(self, module: AdapterModule, settings: _Settings) -> None:
        """Check the spectrum's length.

        Raises:
            AdapterError: It is not that of adapter_config.json.
        """
        count = first_match(settings.pattern, module.module, settings.count)
        # where layers share a number of entries, it depends on the sizes of all of them
        expected = None if settings.is_proportional else count
        check_spectrum(module, "waveft_spectrum", expected=expected)

    def plan(self, layer: Layer, settings: _Settings, shared: Shared) -> Sequence[PlannedTerm]:
        """Plan the transform."""
        (spectrum,) = layer.module.need("waveft_spectrum")
        size = prod(linear_size(layer, allows_conv1d=True))
        expected = prod(spectrum.shape)
        if settings.is_proportional:
            sizes = [prod(linear_size(each, allows_conv1d=True)) for each in shared.layers]
            share = size / sum(sizes) * (settings.count * len(sizes))
            expected = max(1, round(share))
        if prod(spectrum.shape) != expected or expected > size:
            got = f"'{spectrum.name}' {spectrum.shape}, not of {expected} entries"
            raise layer.mismatch(got)
        term = WaveTerm(
            layer.is_transposed,
            spectrum,
            settings.scaling,
            settings.seed,
            settings.wavelet,
            8 if layer.weight.dtype is Dtype.F64 else 4,
        )
        return [PlannedTerm("weight", term)]

    def describe(self, module: AdapterModule, settings: _Settings) -> dict[str, Any]:
        """Give the number of entries, the scaling and the wavelet."""
        (spectrum,) = module.need("waveft_spectrum")
        return {
            "entries": spectrum.shape[0],
            "scaling": settings.scaling,
            "wavelet": settings.wavelet,
            "dtype": spectrum.dtype.value,
        }


TUNERS: tuple[Tuner, ...] = (WaveFt(),)


def _filters(name: str, like: torch.Tensor) -> torch.Tensor:
    """Return the filters of the four bands, (4, 1, L, L), in the dtype of a tensor."""
    import torch  # noqa: PLC0415 (planning needs no torch)

    taps = lowpass(name)
    low = like.new_tensor(taps)
    high = like.new_tensor([tap * (-1) ** at for at, tap in enumerate(reversed(taps))])
    pairs = (low, low), (high, low), (low, high), (high, high)
    return torch.stack([down[:, None] * across[None] for down, across in pairs])[:, None]


def _transform(
    delta: torch.Tensor,
    spectrum: torch.Tensor,
    places: torch.Tensor,
    *,
    bands: _Bands,
    filters: torch.Tensor,
) -> None:
    """Transform a spectrum into `delta`, one range of rows after the other."""
    import torch  # noqa: PLC0415 (planning needs no torch)

    entries = bands.place(places)
    order = entries[1].argsort(stable=True)
    band, row, column, values = (part[order] for part in (*entries, spectrum))
    for begin in range(0, bands.outputs, bands.step):
        end = min(bands.outputs, begin + bands.step)
        first, last, at = bands.needed(begin, end)
        low, high = torch.searchsorted(row, torch.tensor([first, last])).tolist()
        dense = values.new_zeros(1, 4, last - first, bands.width)
        dense[0, band[low:high], row[low:high] - first, column[low:high]] = values[low:high]
        made = torch.nn.functional.conv_transpose2d(dense, filters, stride=2)[0, 0]
        edge = bands.taps - 2
        delta[begin:end] = made[at : at + end - begin, edge : edge + bands.inputs]
