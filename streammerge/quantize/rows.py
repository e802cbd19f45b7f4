"""Rows of a calibration source: files, folders, datasets of the hub, and the text that comes along.

JSON, JSON lines, CSV and plain text are read without the package `datasets`: that is quicker, needs
no copy in its cache, and works where it is not installed. Parquet and arrow files, datasets saved
to disk and the hub are left to it.
"""

from __future__ import annotations

import importlib
import re
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streammerge.checkpoint.hub import HubOptions
from streammerge.errors import QuantizationError, UnsupportedError
from streammerge.quantize.rowfiles import (
    TEXT_ROW_BYTES,
    ChainedRows,
    CsvRows,
    JsonLineRows,
    Rows,
    TextRows,
    columns_of,
    open_json,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ["BUILTIN", "Reading", "Source", "StreamedRows", "open_rows", "parse_source"]

BUILTIN = "builtin"
# rows of the hub that are held back and shuffled
SHUFFLE_ROWS = 2000
_SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow", ".txt")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*){0,2}")


@dataclass(frozen=True, slots=True)
class Source:
    """Where rows come from."""

    name: str
    """`builtin`, a path, or a hub id, which a third part says the configuration of."""
    path: Path | None
    """Of a file or a folder."""
    split: str
    column: str | None
    """The column with the text, where it was named."""


@dataclass(frozen=True, slots=True)
class Reading:
    """How rows are wanted."""

    seed: int = 0
    """Of the order of streamed rows."""
    any_order: bool = False
    """Whether any row must be at hand, so that nothing can be streamed."""
    by_line: bool = False
    """Whether each line of a text file is a row."""
    hub: HubOptions = field(default_factory=HubOptions)


def parse_source(text: str) -> Source:
    """Read `builtin`, a path or a hub id, with `:split` and `:column` behind it if need be.

    Raises:
        QuantizationError: It is none of these, or a path where nothing is.
    """
    if text == BUILTIN:
        return Source(BUILTIN, Path(__file__).with_name("builtin.txt"), "train", None)
    whole = _existing(text)
    if whole is not None:
        return Source(text, whole, "train", None)
    name, *options = text.split(":")
    split, column = ([*options, "", ""])[:2]
    path = _existing(name)
    if path is not None and len(options) <= 2:
        return Source(name, path, split or "train", column or None)
    is_file = Path(name).suffix.lower() in _SUFFIXES
    if is_file or not _HUB_ID.fullmatch(name) or len(options) > 2:
        raise QuantizationError(
            "calibration data does not exist",
            where=text,
            expected="a file, a folder, a hub id as name:split:column, or builtin",
            hint="check export_quantization_dataset",
        )
    return Source(name, None, split or "train", column or None)


def _existing(name: str) -> Path | None:
    try:
        path = Path(name).expanduser()
        return path if name and path.exists() else None
    except (OSError, RuntimeError):
        # no such user's home, or a name longer than a file system takes
        return None


def open_rows(source: Source, reading: Reading) -> Rows | StreamedRows:
    """Find the rows of a source; what is large stays where it is.

    Raises:
        QuantizationError: The source cannot be read, or has no rows.
        UnsupportedError: `datasets` is needed and missing.
    """
    if source.path is None:
        return _open_hub(source, reading)
    rows = _open_folder(source, reading) if source.path.is_dir() else _open(source.path, reading)
    if not len(rows):
        raise QuantizationError("calibration data has no rows", where=source.name)
    return rows


def _open(path: Path, reading: Reading) -> Rows:
    suffix = path.suffix.lower()
    if suffix == ".json":
        return open_json(path)
    if suffix in {".jsonl", ".ndjson"}:
        return JsonLineRows(path)
    if suffix in {".csv", ".tsv"}:
        return CsvRows(path, "\t" if suffix == ".tsv" else ",")
    if suffix == ".txt":
        return TextRows(path, row_bytes=1 if reading.by_line else TEXT_ROW_BYTES)
    if suffix in {".parquet", ".arrow"}:
        return _open_table(path, reading)
    raise QuantizationError(
        "calibration data is of a kind that is not read",
        where=path,
        expected=", ".join(_SUFFIXES),
        hint="decompress or convert it",
    )


def _open_folder(source: Source, reading: Reading) -> Rows:
    folder = source.path
    assert folder is not None
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        return _open_saved(source)
    paths = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in _SUFFIXES
        and path.is_file()
        and path.name != "dataset_info.json"
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    # as the hub has it: files named after a split belong to it, and unnamed ones to train
    word = re.compile(rf"(?:^|[^a-z]){re.escape(source.split.lower())}(?:[^a-z]|$)")
    named = [path for path in paths if word.search(str(path.relative_to(folder)).lower())]
    if not named and source.split != "train":
        paths = []
    parts = [_open(path, reading) for path in named or paths]
    if not parts:
        raise QuantizationError(
            f"folder has no calibration data of the split '{source.split}'",
            where=folder,
            expected=f"files of the kinds {', '.join(_SUFFIXES)}",
        )
    return parts[0] if len(parts) == 1 else ChainedRows(parts)


# what the package datasets reads


class _Table(Rows):
    """A dataset in memory-mapped arrow files."""

    def __init__(self, table: Any) -> None:
        self._table = table
        self.columns = list(table.column_names)

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int, /) -> Mapping[str, Any]:
        row: Mapping[str, Any] = self._table[index]
        return row


class StreamedRows:
    """Rows of the hub, fetched while they are read, in an order of the seed."""

    def __init__(self, stream: Any, name: str) -> None:
        self._stream, self._name = stream, name
        with _faults(name):
            known = stream.column_names or columns_of(stream.take(1))
        self.columns: list[str] = list(known)

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        rows = iter(self._stream)
        while True:
            with _faults(self._name):
                row = next(rows, None)
            if row is None:
                return
            yield row


def _open_table(path: Path, reading: Reading) -> Rows:
    datasets = _datasets(f"{path.suffix} files")
    cache = reading.hub.cache_dir and str(reading.hub.cache_dir)
    with _faults(str(path)):
        if path.suffix.lower() == ".parquet":
            return _Table(datasets.Dataset.from_parquet(str(path), cache_dir=cache))
        try:
            return _Table(datasets.Dataset.from_file(str(path)))
        except OSError:
            # written as a file of record batches, not as a stream of them
            files = {"data_files": [str(path)], "split": "train", "cache_dir": cache}
            return _Table(datasets.load_dataset("arrow", **files))


def _open_saved(source: Source) -> Rows:
    datasets = _datasets("datasets saved to disk")
    with _faults(source.name):
        found = datasets.load_from_disk(str(source.path))
    if isinstance(found, dict):
        if source.split not in found:
            raise QuantizationError(
                f"dataset has no split '{source.split}'",
                where=source.name,
                expected=", ".join(found),
            )
        found = found[source.split]
    return _Table(found)


def _open_hub(source: Source, reading: Reading) -> Rows | StreamedRows:
    datasets = _datasets("datasets of the hub")
    hub = reading.hub
    # without a network only a whole dataset that was fetched before can be read
    is_offline = hub.local_files_only or datasets.config.HF_HUB_OFFLINE
    is_streamed = not (reading.any_order or is_offline)
    parts = source.name.split("/")
    name, configuration = "/".join(parts[:2]), "".join(parts[2:]) or None
    options: dict[str, Any] = {"split": source.split, "token": hub.token}
    if hub.cache_dir is not None:
        options["cache_dir"] = str(hub.cache_dir)
    if hub.local_files_only:
        options["download_config"] = datasets.DownloadConfig(local_files_only=True)
    with _faults(source.name):
        found = datasets.load_dataset(name, configuration, streaming=is_streamed, **options)
        if is_streamed:
            found = found.shuffle(seed=reading.seed, buffer_size=SHUFFLE_ROWS)
    if is_streamed:
        return StreamedRows(found, source.name)
    if not len(found):
        raise QuantizationError("calibration data has no rows", where=source.name)
    return _Table(found)


@contextmanager
def _faults(where: str) -> Iterator[None]:
    """Report whatever `datasets` raises, of which there are many kinds, in one line."""
    try:
        yield
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise QuantizationError(
            f"calibration data cannot be read ({reason})",
            where=where,
            hint="check the name, its split and configuration, hf_hub_token and the network; "
            "a file, a folder or 'builtin' needs no network",
        ) from error


def _datasets(what: str) -> Any:
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise UnsupportedError(
            f"{what} need the package datasets",
            hint="pip install 'streammerge[quantize]', or use json, jsonl, csv or txt",
        ) from error
    # what is on stderr is one progress, not several
    datasets.disable_progress_bars()
    return datasets
