"""Find the base tensor that an adapter's module path means.

In this order: the exact name; one base prefix added or taken away (a bare model against one with a
head); transformers' own renames, if known; the only base tensor that ends in the path, layer
numbers included. What matches none of these is an error for the caller, never a silent no-op.
"""

from __future__ import annotations

import difflib
import re
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from streammerge.plan.family import VOCABULARY_MODULES

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = ["WRAPPER_PREFIXES", "Match", "NameResolver"]

How = Literal["exact", "prefix", "renamed", "suffix"]
# what wraps the layers of a bare model; each may be missing on either side
WRAPPER_PREFIXES = (
    "model", "transformer", "base_model", "decoder", "language_model", "backbone",
    "albert", "bert", "biogpt", "deberta", "distilbert", "electra", "ernie", "esm", "gpt_neox",
    "layoutlmv3", "longformer", "mobilebert", "mpnet", "nomic_bert", "rembert", "roberta", "rwkv",
    "beit", "convnext", "deit", "dinov2", "resnet", "segformer", "swin", "swinv2", "vit",
    "audio_spectrogram_transformer", "hubert", "wav2vec2", "wavlm",
)  # fmt: skip
# these say nothing of which of a model's parts it is
_NEUTRAL = frozenset(
    {*WRAPPER_PREFIXES, "text_model", "llm", "vlm", "module", "pretrained_model"} - {"decoder"}
)
# and these do; one part may have several of them in its path, and other ones in another naming
_PARTS = re.compile(
    r"(?P<image>vis|image|vit|siglip|clip)|(?P<sound>audio|speech|sound|codec|wav)|(?P<video>video)"
    r"|(?P<talker>talker)|(?P<encoder>^encoder$)|(?P<decoder>^decoder$)"
    r"|(?P<extra>^mtp$|nextn|draft|depth)"
)


@dataclass(frozen=True, slots=True)
class Match:
    """A base tensor, and how it was found."""

    name: str
    how: How


@dataclass(slots=True)
class NameResolver:
    """Resolve parameter paths of adapters to the tensor names of one base."""

    names: frozenset[str]
    renames: Mapping[str, str] = field(default_factory=dict)
    """In-memory name to checkpoint name, where transformers renames."""
    _by_last: dict[str, list[str]] = field(init=False, repr=False)
    _modules: frozenset[str] | None = field(init=False, repr=False, default=None)

    def __post_init__(self) -> None:
        self._by_last = defaultdict(list)
        for name in self.names:
            self._by_last[_tail(name)].append(name)

    def find_direct(self, path: str) -> Match | None:
        """Match exactly, or by one prefix."""
        if path in self.names:
            return Match(path, "exact")
        found = [name for name in _other_prefixes(path) if name in self.names]
        if not found:
            return None
        # beside a prefix that could be added, any other word in its place is another part's
        rivals = [
            name
            for name in self._by_last.get(_tail(path), ())
            if name.endswith(f".{path}") and name.count(".") == path.count(".") + 1
        ]
        return Match(found[0], "prefix") if len({*found, *rivals}) == 1 else None

    def find(self, path: str) -> Match | None:
        """Match in any way; None if nothing, or more than one tensor, answers."""
        return self.find_known(path) or self._find_suffix(path)

    def find_known(self, path: str) -> Match | None:
        """Match in any way but by a suffix."""
        return self.find_direct(path) or self._find_renamed(path)

    def has_module(self, path: str) -> bool:
        """Whether there is a tensor below a path, as it is or by one prefix or a rename."""
        if self._modules is None:
            self._modules = frozenset(
                parent for name in (*self.names, *self.renames) for parent in _parents(name)
            )
        return any(module in self._modules for module in (path, *_other_prefixes(path)))

    def nearest(self, path: str, *, count: int = 3) -> list[str]:
        """Return the base tensors whose names look most like a path."""
        same_end = self._by_last.get(_tail(path), [])
        pool: Iterable[str] = same_end or self.names
        return difflib.get_close_matches(path, sorted(pool)[:20_000], n=count, cutoff=0.0)

    def _find_renamed(self, path: str) -> Match | None:
        known = [path] if path in self.renames else _other_prefixes(path)
        found = {self.renames.get(name) for name in known} & self.names
        return Match(found.pop() or "", "renamed") if len(found) == 1 else None

    def _find_suffix(self, path: str) -> Match | None:
        parts = path.split(".")
        # a shorter end that lost a layer number would match another layer
        numbered = [at for at, part in enumerate(parts) if part.isdigit()]
        # without a number, two components say too little: `pooler.dense` is not some other `dense`
        keeps = 2 if parts[-2:-1] and parts[-2] in VOCABULARY_MODULES else 3
        last_start = numbered[0] - 1 if numbered else len(parts) - keeps
        candidates = self._by_last.get(_tail(path), [])
        for start in range(last_start + 1):
            end = parts[start:]
            # what the longer name has before the path must not be a layer the path does not name
            found = [
                (name, before)
                for name in candidates
                if (before := _before(name, end)) is not None
                and not any(part.isdigit() for part in before)
            ]
            if found:
                name, before = found[0]
                is_it = len(found) == 1 and _are_same_part(parts[:start], before)
                return Match(name, "suffix") if is_it else None
        return None


def _tail(name: str) -> str:
    """Return the last two components: the layer's own name and the parameter."""
    return ".".join(name.rsplit(".", 2)[-2:])


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def _other_prefixes(path: str) -> list[str]:
    """Return a path without its first component, and with one before it, where that is a prefix."""
    head, _, rest = path.partition(".")
    return [
        *([rest] if head in WRAPPER_PREFIXES else []),
        *(f"{prefix}.{path}" for prefix in WRAPPER_PREFIXES),
    ]


def _before(name: str, end: list[str]) -> list[str] | None:
    """Return what stands before the end of a name; None if it has another end."""
    parts = name.split(".")
    return parts[: -len(end)] if parts[-len(end) :] == end else None


def _are_same_part(ours: list[str], theirs: list[str]) -> bool:
    """Whether two paths may lead to the same part of a model.

    Both must name the same kind of part. In the language model one of them may have words that mean
    nothing here, a trainer's wrapper or a family's own; elsewhere such words are other parts.
    """
    our_parts, our_words = _meaning(ours)
    their_parts, their_words = _meaning(theirs)
    if our_parts != their_parts:
        return False
    return our_words == their_words or not (our_parts or (our_words and their_words))


def _meaning(path: list[str]) -> tuple[set[str], list[str]]:
    parts, words = set[str](), []
    for component in path:
        match = _PARTS.search(component)
        if match is not None:
            parts.add(match.lastgroup or "")
        elif component not in _NEUTRAL:
            words.append(component)
    return parts, words
