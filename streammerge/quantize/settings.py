"""How a checkpoint is quantized: what of the configuration the second stage needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from streammerge.quantize.linear import Grid

if TYPE_CHECKING:
    from streammerge.config.codebooks import Codebooks

__all__ = ["CheckpointFormat", "Method", "QuantizeSettings", "Sampling"]

Method = Literal["gptq", "awq", "rtn", "aqlm"]
CheckpointFormat = Literal["gptq", "gptq_v2"]
Sampling = Literal["blocks", "llamafactory"]


@dataclass(frozen=True, slots=True)
class QuantizeSettings:
    """Everything that changes the codes."""

    method: Method = "gptq"
    bits: float = 4
    """Of a code; a whole number, except with codebooks, where it is a weight's share of codes."""
    group_size: int = 128
    """Inputs per scale; -1 for one scale per row."""
    is_symmetric: bool = True
    act_order: bool = True
    """Take the inputs of greatest magnitude first, groups fixed beforehand (GPTQ)."""
    desc_act: bool = False
    """Form the groups in that order too (GPTQ)."""
    damp: float = 0.05
    """Share of the mean diagonal that is added to the matrix of inputs (GPTQ, AQLM)."""
    checkpoint_format: CheckpointFormat = "gptq"
    nsamples: int = 128
    maxlen: int = 1024
    """Tokens per sample."""
    seed: int = 0
    sampling: Sampling = "blocks"
    codebooks: Codebooks | None = None
    """In the place of codes for single weights (AQLM)."""

    @property
    def grid(self) -> Grid:
        """The codes there are, for methods without codebooks."""
        return Grid(int(self.bits), self.is_symmetric)
