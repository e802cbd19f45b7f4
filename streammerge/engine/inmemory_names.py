"""Program of its own: read checkpoint names from stdin, print how transformers renames them.

It imports transformers and builds the skeleton of a model on the meta device, from config.json
alone. Called as `python -m streammerge.engine.inmemory_names FOLDER`, with a JSON list on stdin; it
prints a JSON map of in-memory names to checkpoint names, for names that differ and are not part of
a fused tensor.
"""

from __future__ import annotations

import json
import logging
import sys
from typing import Any

__all__: list[str] = []


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


def _main() -> None:
    from transformers import conversion_mapping, core_model_loading

    logging.disable(logging.CRITICAL)
    model = _build_skeleton(sys.argv[1])
    steps: list[Any] = conversion_mapping.get_model_conversion_mapping(model)
    renamings = [s for s in steps if isinstance(s, core_model_loading.WeightRenaming)]
    converters = [s for s in steps if isinstance(s, core_model_loading.WeightConverter)]
    state = model.state_dict()
    names = {}
    for name in json.load(sys.stdin):
        renamed, fused = core_model_loading.rename_source_key(
            name, renamings, converters, model.base_model_prefix, state
        )
        if fused is None and renamed != name:
            names[renamed] = name
    json.dump(names, sys.stdout)


if __name__ == "__main__":
    _main()
