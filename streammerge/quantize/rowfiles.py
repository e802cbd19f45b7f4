"""Rows of plain files: JSON, JSON lines, CSV and text, by their offsets.

Any row is one seek away, what is in memory is a number per row, and nothing is copied to a cache.
"""

from __future__ import annotations

import csv
import json
from abc import ABC, abstractmethod
from array import array
from typing import TYPE_CHECKING, Any, BinaryIO

from streammerge.errors import QuantizationError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

__all__ = ["ChainedRows", "CsvRows", "JsonLineRows", "Rows", "TextRows", "columns_of", "open_json"]

# rows that are looked at to find out which columns there are
LOOK_AT = 100
# of a text file: consecutive lines that make up a row, about as many bytes as 1024 tokens have
TEXT_ROW_BYTES = 4096
# columns of one JSON document that hold its rows
_DOCUMENT_ROWS = ("data", "train", "rows", "examples", "instances")


class Rows(ABC):
    """Rows that can be taken in any order."""

    columns: Sequence[str]

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int, /) -> Mapping[str, Any]: ...


class _Memory(Rows):
    def __init__(self, rows: list[Mapping[str, Any]]) -> None:
        self.rows = rows
        self.columns = columns_of(rows[:LOOK_AT])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int, /) -> Mapping[str, Any]:
        return self.rows[index]


class JsonLineRows(Rows):
    """A JSON value per line; blank lines do not count."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offsets = array("q")
        with path.open("rb") as file:
            begin = 0
            for line in file:
                if line.strip():
                    self._offsets.append(begin)
                begin += len(line)
        self.columns = columns_of(self[index] for index in range(min(LOOK_AT, len(self))))

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index: int, /) -> Mapping[str, Any]:
        where = f"{self.path}, row {index + 1}"
        with self.path.open("rb") as file:
            file.seek(self._offsets[index])
            line = _decode(file.readline(), where)
        try:
            value = json.loads(line)
        except ValueError as error:
            raise QuantizationError(f"row is not JSON ({error})", where=where) from error
        return _row(value, where)


class CsvRows(Rows):
    """A file with a row of names at its top; a row may go over several lines."""

    def __init__(self, path: Path, delimiter: str) -> None:
        self.path, self._delimiter = path, delimiter
        self._offsets = array("q")
        # a cell may hold a whole document
        csv.field_size_limit(1 << 30)
        with path.open("rb") as file:
            lines = _Lines(file, str(path))
            reader = csv.reader(lines, delimiter=delimiter)
            try:
                self.columns = next(reader, [])
                begin = lines.end
                for cells in reader:
                    if cells:
                        self._offsets.append(begin)
                    begin = lines.end
            except csv.Error as error:
                raise QuantizationError(
                    f"file is not CSV ({error})", where=f"{path}, line {reader.line_num}"
                ) from error

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index: int, /) -> Mapping[str, Any]:
        with self.path.open("rb") as file:
            file.seek(self._offsets[index])
            lines = _Lines(file, f"{self.path}, row {index + 1}")
            cells = next(csv.reader(lines, delimiter=self._delimiter))
        return dict(zip(self.columns, cells, strict=False))


class _Lines:
    """Text lines, and how many bytes they were."""

    def __init__(self, file: BinaryIO, where: str) -> None:
        self._file, self._where = file, where
        self.end = 0

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self._file.readline()
        if not line:
            raise StopIteration
        self.end += len(line)
        return _decode(line, self._where)


class TextRows(Rows):
    """Consecutive lines of a text file, at least so many bytes of them a row."""

    def __init__(self, path: Path, *, row_bytes: int = TEXT_ROW_BYTES) -> None:
        self.path = path
        self.columns = ["text"]
        self._offsets = array("q", [0])
        end = 0
        with path.open("rb") as file:
            for line in file:
                end += len(line)
                if end - self._offsets[-1] >= row_bytes:
                    self._offsets.append(end)
        if self._offsets[-1] != end:
            self._offsets.append(end)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, index: int, /) -> Mapping[str, Any]:
        begin, end = self._offsets[index], self._offsets[index + 1]
        with self.path.open("rb") as file:
            file.seek(begin)
            text = _decode(file.read(end - begin), f"{self.path}, byte {begin}")
        return {"text": text.rstrip("\r\n")}


class ChainedRows(Rows):
    """The rows of several files."""

    def __init__(self, parts: Sequence[Rows]) -> None:
        self.parts = parts
        self.columns = list(dict.fromkeys(name for part in parts for name in part.columns))

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    def __getitem__(self, index: int, /) -> Mapping[str, Any]:
        for part in self.parts:
            if index < len(part):
                return part[index]
            index -= len(part)
        raise IndexError(index)


def open_json(path: Path) -> Rows:
    """Open an array of rows, a document that holds one, or what are lines of JSON in truth."""
    with path.open("rb") as file:
        first = next((line for line in file if line.strip()), b"")
        has_more = any(line.strip() for line in file)
    if first.lstrip(b"\xef\xbb\xbf \t").startswith(b"{") and has_more:
        try:
            json.loads(first)
        except ValueError:
            pass
        else:
            return JsonLineRows(path)
    text = _decode(path.read_bytes(), str(path))
    try:
        value = json.loads(text) if text.strip() else []
    except ValueError as error:
        raise QuantizationError(f"file is not JSON ({error})", where=path) from error
    if isinstance(value, dict):
        held = [value[key] for key in _DOCUMENT_ROWS if isinstance(value.get(key), list)]
        value = held[0] if len(held) == 1 else [value]
    if not isinstance(value, list):
        raise QuantizationError("file is not an array of rows", where=path)
    rows = [_row(row, f"{path}, row {number}") for number, row in enumerate(value, start=1)]
    return _Memory(rows)


def _row(value: object, where: str) -> Mapping[str, Any]:
    if isinstance(value, dict):
        return value
    if isinstance(value, str):
        return {"text": value}
    raise QuantizationError(
        "row is neither an object nor text", where=where, got=type(value).__name__
    )


def columns_of(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the names of all columns, in the order in which rows have them."""
    return list(dict.fromkeys(str(name) for row in rows for name in row))


def _decode(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise QuantizationError("text is not UTF-8", where=where, got=error.reason) from error
