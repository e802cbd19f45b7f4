"""Modules that these tests share, and the models that they merge."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    from models import Merge

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def merge_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Merge]:
    """Give a base, an adapter and what PEFT makes of them; each is made once."""
    from models import Merge  # noqa: PLC0415 (found by the path above)

    made: dict[tuple[object, ...], Merge] = {}

    def get(model: str = "llama", dtype: str = "bfloat16", adapters: str = "lora") -> Merge:
        key = (model, dtype, adapters)
        if key not in made:
            made[key] = Merge(tmp_path_factory.mktemp("merge"), *key)
        return made[key]

    return get
