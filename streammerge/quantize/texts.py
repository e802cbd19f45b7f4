"""Texts of calibration rows: plain columns, instructions with answers, conversations.

Conversations are written out by the tokenizer's chat template, so that the model is calibrated on
what it will see. A tokenizer without one, or whose template refuses a conversation, gets the turns
with blank lines between them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from streammerge.errors import QuantizationError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["Renderer", "Text"]

Turn = dict[str, str]

_TEXT = ("text", "content", "document", "article", "body", "passage", "story", "code")
_CHAT = ("messages", "conversations", "conversation", "chat", "dialogue")
# what is asked, what it is asked of, what is answered
_ASKED = (
    ("instruction", "input", ("output", "response", "answer")),
    ("prompt", "context", ("completion", "response", "answer")),
    ("question", "context", ("answer", "response", "completion")),
)
_ROLES = {
    "human": "user", "user": "user", "prompter": "user",
    "gpt": "assistant", "assistant": "assistant", "bot": "assistant", "model": "assistant",
    "chatgpt": "assistant", "function_call": "assistant",
    "system": "system", "developer": "system",
    "tool": "tool", "observation": "tool", "function": "tool", "function_response": "tool",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Text:
    """What a row says."""

    text: str
    is_templated: bool = False
    """Written by a chat template, which put the special tokens in."""


@dataclass(slots=True)
class Renderer:
    """Turns rows into texts."""

    tokenizer: Any
    columns: Sequence[str]
    where: str
    """The source, for messages."""
    column: str | None = None
    """The column to take; found by its name if None."""
    refused: int = 0
    """Conversations that the chat template did not take."""
    _asked: tuple[str, str, str] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if self.column is None:
            self._find()
        elif self.column not in self.columns:
            raise QuantizationError(
                f"calibration data has no column '{self.column}'",
                where=self.where,
                got=f"columns: {', '.join(self.columns) or 'none'}",
            )

    @property
    def kind(self) -> str:
        """What is taken of a row, for the report."""
        return self.column or " + ".join(self._asked or ())

    def render(self, row: Mapping[str, Any]) -> Text | None:
        """Return the text of a row; None if it has none."""
        if self._asked is not None:
            turns = _answered(row, self._asked)
        else:
            assert self.column is not None
            value = row.get(self.column)
            if isinstance(value, str):
                return Text(value) if value.strip() else None
            turns = _turns(value)
            if turns and isinstance(system := row.get("system"), str) and system.strip():
                turns = [{"role": "system", "content": system}, *turns]
        return self._write(turns) if turns else None

    def _find(self) -> None:
        self.column = next((name for name in (_TEXT[0], *_CHAT) if name in self.columns), None)
        if self.column is not None:
            return
        for asked, given, answers in _ASKED:
            answer = next((name for name in answers if name in self.columns), None)
            if asked in self.columns and answer is not None:
                self._asked = (asked, given, answer)
                return
        self.column = next((name for name in _TEXT if name in self.columns), None)
        if self.column is None and len(self.columns) == 1:
            self.column = self.columns[0]
        if self.column is None:
            raise QuantizationError(
                "calibration data has no column that is known to hold text",
                where=self.where,
                expected=f"{', '.join(_TEXT)}; {', '.join(_CHAT)}; or instruction and output",
                got=f"columns: {', '.join(self.columns) or 'none'}",
                hint="name the column, as in data.jsonl::column or owner/name:train:column",
            )

    def _write(self, turns: list[Turn]) -> Text:
        if getattr(self.tokenizer, "chat_template", None):
            from jinja2 import TemplateError  # noqa: PLC0415 (comes with transformers)

            try:
                written = self.tokenizer.apply_chat_template(turns, tokenize=False)
                return Text(str(written), is_templated=True)
            except (TemplateError, ValueError, TypeError, KeyError):
                # many templates have no place for a system turn, a tool, or two turns of a side
                self.refused += 1
        return Text("\n\n".join(turn["content"] for turn in turns))


def _turns(value: object) -> list[Turn]:
    """Return the turns of a conversation, in messages (role, content) or sharegpt (from, value)."""
    turns = []
    for turn in value if isinstance(value, list) else []:
        if not isinstance(turn, dict):
            return []
        role = str(turn.get("role") or turn.get("from") or "user")
        found = (turn[key] for key in ("content", "value", "text") if turn.get(key))
        content = _content(next(found, None))
        if content:
            turns.append({"role": _ROLES.get(role.lower(), role), "content": content})
    return turns


def _content(value: object) -> str:
    if isinstance(value, str):
        return value if value.strip() else ""
    # parts, of which only the text is of use
    texts = (
        [part.get("text") for part in value if isinstance(part, dict)]
        if isinstance(value, list)
        else []
    )
    return "\n".join(text for text in texts if isinstance(text, str) and text.strip())


def _answered(row: Mapping[str, Any], names: tuple[str, str, str]) -> list[Turn]:
    """Return the turns of an instruction with its answer, and of what went before (alpaca)."""
    asked, given, answered = (row.get(name) for name in names)
    turns: list[Turn] = []
    if isinstance(system := row.get("system"), str) and system.strip():
        turns.append({"role": "system", "content": system})
    history = row.get("history")
    for pair in history if isinstance(history, list) else []:
        if isinstance(pair, list) and len(pair) == 2:
            turns.extend(_said("user", pair[0]) + _said("assistant", pair[1]))
    if isinstance(asked, str) and isinstance(given, str) and given.strip():
        asked = f"{asked}\n{given}" if asked.strip() else given
    said = _said("user", asked) + _said("assistant", answered)
    return turns + said if said else []


def _said(role: str, value: object) -> list[Turn]:
    if isinstance(value, str) and value.strip():
        return [{"role": role, "content": value}]
    return _turns(value)
