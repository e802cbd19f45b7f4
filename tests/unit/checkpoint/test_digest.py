"""Digests are those of hashlib and xxhash, however the bytes come."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, get_args

import pytest
import xxhash

from streammerge.checkpoint import digest as digest_module
from streammerge.checkpoint.digest import digest_file, new_digest
from streammerge.config.tuning import DigestKind

if TYPE_CHECKING:
    from pathlib import Path

DATA = bytes(n * 11 % 253 for n in range(10_007))
EXPECTED: dict[DigestKind, str] = {
    "xxh3-128": xxhash.xxh3_128(DATA).hexdigest(),
    "sha256": hashlib.sha256(DATA).hexdigest(),
    "none": "",
}


def test_every_kind_is_tested() -> None:
    assert EXPECTED.keys() == set(get_args(DigestKind))


@pytest.mark.parametrize("kind", EXPECTED)
@pytest.mark.parametrize("step", [1, 1000, 4096, len(DATA)])
def test_a_digest_does_not_depend_on_the_pieces(kind: DigestKind, step: int) -> None:
    digest = new_digest(kind)
    digest.update(b"")
    for at in range(0, len(DATA), step):
        digest.update(memoryview(DATA)[at : at + step])
    assert digest.hexdigest() == EXPECTED[kind]


@pytest.mark.parametrize("kind", EXPECTED)
@pytest.mark.parametrize("chunk", [1000, 1 << 20])
def test_the_digest_of_a_file(
    kind: DigestKind, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digest_module, "_CHUNK_BYTES", chunk)
    path = tmp_path / "file"
    path.write_bytes(DATA)
    assert digest_file(path, kind=kind) == EXPECTED[kind]


@pytest.mark.parametrize("kind", EXPECTED)
def test_the_digest_of_an_empty_file(kind: DigestKind, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    assert digest_file(path, kind=kind) == new_digest(kind).hexdigest()


def test_without_a_digest_no_file_is_read(tmp_path: Path) -> None:
    assert digest_file(tmp_path / "absent", kind="none") == ""
