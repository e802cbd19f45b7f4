"""Calibration tokens: blocks of them, draws of LLaMA-Factory, what is refused, what is recorded."""

from __future__ import annotations

import hashlib
import json
import random
from typing import TYPE_CHECKING, Any

import datasets
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from streammerge.errors import QuantizationError
from streammerge.quantize import tokens as tokens_module
from streammerge.quantize.settings import QuantizeSettings
from streammerge.quantize.texts import Text
from streammerge.quantize.tokens import Calibration, _parts, load_calibration

if TYPE_CHECKING:
    from pathlib import Path

BEGIN = 0
TEMPLATE = "<s>{% for m in messages %}{{ m.role }} {{ m.content }} </s>{% endfor %}"


def make_tokenizer(template: str | None = None) -> PreTrainedTokenizerFast:
    """Return one token per word `w0` to `w9999`, and a token at the start."""
    names = ["<s>", "</s>", "<unk>", "user", "assistant", "system"]
    words = {name: number for number, name in enumerate(names)}
    words.update({f"w{number}": number + 100 for number in range(10_000)})
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", BEGIN)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = template
    return tokenizer


TOKENIZER = make_tokenizer()


def words(first: int, count: int) -> str:
    return " ".join(f"w{number}" for number in range(first, first + count))


def write_rows(path: Path, texts: list[str | None]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def load(
    source: str, nsamples: int, maxlen: int, *, seed: int = 0, tokenizer: Any = TOKENIZER
) -> Calibration:
    settings = QuantizeSettings(nsamples=nsamples, maxlen=maxlen, seed=seed)
    return load_calibration(source, tokenizer=tokenizer, settings=settings)


class TestBlocks:
    def test_short_rows_are_joined(self, tmp_path: Path) -> None:
        source = write_rows(tmp_path / "a.jsonl", [words(10 * row, 9) for row in range(50)])
        found = load(source, 20, 25)
        assert found.ids.shape == (20, 25)
        assert found.ids.dtype == torch.int64
        # all rows are used up, each whole and with its token at the start
        rows = found.ids.flatten().view(50, 10)
        assert set(rows[:, 0].tolist()) == {BEGIN}
        assert sorted(rows[:, 1].tolist()) == [100 + 10 * row for row in range(50)]
        assert bool((rows[:, 2:].diff() == 1).all())

    def test_order_is_that_of_the_seed(self, tmp_path: Path) -> None:
        source = write_rows(tmp_path / "a.jsonl", [words(10 * row, 9) for row in range(50)])
        one, again, other = (load(source, 3, 25, seed=seed) for seed in (1, 1, 2))
        assert torch.equal(one.ids, again.ids)
        assert one.record == again.record
        assert not torch.equal(one.ids, other.ids)
        assert one.record.digest != other.record.digest

    def test_no_more_rows_are_read_than_are_needed(self, tmp_path: Path) -> None:
        source = write_rows(tmp_path / "a.jsonl", [words(10 * row, 9) for row in range(50)])
        assert load(source, 2, 25).record.rows_used == 5

    @hypothesis_settings(max_examples=30, deadline=None)
    @given(
        sizes=st.lists(st.integers(0, 60), min_size=1, max_size=20),
        maxlen=st.integers(1, 9),
        seed=st.integers(0, 99),
    )
    def test_every_token_counts(
        self,
        tmp_path_factory: pytest.TempPathFactory,
        sizes: list[int],
        maxlen: int,
        seed: int,
    ) -> None:
        folder = tmp_path_factory.mktemp("rows")
        source = write_rows(folder / "a.jsonl", [words(60 * n, s) for n, s in enumerate(sizes)])
        # of long rows each part has a token at the start; without them, each word is there once
        have = sum(sizes)
        tokenizer = make_tokenizer()
        tokenizer.backend_tokenizer.post_processor = None
        count = have // maxlen
        if not count:
            with pytest.raises(QuantizationError):
                load(source, 1, maxlen, seed=seed, tokenizer=tokenizer)
            return
        ids = load(source, count, maxlen, seed=seed, tokenizer=tokenizer).ids.flatten().tolist()
        assert len(set(ids)) == len(ids) == count * maxlen
        with pytest.raises(QuantizationError, match=f"got {have}, from"):
            load(source, count + 1, maxlen, seed=seed, tokenizer=tokenizer)

    def test_a_long_row_gives_one_part_at_first(self, tmp_path: Path) -> None:
        long = [words(0, 3000), words(3000, 3000), words(6000, 3000)]
        source = write_rows(tmp_path / "a.jsonl", long)
        ids = load(source, 3, 100).ids
        thousands = (ids[ids >= 100] - 100) // 3000
        assert set(thousands.tolist()) == {0, 1, 2}

    def test_conversations_follow_the_template(self, tmp_path: Path) -> None:
        path = tmp_path / "a.json"
        path.write_text(json.dumps([{"instruction": "w1", "input": "w2", "output": "w3"}] * 2))
        tokenizer = make_tokenizer(TEMPLATE)
        found = load(str(path), 1, 16, tokenizer=tokenizer)
        # one token at the start, which the template wrote
        assert tokenizer.convert_ids_to_tokens(found.ids[0, :8].tolist()) == [
            "<s>", "user", "w1", "w2", "</s>", "assistant", "w3", "</s>"
        ]  # fmt: skip
        assert found.record.column == "instruction + input + output"
        assert found.record.rows_refused == 0
        plain = load(str(path), 1, 8)
        assert plain.ids[0].tolist() == [0, 101, 102, 103] * 2

    def test_rows_without_text_are_passed_over_and_counted(self, tmp_path: Path) -> None:
        source = write_rows(tmp_path / "a.jsonl", [None, words(0, 9), " ", words(20, 9)])
        records = [load(source, 2, 10, seed=seed).record for seed in range(20)]
        assert {(record.rows, record.rows_used) for record in records} == {(4, 2)}
        # those that come before the last row that is needed
        assert {record.rows_empty for record in records} == {0, 1, 2}

    def test_a_stream(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        stream = datasets.Dataset.from_list(
            [{"body": words(10 * row, 9)} for row in range(50)]
        ).to_iterable_dataset()
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: stream)
        found = load("owner/name::body", 2, 25, seed=5)
        assert found.record.rows is None
        assert found.record.column == "body"
        assert torch.equal(found.ids, load("owner/name::body", 2, 25, seed=5).ids)
        assert not torch.equal(found.ids, load("owner/name::body", 2, 25, seed=6).ids)

    def test_the_text_that_comes_along(self) -> None:
        found = load("builtin", 2, 64)
        assert found.ids.shape == (2, 64)
        # as many samples as there are, where fewer are there than are asked for
        all_there_is = load("builtin", 1000, 512)
        assert 16 <= len(all_there_is.ids) < 1000
        assert all_there_is.record.samples == len(all_there_is.ids)


class TestRecord:
    def test_says_what_was_used(self, tmp_path: Path) -> None:
        source = write_rows(tmp_path / "a.jsonl", [words(10 * row, 9) for row in range(5)])
        found = load(source, 3, 7, seed=9)
        record = found.record
        assert (record.source, record.column, record.sampling, record.seed) == (
            source, "text", "blocks", 9
        )  # fmt: skip
        assert (record.rows, record.rows_used, record.rows_empty) == (5, 3, 0)
        assert (record.samples, record.tokens) == (3, 21)
        raw = np.array(found.ids.tolist(), dtype="<i8").tobytes()
        assert record.digest == hashlib.sha256(raw).hexdigest()


def drawn_as_llamafactory_does(texts: list[str], count: int, maxlen: int) -> list[list[int]]:
    """Sample with the module's own state, as a training framework would."""
    samples = []
    for _ in range(count):
        tries = 0
        while True:
            assert tries <= 100
            ids = TOKENIZER(texts[random.randint(0, len(texts) - 1)])["input_ids"]
            tries += 1
            if len(ids) > maxlen:
                break
        begin = random.randint(0, len(ids) - maxlen - 1)
        samples.append(ids[begin : begin + maxlen])
    return samples


class TestLlamaFactory:
    @pytest.mark.parametrize("seed", [0, 3])
    @pytest.mark.parametrize("kind", ["jsonl", "txt", "parquet"])
    def test_draws_the_same(self, tmp_path: Path, seed: int, kind: str) -> None:
        texts = [words(100 * row, 5 + 7 * (row % 9)) for row in range(40)]
        texts[4] = ""
        path = tmp_path / f"a.{kind}"
        if kind == "jsonl":
            write_rows(path, list(texts))
        elif kind == "txt":
            path.write_text("\n".join(texts))
        else:
            datasets.Dataset.from_dict({"text": texts}).to_parquet(path)
        settings = QuantizeSettings(nsamples=30, maxlen=20, seed=seed, sampling="llamafactory")
        found = load_calibration(str(path), tokenizer=TOKENIZER, settings=settings)
        state = random.getstate()
        random.seed(seed)
        expected = drawn_as_llamafactory_does(texts, 30, 20)
        random.setstate(state)
        assert found.ids.tolist() == expected
        assert (found.record.sampling, found.record.rows_used) == ("llamafactory", 30)

    def test_the_text_that_comes_along(self) -> None:
        settings = QuantizeSettings(nsamples=3, maxlen=128, sampling="llamafactory")
        found = load_calibration("builtin", tokenizer=TOKENIZER, settings=settings)
        assert found.ids.shape == (3, 128)

    def test_gives_up_after_so_many_draws(self, tmp_path: Path) -> None:
        # a row is taken only if it is longer than maxlen
        source = write_rows(tmp_path / "a.jsonl", [words(0, 19)] * 3)
        settings = QuantizeSettings(nsamples=2, maxlen=20, sampling="llamafactory")
        with pytest.raises(QuantizationError) as caught:
            load_calibration(source, tokenizer=TOKENIZER, settings=settings)
        message = str(caught.value)
        assert "none of 101 random rows is long enough" in message
        assert "expected more than 20 tokens; got 20 at most" in message
        assert "export_quantization_sampling: blocks" in message


class TestRefusals:
    def test_too_few_tokens(self, tmp_path: Path) -> None:
        source = write_rows(tmp_path / "a.jsonl", [words(0, 9), words(20, 9), None])
        with pytest.raises(QuantizationError) as caught:
            load(source, 5, 8)
        assert str(caught.value) == (
            f"too few tokens to calibrate on, in {source}; expected 40 (5 samples of 8); got 20, "
            "from 2 rows with text and 1 without; set export_quantization_nsamples to 2, or add "
            "data"
        )

    def test_not_even_one_sample(self, tmp_path: Path) -> None:
        source = write_rows(tmp_path / "a.jsonl", [words(0, 9)])
        with pytest.raises(QuantizationError, match="set export_quantization_maxlen to 10 or less"):
            load(source, 1, 100)

    def test_no_text(self, tmp_path: Path) -> None:
        source = write_rows(tmp_path / "a.jsonl", [None, "", "  "])
        with pytest.raises(QuantizationError, match=r"none of 3 rows has text in 'text', in "):
            load(source, 1, 8)

    def test_a_stream_without_text(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(tokens_module, "MOST_EMPTY", 3)
        stream = datasets.Dataset.from_list([{"text": ""}] * 9).to_iterable_dataset()
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: stream)
        with pytest.raises(QuantizationError, match=r"none of 3 rows has text in 'text'"):
            load("owner/name", 1, 8)

    def test_no_column(self, tmp_path: Path) -> None:
        path = tmp_path / "a.csv"
        path.write_text("id,score\n1,2\n")
        with pytest.raises(QuantizationError, match=r"in .*a\.csv; .*got columns: id, score"):
            load(str(path), 1, 8)


@hypothesis_settings(max_examples=50, deadline=None)
@given(text=st.text(st.sampled_from("ab "), min_size=1, max_size=2000), most=st.integers(200, 500))
def test_parts_are_all_of_a_text(text: str, most: int) -> None:
    parts = _parts(Text(text, is_templated=True), most)
    assert "".join(part.text for part in parts) == text
    assert all(part.text and part.is_templated for part in parts)
    assert all(len(part.text) <= most + 100 for part in parts)


def test_a_tokenizer_that_gives_nothing_is_named(tmp_path: Path) -> None:
    # words that are in no vocabulary, and nothing that stands for them
    inner = Tokenizer(models.BPE({"a": 0}, []))
    file = tmp_path / "t.txt"
    file.write_text("xyz")
    with pytest.raises(QuantizationError, match="gives no token for any of 1 rows"):
        load(str(file), 1, 4, tokenizer=PreTrainedTokenizerFast(tokenizer_object=inner))
