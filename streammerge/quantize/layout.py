"""How the linears of a quantized checkpoint are stored, whatever the method."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from streammerge.quantize.codebooks import CodebookLayout
from streammerge.quantize.pack import PackedLayout

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from streammerge.checkpoint.header import TensorSpec
    from streammerge.dtypes import Dtype
    from streammerge.quantize.settings import QuantizeSettings
    from streammerge.quantize.skeleton import QuantizedModule

__all__ = ["Layout", "layout_of"]


class Layout(Protocol):
    """What a checkpoint holds for each linear."""

    @property
    def ends(self) -> tuple[str, ...]:
        """Ends of the names of what stands in a weight's place, with a full stop before them."""

    def tensors(
        self, name: str, *, rows: int, features: int, bias: Dtype | None = None
    ) -> tuple[TensorSpec, ...]:
        """Return what is stored for a linear of (N, K), in the order of the file."""

    def check(self, rows: int, features: int, *, where: str | None = None) -> None:
        """Make sure that a weight of (N, K) can be held; raise `QuantizationError` if not."""

    def loader_note(self, modules: Sequence[QuantizedModule]) -> str | None:
        """Say which linears some loaders do not take, if there are such."""

    def weights(self, stored: Mapping[str, tuple[int, ...]]) -> int:
        """Return how many weights stand in tensors, of which it is told names and shapes."""


def layout_of(settings: QuantizeSettings) -> Layout:
    """Return the layout that settings lead to."""
    if settings.codebooks is not None:
        return CodebookLayout(settings.codebooks)
    return PackedLayout.of(settings)
