"""Rows of calibration sources, and the texts that are in them."""

from __future__ import annotations

import csv
import json
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import datasets
import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from jinja2 import TemplateError

from streammerge.checkpoint.hub import HubOptions
from streammerge.errors import QuantizationError, UnsupportedError
from streammerge.quantize import rows as rows_module
from streammerge.quantize.rowfiles import TEXT_ROW_BYTES, CsvRows, JsonLineRows, Rows, TextRows
from streammerge.quantize.rows import Reading, StreamedRows, open_rows, parse_source
from streammerge.quantize.texts import Renderer, Text

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from streammerge.errors import StreamMergeError

ROWS = [{"text": f"row {number}", "id": number} for number in range(5)]


def opened(text: object, reading: Reading | None = None) -> Rows:
    rows = open_rows(parse_source(str(text)), reading or Reading())
    assert isinstance(rows, Rows)
    return rows


def listed(rows: Rows) -> list[Mapping[str, Any]]:
    return [rows[index] for index in range(len(rows))]


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class TestJson:
    @pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.json"])
    def test_lines(self, tmp_path: Path, name: str) -> None:
        path = write_lines(tmp_path / name, ROWS)
        rows = opened(path)
        assert isinstance(rows, JsonLineRows)
        assert listed(rows) == ROWS
        assert list(rows.columns) == ["text", "id"]

    def test_blank_lines_marks_and_a_missing_last_newline(self, tmp_path: Path) -> None:
        path = tmp_path / "a.jsonl"
        path.write_bytes('\ufeff{"text": "ä"}\r\n\n  \n{"other": 1}'.encode())
        rows = opened(path)
        assert listed(rows) == [{"text": "ä"}, {"other": 1}]
        assert list(rows.columns) == ["text", "other"]

    @pytest.mark.parametrize(
        "document",
        [ROWS, {"version": 1, "data": ROWS}, {"train": ROWS, "license": "x"}],
        ids=["array", "data", "train"],
    )
    @pytest.mark.parametrize("indent", [None, 2])
    def test_one_document(self, tmp_path: Path, document: Any, indent: int | None) -> None:
        path = tmp_path / "a.json"
        path.write_text(json.dumps(document, indent=indent))
        assert listed(opened(path)) == ROWS

    def test_texts_alone(self, tmp_path: Path) -> None:
        path = tmp_path / "a.json"
        path.write_text('["one", "two"]')
        assert listed(opened(path)) == [{"text": "one"}, {"text": "two"}]

    def test_one_row_alone(self, tmp_path: Path) -> None:
        path = tmp_path / "a.json"
        path.write_text('{\n"text": "one"\n}')
        assert listed(opened(path)) == [{"text": "one"}]

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("a.jsonl", b'{"text": "a"}\n{"text": \n', "row is not JSON .*row 2"),
            ("a.jsonl", b'{"text": "\xff"}\n', "not UTF-8, in .*row 1"),
            ("a.jsonl", b"[1, 2]\n", "neither an object nor text, in .*row 1; got list"),
            ("a.json", b"[1, 2]", "neither an object nor text, in .*row 1; got int"),
            ("a.json", b"[{]", "file is not JSON"),
            ("a.json", b'{"a": 1}}', "file is not JSON"),
            ("a.json", b"17", "not an array of rows"),
            ("a.json", b"\xff\xfe", "not UTF-8"),
        ],
    )
    def test_damaged(self, tmp_path: Path, name: str, content: bytes, message: str) -> None:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(QuantizationError, match=message):
            opened(tmp_path / name)

    @settings(max_examples=25, deadline=None)
    @given(values=st.lists(st.dictionaries(st.text(max_size=3), st.text(max_size=20), max_size=3)))
    def test_any_lines(self, tmp_path_factory: pytest.TempPathFactory, values: list[Any]) -> None:
        path = write_lines(tmp_path_factory.mktemp("rows") / "a.jsonl", values)
        assert listed(JsonLineRows(path)) == values


class TestCsv:
    def test_cells_with_newlines_quotes_and_commas(self, tmp_path: Path) -> None:
        path = tmp_path / "a.csv"
        path.write_bytes(b'id,text\r\n1,"a\r\nb, ""c"""\r\n\r\n2,d\r\n3,"e')
        rows = opened(path)
        assert list(rows.columns) == ["id", "text"]
        expected = [
            {"id": "1", "text": 'a\r\nb, "c"'},
            {"id": "2", "text": "d"},
            {"id": "3", "text": "e"},
        ]
        assert listed(rows) == expected
        # in any order
        assert rows[2] == expected[2]
        assert rows[0] == expected[0]

    def test_tabs_and_a_mark(self, tmp_path: Path) -> None:
        path = tmp_path / "a.tsv"
        path.write_bytes("\ufeffid\ttext\n1\tä, b\n".encode())
        assert listed(opened(path)) == [{"id": "1", "text": "ä, b"}]

    @settings(max_examples=25, deadline=None)
    @given(
        cells=st.lists(
            st.lists(
                st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8),
                min_size=2,
                max_size=2,
            ),
            max_size=6,
        )
    )
    def test_any_cells(
        self, tmp_path_factory: pytest.TempPathFactory, cells: list[list[str]]
    ) -> None:
        path = tmp_path_factory.mktemp("rows") / "a.csv"
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, quoting=csv.QUOTE_ALL).writerows([["a", "b"], *cells])
        # a mark at the start of a file is no text
        expected = [dict(zip("ab", row, strict=True)) for row in cells]
        assert listed(CsvRows(path, ",")) == expected


class TestText:
    def test_a_row_is_some_consecutive_lines(self, tmp_path: Path) -> None:
        path = tmp_path / "a.txt"
        lines = [f"line {number}: " + "x" * (number % 90) for number in range(500)]
        path.write_text("\n".join(lines))
        rows = opened(path)
        texts = [row["text"] for row in listed(rows)]
        assert "\n".join(texts) == "\n".join(lines)
        assert all(len(text) >= TEXT_ROW_BYTES - 1 for text in texts[:-1])
        assert len(rows) > 3

    def test_or_each_line(self, tmp_path: Path) -> None:
        path = tmp_path / "a.txt"
        path.write_bytes(b"one\r\n\r\ntwo\nthree")
        rows = opened(path, Reading(by_line=True))
        assert [row["text"] for row in listed(rows)] == ["one", "", "two", "three"]

    @settings(max_examples=25, deadline=None)
    @given(raw=st.text(st.sampled_from("ab\n"), max_size=60), row_bytes=st.integers(1, 20))
    def test_nothing_is_lost(
        self, tmp_path_factory: pytest.TempPathFactory, raw: str, row_bytes: int
    ) -> None:
        path = tmp_path_factory.mktemp("rows") / "a.txt"
        path.write_text(raw)
        found = "".join(row["text"] for row in listed(TextRows(path, row_bytes=row_bytes)))
        assert found.replace("\n", "") == raw.replace("\n", "")

    def test_the_text_that_comes_along(self) -> None:
        rows = opened("builtin")
        texts = [row["text"] for row in listed(rows)]
        assert sum(len(text) for text in texts) > 60_000
        assert len(set(texts)) == len(texts)


class TestTables:
    def test_parquet(self, tmp_path: Path) -> None:
        datasets.Dataset.from_list(ROWS).to_parquet(tmp_path / "a.parquet")
        rows = opened(tmp_path / "a.parquet", Reading(hub=HubOptions(cache_dir=tmp_path / "c")))
        assert listed(rows) == ROWS
        assert list(rows.columns) == ["text", "id"]

    def test_arrow_and_saved_datasets(self, tmp_path: Path) -> None:
        one = datasets.Dataset.from_list(ROWS)
        one.save_to_disk(tmp_path / "saved")
        assert listed(opened(tmp_path / "saved")) == ROWS
        (arrow,) = (tmp_path / "saved").glob("*.arrow")
        assert listed(opened(arrow)) == ROWS
        both = datasets.DatasetDict({"train": one, "test": one.select([3])})
        both.save_to_disk(tmp_path / "both")
        assert listed(opened(tmp_path / "both")) == ROWS
        assert listed(opened(f"{tmp_path / 'both'}:test")) == ROWS[3:4]
        with pytest.raises(QuantizationError, match=r"no split 'dev'.*expected train, test"):
            opened(f"{tmp_path / 'both'}:dev")

    def test_damaged(self, tmp_path: Path) -> None:
        for name in ("a.parquet", "a.arrow"):
            (tmp_path / name).write_bytes(b"nothing of the kind")
            with pytest.raises(QuantizationError, match="cannot be read") as caught:
                opened(tmp_path / name, Reading(hub=HubOptions(cache_dir=tmp_path / "c")))
            assert name in str(caught.value)

    def test_without_the_package(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def missing(name: str) -> None:
            raise ImportError(name)

        monkeypatch.setattr(rows_module.importlib, "import_module", missing)
        (tmp_path / "a.parquet").touch()
        for source in (str(tmp_path / "a.parquet"), "owner/name"):
            with pytest.raises(UnsupportedError, match=r"streammerge\[quantize\]"):
                opened(source)
        assert listed(opened(write_lines(tmp_path / "a.jsonl", ROWS))) == ROWS


class TestFolders:
    def test_files_in_the_order_of_their_names(self, tmp_path: Path) -> None:
        write_lines(tmp_path / "b.jsonl", ROWS[2:])
        (tmp_path / "sub").mkdir()
        (tmp_path / "a.json").write_text(json.dumps(ROWS[:2]))
        (tmp_path / "sub" / "c.txt").write_text("last")
        # what is not data
        (tmp_path / "dataset_info.json").write_text("{}")
        (tmp_path / ".cache").mkdir()
        (tmp_path / ".cache" / "x.txt").write_text("no")
        (tmp_path / "README.md").write_text("no")
        rows = opened(tmp_path)
        assert listed(rows) == [*ROWS, {"text": "last"}]
        assert list(rows.columns) == ["text", "id"]
        with pytest.raises(IndexError):
            rows[len(rows)]

    def test_splits_by_name(self, tmp_path: Path) -> None:
        write_lines(tmp_path / "train-00000.jsonl", ROWS[:3])
        write_lines(tmp_path / "test-00000.jsonl", ROWS[3:])
        assert listed(opened(tmp_path)) == ROWS[:3]
        assert listed(opened(f"{tmp_path}:test")) == ROWS[3:]
        with pytest.raises(QuantizationError, match="no calibration data of the split 'dev'"):
            opened(f"{tmp_path}:dev")

    def test_nothing_there(self, tmp_path: Path) -> None:
        with pytest.raises(QuantizationError, match=r"no calibration data.*\.jsonl"):
            opened(tmp_path)


class TestSources:
    def test_a_column_behind_a_path(self, tmp_path: Path) -> None:
        path = write_lines(tmp_path / "a.jsonl", ROWS)
        source = parse_source(f"{path}::id")
        assert (source.path, source.split, source.column) == (path, "train", "id")

    def test_a_path_with_colons(self, tmp_path: Path) -> None:
        path = write_lines(tmp_path / "a:b:c.jsonl", ROWS)
        assert parse_source(str(path)).path == path

    @pytest.mark.parametrize(
        ("text", "name", "split", "column"),
        [
            ("owner/name", "owner/name", "train", None),
            ("owner/name:test:body", "owner/name", "test", "body"),
            ("owner/name/en::body", "owner/name/en", "train", "body"),
        ],
    )
    def test_hub_ids(self, text: str, name: str, split: str, column: str | None) -> None:
        source = parse_source(text)
        assert source.path is None
        assert (source.name, source.split, source.column) == (name, split, column)

    @pytest.mark.parametrize(
        "text", ["", "/no/where", "./nowhere", "~/no/where/at/all", "~nobody/x", "no.jsonl",
                 "a/b/c/d", "a:b:c:d", "x" * 5000 + "/" + "y"]
    )  # fmt: skip
    def test_nothing_of_the_kind(self, text: str) -> None:
        if len(text) > 1000:
            assert parse_source(text).path is None
            return
        with pytest.raises(QuantizationError, match="calibration data does not exist"):
            parse_source(text)

    @pytest.mark.parametrize("name", ["a.zip", "a.jsonl.gz", "a"])
    def test_unknown_kinds(self, tmp_path: Path, name: str) -> None:
        (tmp_path / name).touch()
        with pytest.raises(QuantizationError, match=r"of a kind that is not read.*\.parquet"):
            opened(tmp_path / name)

    @pytest.mark.parametrize(
        ("name", "content"),
        [("a.jsonl", ""), ("a.json", ""), ("a.json", "[]"), ("a.csv", "text\n"), ("a.txt", "")],
    )
    def test_empty(self, tmp_path: Path, name: str, content: str) -> None:
        (tmp_path / name).write_text(content)
        with pytest.raises(QuantizationError, match="has no rows"):
            opened(tmp_path / name)


class FakeStream:
    """What `load_dataset` returns when it streams."""

    def __init__(self, rows: list[Any], column_names: list[str] | None) -> None:
        self.rows, self.column_names = rows, column_names
        self.order: tuple[int, int] | None = None

    def shuffle(self, *, seed: int, buffer_size: int) -> FakeStream:
        self.order = (seed, buffer_size)
        return self

    def take(self, count: int) -> list[Any]:
        return self.rows[:count]

    def __iter__(self) -> Iterator[Any]:
        for row in self.rows:
            if row is None:
                raise ConnectionError("reset\nby peer")
            yield row


class TestHub:
    @pytest.mark.parametrize("names", [["text", "id"], None])
    def test_is_streamed(
        self, monkeypatch: pytest.MonkeyPatch, names: list[str] | None, tmp_path: Path
    ) -> None:
        calls: list[Any] = []
        stream = FakeStream(ROWS, names)

        def load(*args: Any, **keywords: Any) -> FakeStream:
            calls.append((args, keywords))
            return stream

        monkeypatch.setattr(datasets, "load_dataset", load)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        hub = HubOptions(token="hf_x", cache_dir=tmp_path)
        rows = open_rows(parse_source("owner/name/en:test"), Reading(seed=7, hub=hub))
        assert isinstance(rows, StreamedRows)
        assert list(rows) == ROWS
        assert list(rows.columns) == ["text", "id"]
        assert stream.order == (7, rows_module.SHUFFLE_ROWS)
        assert calls == [
            (
                ("owner/name", "en"),
                {"streaming": True, "split": "test", "token": "hf_x", "cache_dir": str(tmp_path)},
            )
        ]

    @pytest.mark.parametrize("is_offline", [True, False])
    def test_is_fetched_where_any_row_must_be_at_hand(
        self, monkeypatch: pytest.MonkeyPatch, *, is_offline: bool
    ) -> None:
        seen: dict[str, Any] = {}

        def load(*_: Any, **keywords: Any) -> datasets.Dataset:
            seen.update(keywords)
            return datasets.Dataset.from_list(ROWS)

        monkeypatch.setattr(datasets, "load_dataset", load)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", is_offline)
        reading = Reading(any_order=not is_offline)
        assert listed(opened("owner/name", reading)) == ROWS
        assert seen["streaming"] is False

    def test_local_files_only(self, monkeypatch: pytest.MonkeyPatch) -> None:
        seen: dict[str, Any] = {}

        def load(*_: Any, **keywords: Any) -> datasets.Dataset:
            seen.update(keywords)
            return datasets.Dataset.from_list([])

        monkeypatch.setattr(datasets, "load_dataset", load)
        with pytest.raises(QuantizationError, match="has no rows"):
            opened("owner/name", Reading(hub=HubOptions(local_files_only=True)))
        assert seen["download_config"].local_files_only

    def test_cannot_be_reached(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        hub = HubOptions(local_files_only=True, cache_dir=tmp_path)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        with pytest.raises(QuantizationError, match=r"cannot be read .*, in no-owner/no-name") as c:
            opened("no-owner/no-name", Reading(hub=hub))
        assert "'builtin' needs no network" in str(c.value)

    def test_breaks_off(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(
            datasets, "load_dataset", lambda *_, **__: FakeStream([*ROWS, None], ["text"])
        )
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        rows = open_rows(parse_source("owner/name"), Reading())
        assert isinstance(rows, StreamedRows)
        with pytest.raises(QuantizationError, match=r"cannot be read \(reset\)"):
            list(rows)


def apply(turns: list[dict[str, str]], *, tokenize: bool) -> str:
    assert not tokenize
    if any(turn["role"] == "tool" for turn in turns):
        raise TemplateError("no tools")
    return "".join(f"<{turn['role']}>{turn['content']}" for turn in turns)


TEMPLATED: Any = SimpleNamespace(chat_template="x", apply_chat_template=apply)
PLAIN: Any = SimpleNamespace(chat_template=None)


def rendered(row: dict[str, Any], tokenizer: Any = TEMPLATED, column: str | None = None) -> Any:
    return Renderer(tokenizer, list(row), "source", column).render(row)


class TestTexts:
    @pytest.mark.parametrize(
        ("columns", "kind"),
        [
            (["id", "text", "messages"], "text"),
            (["content", "messages"], "messages"),
            (["conversations", "system"], "conversations"),
            (["instruction", "input", "output", "content"], "instruction + input + output"),
            (["prompt", "completion"], "prompt + context + completion"),
            (["title", "content"], "content"),
            (["whatever"], "whatever"),
        ],
    )
    def test_finds_the_column(self, columns: list[str], kind: str) -> None:
        assert Renderer(PLAIN, columns, "source").kind == kind

    def test_no_column(self) -> None:
        with pytest.raises(QuantizationError) as caught:
            Renderer(PLAIN, ["id", "score"], "a.csv")
        message = str(caught.value)
        assert "no column that is known to hold text, in a.csv" in message
        assert "got columns: id, score" in message
        assert "data.jsonl::column" in message

    def test_a_named_column_that_is_not_there(self) -> None:
        with pytest.raises(QuantizationError, match=r"no column 'x', in s; got columns: id, text"):
            Renderer(PLAIN, ["id", "text"], "s", "x")

    @pytest.mark.parametrize("value", ["", " \n", None, 3, [], {}, [1], [{"role": "user"}]])
    def test_rows_without_text(self, value: Any) -> None:
        assert rendered({"text": value}) is None
        assert rendered({"messages": value}) is None

    def test_a_missing_column(self) -> None:
        renderer = Renderer(PLAIN, ["text"], "s")
        assert renderer.render({"other": "x"}) is None
        assert renderer.render({"text": "x"}) == Text("x")

    def test_messages(self) -> None:
        row = {
            "messages": [
                {"role": "system", "content": "s"},
                {"role": "user", "content": [{"type": "text", "text": "q"}, {"type": "image"}]},
                {"role": "assistant", "content": None},
                {"role": "assistant", "content": "a"},
            ]
        }
        assert rendered(row) == Text("<system>s<user>q<assistant>a", is_templated=True)
        assert rendered(row, PLAIN) == Text("s\n\nq\n\na")

    def test_sharegpt(self) -> None:
        row = {
            "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
            "system": "s",
        }
        assert rendered(row) == Text("<system>s<user>q<assistant>a", is_templated=True)

    def test_alpaca(self) -> None:
        row = {
            "instruction": "i",
            "input": "given",
            "output": "o",
            "system": "s",
            "history": [["q", "a"]],
        }
        assert rendered(row) == Text(
            "<system>s<user>q<assistant>a<user>i\ngiven<assistant>o", is_templated=True
        )
        assert rendered({"instruction": "i", "input": "", "output": "o"}, PLAIN) == Text("i\n\no")
        assert rendered({"instruction": "", "input": None, "output": " ", "system": "s"}) is None

    def test_prompts_of_messages(self) -> None:
        row = {
            "prompt": [{"role": "user", "content": "q"}],
            "completion": [{"role": "assistant", "content": "a"}],
        }
        assert rendered(row) == Text("<user>q<assistant>a", is_templated=True)

    def test_a_template_that_refuses(self) -> None:
        renderer = Renderer(TEMPLATED, ["messages"], "s")
        row = {"messages": [{"from": "observation", "value": "t"}, {"from": "gpt", "value": "a"}]}
        assert renderer.render(row) == Text("t\n\na")
        assert renderer.refused == 1

    def test_a_named_column_of_any_kind(self) -> None:
        row = {"text": "no", "talk": [{"role": "user", "content": "q"}], "note": "yes"}
        assert rendered(row, column="note") == Text("yes")
        assert rendered(row, column="talk") == Text("<user>q", is_templated=True)


def test_errors_are_those_of_the_input(tmp_path: Path) -> None:
    with pytest.raises(QuantizationError) as caught:
        opened(tmp_path)
    error: StreamMergeError = caught.value
    assert error.exit_code == 3
