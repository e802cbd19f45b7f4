"""Read small JSON files that nobody vouches for."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from streammerge.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["check_regular", "read_json_object"]

# the index of a 671B model with 90,000 tensors is 9 MB
MAX_JSON_BYTES = 256_000_000


def check_regular(path: Path, *, error: type[InputError]) -> None:
    """Refuse what is not a regular file: a pipe would be waited for, for ever.

    Raises:
        error: It exists and is something else.
    """
    if path.exists() and not path.is_file():
        raise error("not a regular file", where=path)


def read_json_object(path: Path, *, error: type[InputError]) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        error: The file is missing, too large, not JSON, or not an object.
    """
    try:
        check_regular(path, error=error)
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise error("JSON file is too large", where=path, expected=MAX_JSON_BYTES, got=size)
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise error("file is missing", where=path) from None
    except OSError as fault:
        raise error(f"cannot read the file ({fault.strerror})", where=path) from fault
    except (ValueError, RecursionError) as fault:
        if isinstance(fault, InputError):
            raise
        raise error("file is not valid JSON", where=path, got=fault) from fault
    if not isinstance(value, dict):
        raise error("JSON file does not hold an object", where=path, got=type(value).__name__)
    return value
