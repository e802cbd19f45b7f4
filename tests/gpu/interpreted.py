"""Run exports whose kernels triton's interpreter runs, and print what they said as JSON.

A program of its own, as that of the kernels' tests is: whether triton interprets is decided when it
is imported. Their correction of the interpreter is used here too.

    python interpreted.py FILE              a list of configurations, or of what to tune
"""

from __future__ import annotations

import functools
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "kernels")]
os.environ["TRITON_INTERPRET"] = "1"
# where an export asks for its devices
os.environ["STREAMMERGE_BACKEND"] = "triton-interpret"

if TYPE_CHECKING:
    from streammerge.backends.gpus import Gpus


@functools.cache
def correct_interpreter() -> None:
    import interpreter_patch

    interpreter_patch.apply()


def find_gpus() -> Gpus:
    from simulated import SimulatedRuntime

    from streammerge.backends.device_merge import load_kernels
    from streammerge.backends.gpus import Gpus

    correct_interpreter()
    return Gpus((SimulatedRuntime(), SimulatedRuntime(eager=("in", "out"))), load_kernels())


def main() -> None:
    import streammerge

    wanted = json.loads(Path(sys.argv[1]).read_text())
    sys.stdout.write(json.dumps([streammerge.export(settings).notes for settings in wanted]))


if __name__ == "__main__":
    main()
