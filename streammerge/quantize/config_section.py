"""The section `quantization_config` of config.json, by which loaders find out what is stored how.

Loaders read different keys to learn which linears are not quantized:

    GPTQ  transformers  those outside `block_name_to_quantize`, and those inside it whose names do
                        not end in one of `modules_in_block_to_quantize`
          GPTQModel,    those that a pattern of `dynamic` marked `-:` matches from the start
          SGLang
          vLLM          both; without `modules_in_block_to_quantize` it goes by the tensors' dtypes
    AWQ   transformers  those that an entry of `modules_to_not_convert` leads to, or ends
          vLLM, SGLang  those that have an entry of `modules_to_not_convert` in their names
          GPTQModel     as above
    AQLM  transformers  those that an entry of `linear_weights_not_to_quantize` leads to, or ends

so that all of these are written, with entries that are right under every one of the readings.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from streammerge.errors import UnsupportedError
from streammerge.version import __version__

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from streammerge.quantize.settings import Method, QuantizeSettings

__all__ = ["check_format", "quantization_section"]


def check_format(settings: QuantizeSettings) -> None:
    """Refuse settings whose result no loader could read, before anything is quantized.

    Raises:
        UnsupportedError: There is no such format.
    """
    if settings.method == "awq":
        if settings.bits != 4:
            raise UnsupportedError(
                "AWQ stores codes of 4 bits only",
                where="export_quantization_bit",
                got=settings.bits,
                hint="choose the method gptq, which has 2, 3, 4 and 8",
            )
        return
    if not settings.is_symmetric and settings.checkpoint_format == "gptq":
        # a zero of 0 is stored as -1, and GPTQModel refuses the combination as a whole
        raise UnsupportedError(
            "the checkpoint format gptq has no place for asymmetric codes",
            expected="the checkpoint format gptq_v2, symmetric codes, or the method awq",
        )


def quantization_section(
    settings: QuantizeSettings, *, quantized: Sequence[str], kept: Sequence[str]
) -> dict[str, Any]:
    """Return the section for a checkpoint.

    Args:
        settings: How it was quantized.
        quantized: Paths of the modules that were, as transformers names them in memory.
        kept: Paths of all other linears of the model, and of the modules that hold experts that
            were not; where the checkpoint has other names for them than the model in memory, both.

    Raises:
        UnsupportedError: There is no such format, or it has no way to tell the modules apart.
    """
    check_format(settings)
    section = _SECTIONS[settings.method](settings, quantized, kept)
    section["meta"] = {"quantizer": [f"streammerge:{__version__}"]}
    return section


def _aqlm_section(
    settings: QuantizeSettings, quantized: Sequence[str], kept: Sequence[str]
) -> dict[str, Any]:
    books = settings.codebooks
    assert books is not None
    tops = _tops(quantized, kept)
    return {
        "quant_method": "aqlm",
        "num_codebooks": books.count,
        "nbits_per_codebook": books.bits,
        "in_group_size": books.group_size,
        "out_group_size": 1,
        # transformers 4 has whole names of weights here; from 5 on it looks for modules
        "linear_weights_not_to_quantize": [*tops, *(f"{name}.weight" for name in kept)],
    }


def _awq_section(
    settings: QuantizeSettings, quantized: Sequence[str], kept: Sequence[str]
) -> dict[str, Any]:
    section: dict[str, Any] = {
        "quant_method": "awq",
        "bits": settings.bits,
        "group_size": settings.group_size,
        "zero_point": True,
        "version": "gemm",
        "lm_head": False,
        "modules_to_not_convert": _left_out(quantized, kept) or None,
    }
    return section | _dynamic(quantized, kept)


def _gptq_section(
    settings: QuantizeSettings, quantized: Sequence[str], kept: Sequence[str]
) -> dict[str, Any]:
    section: dict[str, Any] = {
        "quant_method": "gptq",
        "bits": settings.bits,
        "group_size": settings.group_size,
        "desc_act": settings.desc_act and settings.method == "gptq",
        "sym": settings.is_symmetric,
        "checkpoint_format": settings.checkpoint_format,
        "pack_dtype": "int32",
        "lm_head": False,
        "block_name_to_quantize": _block(quantized),
    }
    prefix = f"{section['block_name_to_quantize']}."
    inside = [name for name in kept if name.startswith(prefix)]
    if inside:
        section["modules_in_block_to_quantize"] = [_chosen(quantized, inside)]
    if settings.method == "gptq":
        section["true_sequential"] = True
        section["damp_percent"] = settings.damp
        # transformers warns unless desc_act goes without it
        section["act_group_aware"] = settings.act_order and not settings.desc_act
    return section | _dynamic(quantized, kept)


_SECTIONS: dict[
    Method, Callable[[QuantizeSettings, Sequence[str], Sequence[str]], dict[str, Any]]
] = {"gptq": _gptq_section, "rtn": _gptq_section, "awq": _awq_section, "aqlm": _aqlm_section}


def _dynamic(quantized: Sequence[str], kept: Sequence[str]) -> dict[str, Any]:
    """Return the key by which GPTQModel and SGLang find what is not quantized."""
    # of the head, `lm_head` says it
    others = [name for name in kept if name.rpartition(".")[2] != "lm_head"]
    if not others:
        return {}
    return {"dynamic": {f"-:{pattern}": {} for pattern in _patterns(quantized, others)}}


def _block(quantized: Iterable[str]) -> str:
    """Return the path of the list of layers that all quantized modules are in."""
    found = {re.split(r"\.\d+\.", name, maxsplit=1)[0] for name in quantized}
    if len(found) != 1:
        raise UnsupportedError(
            "quantized modules are not in one list of layers",
            got=", ".join(sorted(found)) or "none",
        )
    return found.pop()


def _chosen(quantized: Iterable[str], kept: Iterable[str]) -> list[str]:
    """Return ends of names, or names, that lead to all quantized modules and no kept one."""
    text = "\n".join(kept)
    chosen = []
    for tail, names in _by_tail(quantized).items():
        chosen.extend(names if tail in text else [tail])
    return chosen


def _left_out(quantized: Sequence[str], kept: Sequence[str]) -> list[str]:
    """Return the entries of `modules_to_not_convert`."""
    text = "\n".join(quantized)
    entries: dict[str, None] = {}
    for tail, tops in _by_tail(_tops(quantized, kept)).items():
        short = _short(tail, tops)
        is_apart = short not in text
        if is_apart:
            entries[short] = None
        if not is_apart or not set(tops) <= set(kept):
            entries.update(dict.fromkeys(_apart(tops, kept, text)))
    for entry in entries:
        meant = next((name for name in quantized if name.endswith(entry)), None)
        if meant is not None:
            raise UnsupportedError(
                f"AWQ leaves modules out by name, and '{entry}' cannot be told from '{meant}'",
                hint="choose the method gptq",
            )
    return list(entries)


def _apart(tops: Iterable[str], kept: Iterable[str], text: str) -> list[str]:
    """Return modules by their paths, or what is inside, if a path is a part of another's too."""
    found = []
    for top in tops:
        inside = [name for name in kept if name.startswith(f"{top}.")]
        found.extend(inside if top in text and inside else [top])
    return found


def _patterns(quantized: Sequence[str], kept: Sequence[str]) -> list[str]:
    """Return regular expressions for all kept modules and no other."""
    patterns: list[str] = []
    for tail, tops in _by_tail(_tops(quantized, kept)).items():
        loose = rf"(?:.*\.)?{re.escape(_short(tail, tops))}(?:\.|$)"
        if any(re.match(loose, name) for name in quantized):
            patterns.extend(rf"{re.escape(top)}(?:\.|$)" for top in tops)
        else:
            patterns.append(loose)
    return patterns


def _short(tail: str, tops: list[str]) -> str:
    """Return the end of a name; of a tower its last part, as loaders have it at other places."""
    last = tail.rpartition(".")[2]
    return tail if tops != [tail] or last.isdigit() else last


def _tops(quantized: Iterable[str], kept: Iterable[str]) -> list[str]:
    """Return the outermost modules that hold kept linears and no quantized one."""
    mixed = {name[:end] for name in quantized for end, char in enumerate(name) if char == "."}
    tops: dict[str, None] = {}
    for name in kept:
        ends = [end for end, char in enumerate(name) if char == "."]
        tops[next((name[:end] for end in ends if name[:end] not in mixed), name)] = None
    return list(tops)


def _by_tail(names: Iterable[str]) -> dict[str, list[str]]:
    """Sort names by their ends without numbers: `mlp.gate` of `model.layers.3.mlp.gate`."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(re.split(r"(?:^|\.)\d+\.", name)[-1], []).append(name)
    return found
