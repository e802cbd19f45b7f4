"""The package's own promises: public names, and what a user's first command costs."""

from __future__ import annotations

import subprocess
import sys

import pytest

import streammerge
from streammerge import errors


def test_every_public_name_is_there() -> None:
    for name in streammerge.__all__:
        assert getattr(streammerge, name) is not None
    assert dir(streammerge) == sorted(streammerge.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = streammerge.nothing


def test_every_error_is_public() -> None:
    assert set(errors.__all__) <= set(streammerge.__all__)


def test_help_loads_neither_torch_nor_pydantic_nor_numpy() -> None:
    program = (
        "import sys; sys.argv = ['streammerge', '--help']\n"
        "from streammerge.cli.app import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print(sorted({'torch', 'pydantic', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("package", ["adapters", "checkpoint", "config", "plan", "report"])
def test_what_plans_loads_no_torch(package: str) -> None:
    # terms of adapters import it where they do their arithmetic, and only then
    program = (
        "import importlib, pkgutil, sys\n"
        f"import streammerge.{package} as package\n"
        "walked = pkgutil.walk_packages(package.__path__, package.__name__ + '.')\n"
        "names = [info.name for info in walked]\n"
        "for name in names:\n    importlib.import_module(name)\n"
        "print(len(names), sorted({'torch', 'transformers', 'peft'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    count, loaded = done.stdout.split(maxsplit=1)
    assert int(count) > 0
    assert loaded.strip() == "[]"
