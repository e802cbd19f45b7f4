"""LN tuning (Zhao et al. 2023): normalisation layers, trained whole.

Every parameter and buffer of the layer is stored, and takes the place of the base's.

Source: peft.tuners.ln_tuning.layer.
"""

from __future__ import annotations

from streammerge.adapters.tuners.base import Tuner

__all__ = ["TUNERS", "LnTuning"]


class LnTuning(Tuner):
    """`peft_type: LN_TUNING`."""

    peft_type = "LN_TUNING"
    title = "LN tuning"
    formula = "the parameters of norms are replaced"
    factors = frozenset[str]()
    replaces = frozenset({"ln_tuning_layers"})


TUNERS: tuple[Tuner, ...] = (LnTuning(),)
