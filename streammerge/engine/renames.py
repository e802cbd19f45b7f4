"""Ask transformers, if it is installed, for its in-memory names of a checkpoint's tensors.

Adapters carry in-memory names, checkpoints carry the names of the hub, and transformers 5 renames
between them at load time for some families. The question is put to a process of its own: it builds
the model's skeleton on the meta device from config.json alone, and its memory is gone with it.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["transformers_renames"]

TIMEOUT_SECONDS = 300


def transformers_renames(folder: Path, names: Iterable[str]) -> tuple[dict[str, str], str | None]:
    """Map in-memory names to checkpoint names.

    Args:
        folder: The base checkpoint, for its config.json.
        names: The checkpoint's tensor names.

    Returns:
        The names that differ, and a note if transformers could not be asked.
    """
    if importlib.util.find_spec("transformers") is None:
        return {}, "transformers is not installed: its renames of layers are not known"
    try:
        answer = subprocess.run(  # noqa: S603 (our own program)
            [sys.executable, "-m", "streammerge.engine.inmemory_names", str(folder.resolve())],
            input=json.dumps(list(names)),
            capture_output=True,
            text=True,
            timeout=TIMEOUT_SECONDS,
            check=True,
            # not the current folder, whose files python would take for modules
            cwd=Path(__file__).parents[2],
        )
        renames = json.loads(answer.stdout.splitlines()[-1])
        if not isinstance(renames, dict):
            return {}, "transformers could not name the layers (it gave no map)"
    except subprocess.CalledProcessError as error:
        lines = str(error.stderr or error).strip().splitlines()
        return {}, f"transformers could not name the layers ({lines[-1]})"
    except (subprocess.SubprocessError, ValueError, IndexError) as error:
        return {}, f"transformers could not name the layers ({error})"
    return renames, None
