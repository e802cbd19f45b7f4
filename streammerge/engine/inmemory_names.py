"""Program of its own: read checkpoint names from stdin, print how transformers renames them.

It imports transformers and builds the skeleton of a model on the meta device, from config.json
alone. Called as `python -m streammerge.engine.inmemory_names FOLDER`, with `{"names": the
checkpoint's tensors, "modules": paths of an adapter's modules}` on stdin; it prints

    {"renames": {name in memory: checkpoint name},          where they differ
     "forms": {module of the adapter: its path in memory},  where they differ
     "made": {name in memory: what it is made of}}          where it is no tensor of the checkpoint

Experts that memory has fused and the checkpoint apart are no tensors in memory. They are listed as
`<container in memory>.<number>.<the checkpoint's name of the projection>`.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["name_tensors"]

# the number of an expert, and what its tensor is called
_EXPERT = re.compile(r".*\.(\d+\..+)")
# what is done to the tensors of single experts when they are fused; nothing else may be done to
# them, or the parts of the fused tensor would not be theirs
_FUSING = frozenset({"MergeModulelist", "Concatenate"})


def _build_skeleton(folder: str) -> Any:
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    classes = [getattr(transformers, name, None) for name in config.architectures or []]
    with torch.device("meta"):
        # whatever else the config names is not a model
        known = [c for c in classes if isinstance(c, type)]
        if known and issubclass(known[0], transformers.PreTrainedModel):
            return known[0](config)
        return transformers.AutoModel.from_config(config)  # type: ignore[no-untyped-call]


def name_tensors(
    model: Any, names: Iterable[str], modules: Iterable[str] = ()
) -> dict[str, dict[str, str]]:
    """Answer for one model.

    Args:
        model: A transformers model; its tensors may be on the meta device.
        names: The checkpoint's tensor names.
        modules: Paths of an adapter's modules, under any version's names.
    """
    from transformers import conversion_mapping, core_model_loading

    steps: list[Any] = conversion_mapping.get_model_conversion_mapping(model)
    renamings = [s for s in steps if isinstance(s, core_model_loading.WeightRenaming)]
    converters = [s for s in steps if isinstance(s, core_model_loading.WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    state = model.state_dict()

    def rename(name: str) -> tuple[str, str | None]:
        return core_model_loading.rename_source_key(
            name, renamings, converters, model.base_model_prefix, state
        )

    found: dict[str, list[str]] = {}
    made: dict[str, str] = {}
    for name in names:
        renamed, pattern = rename(name)
        if pattern is None:
            # what the model does not have is not loaded
            if renamed in state:
                found.setdefault(renamed, []).append(name)
            continue
        converter = by_pattern[pattern]
        done = [type(operation).__name__ for operation in converter.operations]
        expert = _EXPERT.fullmatch(name)
        if expert and "MergeModulelist" in done and _FUSING.issuperset(done):
            container = renamed.rpartition(".")[0]
            if renamed in state:
                found.setdefault(f"{container}.{expert[1]}", []).append(name)
            continue
        # of several the key has the first in it
        first, *_ = targets = [t.replace(r"\1", "") for t in converter.target_patterns]
        for target in targets:
            made[renamed.replace(first, target)] = f"'{name}' by {', '.join(done)}"
    renames = {form: each[0] for form, each in found.items() if [form] != each and len(each) == 1}
    for form, each in found.items():
        if len(each) > 1:
            made[form] = " or ".join(f"'{name}'" for name in each)
    forms = {}
    for module in modules:
        form, pattern = rename(f"{module}.weight")
        if pattern is None and form in state and form != f"{module}.weight":
            forms[module] = form.removesuffix(".weight")
    return {"renames": renames, "forms": forms, "made": made}


def _main() -> None:
    logging.disable(logging.CRITICAL)
    question = json.load(sys.stdin)
    model = _build_skeleton(sys.argv[1])
    json.dump(name_tensors(model, question["names"], question["modules"]), sys.stdout)


if __name__ == "__main__":
    _main()
