"""Modules that these tests share."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
# the pretended driver of the kernels' tests is used here too
sys.path[:0] = [str(HERE), str(HERE.parent / "kernels")]
