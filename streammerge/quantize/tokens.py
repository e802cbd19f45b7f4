"""Tokens to calibrate on: blocks of equal length, sampled from the rows of a source.

`blocks` takes the rows in an order of the seed, puts their tokens one behind the other, and cuts
all of it into blocks, so that short rows count. Of a long row it takes one part, drawn at random,
and the others only when rows run out. `llamafactory` draws as LLaMA-Factory does: a row with
replacement, up to 101 times until one has more than `maxlen` tokens, then a window of it.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from streammerge.checkpoint.hub import HubOptions
from streammerge.errors import QuantizationError
from streammerge.quantize.rowfiles import Rows
from streammerge.quantize.rows import BUILTIN, Reading, open_rows, parse_source
from streammerge.quantize.texts import Renderer, Text

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from streammerge.quantize.rows import StreamedRows
    from streammerge.quantize.settings import QuantizeSettings

__all__ = ["Calibration", "CalibrationRecord", "load_calibration"]

# LLaMA-Factory gives up after so many rows that are too short
DRAWS = 101
# characters of a part of a long row, per token of a block
PART_CHARS = 6
# rows without text after which a stream that has no end is given up
MOST_EMPTY = 10_000


@dataclass(frozen=True, slots=True)
class CalibrationRecord:
    """What was calibrated on, for the report."""

    source: str
    column: str
    """Columns of the text."""
    sampling: str
    seed: int
    rows: int | None
    """Rows of the source; None where they were streamed."""
    rows_used: int
    rows_empty: int
    """Rows met that have no text."""
    rows_refused: int
    """Conversations that the chat template did not take, and that were joined plainly."""
    samples: int
    tokens: int
    digest: str
    """SHA-256 of the ids, int64 and little-endian."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """Token ids, and where they are from."""

    ids: torch.Tensor
    """(samples, tokens) int64."""
    record: CalibrationRecord


def load_calibration(
    source: str,
    *,
    tokenizer: Any,
    settings: QuantizeSettings,
    hub: HubOptions | None = None,
) -> Calibration:
    """Sample `settings.nsamples` blocks of `settings.maxlen` tokens.

    Args:
        source: A file (json, jsonl, csv, tsv, parquet, arrow, txt), a folder of them, a hub id;
            each with `:split:column` behind it if need be; or `builtin`, a short text of many
            kinds, of which there are as many samples as it has, if those are fewer.
        tokenizer: Of transformers.
        settings: How many tokens, of which seed, sampled how.
        hub: How to reach the hub; as by default if None.

    Raises:
        QuantizationError: The source cannot be read, or has too little text.
        UnsupportedError: `datasets` is needed and missing.
    """
    is_drawn = settings.sampling == "llamafactory"
    found = parse_source(source)
    reading = Reading(
        settings.seed,
        any_order=is_drawn,
        by_line=is_drawn and found.name != BUILTIN,
        hub=hub or HubOptions(),
    )
    rows = open_rows(found, reading)
    renderer = Renderer(tokenizer, rows.columns, source, found.column)
    sampler = _Sampler(renderer, settings, source)
    if is_drawn:
        assert isinstance(rows, Rows)
        ids = sampler.draw(rows)
    else:
        ids = sampler.blocks(rows, all_there_is=found.name == BUILTIN)
    return Calibration(
        ids,
        CalibrationRecord(
            source=source,
            column=renderer.kind,
            sampling=settings.sampling,
            seed=settings.seed,
            rows=len(rows) if isinstance(rows, Rows) else None,
            rows_used=sampler.used,
            rows_empty=sampler.empty,
            rows_refused=renderer.refused,
            samples=len(ids),
            tokens=ids.numel(),
            digest=hashlib.sha256(ids.numpy().astype("<i8").tobytes()).hexdigest(),
        ),
    )


class _Sampler:
    def __init__(self, renderer: Renderer, settings: QuantizeSettings, source: str) -> None:
        self._renderer, self._settings, self._source = renderer, settings, source
        self._random = random.Random(settings.seed)  # noqa: S311 (a sample, not a secret)
        self.used = 0
        self.empty = 0

    def blocks(self, rows: Rows | StreamedRows, *, all_there_is: bool) -> torch.Tensor:
        """Cut the tokens of rows in random order into blocks."""
        count, length = self._settings.nsamples, self._settings.maxlen
        need = count * length
        most_chars = PART_CHARS * length
        ids: list[int] = []
        kept_back: list[Text] = []
        for row in self._in_random_order(rows):
            text = self._renderer.render(row)
            if text is None:
                self.empty += 1
                if self.used == 0 and self.empty == MOST_EMPTY and not isinstance(rows, Rows):
                    break
                continue
            self.used += 1
            parts = _parts(text, most_chars)
            first = parts.pop(self._random.randrange(len(parts)))
            ids.extend(self._encode(first))
            # more than are needed, so that a huge file does not fill the memory
            if len(kept_back) * most_chars < 2 * PART_CHARS * need:
                kept_back.extend(parts)
            if len(ids) >= need:
                break
        self._random.shuffle(kept_back)
        while len(ids) < need and kept_back:
            ids.extend(self._encode(kept_back.pop()))
        if not ids:
            raise self._no_text()
        if all_there_is:
            count = min(count, len(ids) // length)
        if not count or len(ids) < count * length:
            raise self._too_few(len(ids))
        return torch.tensor(ids[: count * length], dtype=torch.int64).view(count, length)

    def draw(self, rows: Rows) -> torch.Tensor:
        """Draw rows, and a window of each.

        The numbers are those of LLaMA-Factory's `_get_quantization_dataset` after `random.seed`.
        """
        length = self._settings.maxlen
        samples: list[list[int]] = []
        longest = 0
        for _ in range(self._settings.nsamples):
            for _ in range(DRAWS):
                text = self._renderer.render(rows[self._random.randint(0, len(rows) - 1)])
                self.empty += text is None
                ids = self._encode(text or Text(""))
                longest = max(longest, len(ids))
                if len(ids) > length:
                    break
            else:
                raise QuantizationError(
                    f"none of {DRAWS} random rows is long enough",
                    where=self._source,
                    expected=f"more than {length} tokens",
                    got=f"{longest} at most, in {len(samples)} samples and the draws after them",
                    hint="lower export_quantization_maxlen, or use export_quantization_sampling: "
                    "blocks, which joins short rows",
                )
            self.used += 1
            begin = self._random.randint(0, len(ids) - length - 1)
            samples.append(ids[begin : begin + length])
        return torch.tensor(samples, dtype=torch.int64)

    def _in_random_order(self, rows: Rows | StreamedRows) -> Iterator[Mapping[str, Any]]:
        if not isinstance(rows, Rows):
            yield from rows
            return
        # Fisher and Yates, of which only the rows that were moved are remembered
        moved: dict[int, int] = {}
        for place in range(len(rows)):
            chosen = self._random.randrange(place, len(rows))
            index = moved.pop(chosen, chosen)
            if chosen != place:
                moved[chosen] = moved.pop(place, place)
            yield rows[index]

    def _encode(self, text: Text) -> list[int]:
        encoded = self._renderer.tokenizer(text.text, add_special_tokens=not text.is_templated)
        ids: list[int] = encoded["input_ids"]
        return ids

    def _no_text(self) -> QuantizationError:
        if self.used:
            return QuantizationError(
                f"the tokenizer ({type(self._renderer.tokenizer).__name__}) gives no token for any "
                f"of {self.used} rows",
                hint="are the tokenizer's files beside the base those of this model?",
            )
        return QuantizationError(
            f"none of {self.empty} rows has text in '{self._renderer.kind}'",
            where=self._source,
            hint="name another column, as in data.jsonl::column or owner/name:train:column",
        )

    def _too_few(self, have: int) -> QuantizationError:
        count, length = self._settings.nsamples, self._settings.maxlen
        enough = have // length
        hint = f"set export_quantization_maxlen to {have} or less"
        if enough:
            hint = f"set export_quantization_nsamples to {enough}"
        return QuantizationError(
            "too few tokens to calibrate on",
            where=self._source,
            expected=f"{count * length} ({count} samples of {length})",
            got=f"{have}, from {self.used} rows with text and {self.empty} without",
            hint=f"{hint}, or add data",
        )


def _parts(text: Text, most_chars: int) -> list[Text]:
    """Cut a long text, at white space where there is some, into parts of about equal length."""
    count = -(-len(text.text) // most_chars)
    if count <= 1:
        return [text]
    parts = []
    begin = 0
    for number in range(1, count + 1):
        end = len(text.text) * number // count
        # some scripts have no spaces; a part that goes on for long is cut within
        near = text.text.find(" ", end, end + 100) if number < count else -1
        end = near if near >= 0 else end
        parts.append(Text(text.text[begin:end], text.is_templated))
        begin = end
    return parts
