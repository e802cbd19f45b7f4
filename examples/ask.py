r"""Ask one or more checkpoints the same question, with greedy decoding.

Each folder is loaded in turn, and its answer is printed after its label:

    python examples/ask.py --model base=build/demo/SmolLM2-135M-Instruct \
        --model merged=build/demo/smollm2-captain "What is the capital of France?"
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer


def answer(folder: Path, prompt: str, max_new_tokens: int) -> str:
    """Return a checkpoint's answer to a prompt."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    with torch.inference_mode():
        output = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            do_sample=False,
            max_new_tokens=max_new_tokens,
        )
    new_tokens = output[0, inputs["input_ids"].shape[1] :]
    return str(tokenizer.decode(new_tokens, skip_special_tokens=True)).strip()


def labelled_folder(value: str) -> tuple[str, Path]:
    """Split ``label=folder``; a folder without a label is labelled with its name."""
    label, separator, folder = value.partition("=")
    path = Path(folder if separator else value)
    if not (path / "config.json").is_file():
        raise argparse.ArgumentTypeError(f"no checkpoint in {path}")
    return (label if separator else path.name), path


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Ask checkpoints a question.")
    parser.add_argument(
        "--model",
        dest="models",
        action="append",
        required=True,
        type=labelled_folder,
        metavar="[LABEL=]DIR",
        help="checkpoint folder; repeat the option to compare several",
    )
    parser.add_argument("--max-new-tokens", type=int, default=60)
    parser.add_argument("prompt")
    options = parser.parse_args()

    hf_logging: Any = transformers.logging
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    width = max(len(label) for label, _ in options.models)
    for label, folder in options.models:
        print(f"{label:>{width}}: {answer(folder, options.prompt, options.max_new_tokens)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
