"""Train the demo's LoRA adapter: answers in the style of a captain's log.

Trains on the question-and-answer pairs of ``captain_log.jsonl`` for about a minute on a CPU:

    pip install peft "transformers>=5" torch
    python examples/train_adapter.py build/demo/SmolLM2-135M-Instruct build/demo/captain_lora
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

DATA = Path(__file__).with_name("captain_log.jsonl")
MODEL_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IGNORED = -100

Example = tuple[list[int], list[int]]


def encode(tokenizer: Any, messages: list[dict[str, str]]) -> Example:
    """Return the token ids of a conversation, and the labels of its last answer alone."""
    prompt = tokenizer.apply_chat_template(
        messages[:-1], tokenize=False, add_generation_prompt=True
    )
    answer = messages[-1]["content"] + tokenizer.eos_token
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    answer_ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
    return prompt_ids + answer_ids, [IGNORED] * len(prompt_ids) + answer_ids


def collate(batch: list[Example], pad_id: int) -> dict[str, torch.Tensor]:
    """Pad examples on the right to one length."""
    length = max(len(ids) for ids, _ in batch)
    rows: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for ids, labels in batch:
        padding = length - len(ids)
        rows["input_ids"].append(ids + [pad_id] * padding)
        rows["attention_mask"].append([1] * len(ids) + [0] * padding)
        rows["labels"].append(labels + [IGNORED] * padding)
    return {name: torch.tensor(values) for name, values in rows.items()}


def train(model: Any, examples: list[Example], pad_id: int, options: argparse.Namespace) -> None:
    """Run the training loop, with a learning rate that falls linearly to zero."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=options.learning_rate, weight_decay=0.0)
    steps = options.epochs * -(-len(examples) // options.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 - step / steps)
    shuffler = random.Random(options.seed)
    model.train()
    for epoch in range(options.epochs):
        shuffler.shuffle(examples)
        losses = []
        for start in range(0, len(examples), options.batch_size):
            batch = examples[start : start + options.batch_size]
            loss = model(**collate(batch, pad_id)).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(loss.item())
        print(f"epoch {epoch + 1}/{options.epochs}: loss {sum(losses) / len(losses):.3f}")


def save_adapter(model: Any, folder: Path) -> None:
    """Write the adapter in BF16, with settings that do not depend on where it was trained."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = MODEL_NAME
    # PEFT keeps the targets in a set, whose order changes from run to run.
    config["target_modules"] = sorted(config["target_modules"])
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Train the demo's LoRA adapter.")
    parser.add_argument("base_dir", type=Path)
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> int:
    """Run the command line."""
    options = parse_args()
    hf_logging: Any = transformers.logging
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.manual_seed(options.seed)
    started = time.monotonic()

    tokenizer = AutoTokenizer.from_pretrained(options.base_dir)
    # Small updates would be lost to rounding if the weights were trained in BF16.
    base = AutoModelForCausalLM.from_pretrained(options.base_dir, dtype=torch.float32)
    lora = LoraConfig(r=4, lora_alpha=16, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = get_peft_model(base, lora)
    with DATA.open(encoding="utf-8") as lines:
        examples = [encode(tokenizer, json.loads(line)["messages"]) for line in lines]
    train(model, examples, tokenizer.pad_token_id, options)
    save_adapter(model, options.output_dir)

    size = (options.output_dir / "adapter_model.safetensors").stat().st_size / 1e6
    seconds = time.monotonic() - started
    print(f"{options.output_dir}: adapter of {size:.1f} MB, trained in {seconds:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
