"""When names in memory are looked up, where, and what becomes of layers that are none."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from streammerge.adapters.adapter import open_adapter
from streammerge.checkpoint.header import StoredTensor
from streammerge.checkpoint.index import Checkpoint, Shard
from streammerge.dtypes import Dtype
from streammerge.engine import renames
from streammerge.engine.renames import MemoryNames, find_renames, transformers_names
from streammerge.errors import PlanError

if TYPE_CHECKING:
    from collections.abc import Callable

    from streammerge.adapters.adapter import Adapter

FOLDER = Path("base")
Q = "layers.0.self_attn.q_proj"
LLAMA = {"model_type": "llama"}
LLAVA = {"model_type": "llava", "text_config": {"model_type": "llama"}}
MIXTRAL = {"model_type": "mixtral", "tie_word_embeddings": False}
OTHER = {"model_type": "some_other", "tie_word_embeddings": False}
Answers = list[tuple[Path, list[str], list[str]]]


def base(config: dict[str, Any], *names: str) -> Checkpoint:
    tensors = {name: StoredTensor(name, Dtype.BF16, (4, 4), FOLDER, 0) for name in names}
    return Checkpoint(
        FOLDER, "safetensors", (Shard(FOLDER, tuple(tensors.values())),), config, tensors
    )


@pytest.fixture
def train(tmp_path: Path) -> Callable[..., Adapter]:
    """Write and open a LoRA on modules, with whole parameters beside them."""

    def write(*modules: str, whole: tuple[str, ...] = (), **config: Any) -> Adapter:
        tensors = {}
        for module in modules:
            name, _, wrappers = module.partition("+")
            tensors |= {
                f"base_model.model.{name}.{wrappers}lora_{end}.weight": np.zeros((4, 4), np.float32)
                for end in "AB"
            }
        tensors |= {f"base_model.model.{path}": np.zeros((2, 4), np.float32) for path in whole}
        save_file(tensors, tmp_path / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, **config}
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        return open_adapter(tmp_path)

    return write


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Answers:
    """Stand for transformers; what it is asked is noted."""
    calls: Answers = []

    def ask(folder: Path, names: Any, modules: Any) -> MemoryNames:
        calls.append((folder, list(names), list(modules)))
        return MemoryNames(note="asked")

    monkeypatch.setattr(renames, "transformers_names", ask)
    return calls


def test_names_of_the_checkpoint_need_nothing(train: Any, asked: Answers) -> None:
    adapter = train(
        f"model.{Q}", f"visual.{Q}", "model.mlp.experts", "model.mlp.experts.1.w1", "attn",
        f"model.{Q}+base_layer.",
        whole=("model.norm.weight", "model.embed_tokens.token_adapter.trainable_tokens_delta"),
        target_parameters=["mlp.experts.w1"], trainable_token_indices=[1, 2],
    )  # fmt: skip
    stored = base(
        MIXTRAL, f"model.{Q}.weight", f"model.visual.{Q}.weight", "model.norm.weight",
        f"visual.{Q}.weight", "model.embed_tokens.weight", "model.mlp.experts.w1",
        "attn.in_proj_weight",
    )  # fmt: skip
    assert find_renames(stored, [adapter]) == ({}, None)
    assert asked == []


@pytest.mark.parametrize(
    "whole", ["score.weight", "classifier.dense.weight", "classifier.bias", "qa_outputs.weight"]
)
def test_new_heads_need_nothing(whole: str, train: Any, asked: Answers) -> None:
    adapter = train(f"model.{Q}", whole=(whole,), modules_to_save=[whole.partition(".")[0]])
    assert find_renames(base(OTHER, f"model.{Q}.weight"), [adapter]) == ({}, None)
    assert asked == []


@pytest.mark.parametrize("head", ["lm_head", "language_model.lm_head", "model.lm_head"])
def test_tied_heads_need_nothing(head: str, train: Any, asked: Answers) -> None:
    tied = {"model_type": "some_other", "tie_word_embeddings": True}
    stored = base(tied, "language_model.model.embed_tokens.weight")
    assert find_renames(stored, [train(head)]) == ({}, None)
    assert find_renames(stored, [train("model.norm", whole=(f"{head}.weight",))])[1] == "asked"
    assert asked[0][2] == ["model.norm"]
    untied = base(OTHER, "language_model.model.embed_tokens.weight")
    assert find_renames(untied, [train(head)])[1] == "asked"


def test_common_families_are_known(train: Any, asked: Answers) -> None:
    names = (f"language_model.model.{Q}.weight", "language_model.model.embed_tokens.weight",
             "multi_modal_projector.linear_1.bias", "language_model.lm_head.weight")  # fmt: skip
    adapter = train(
        f"model.language_model.{Q}",
        whole=("model.multi_modal_projector.linear_1.bias",
               "model.language_model.embed_tokens.token_adapter.trainable_tokens_delta"),
        trainable_token_indices=[1, 2],
    )  # fmt: skip
    found, note = find_renames(base(LLAVA, *names), [adapter])
    assert found == {
        f"model.language_model.{Q}.weight": names[0],
        "model.language_model.embed_tokens.weight": names[1],
        "model.multi_modal_projector.linear_1.bias": names[2],
        "lm_head.weight": names[3],
    }
    assert note is None
    assert asked == []


@pytest.mark.parametrize(
    ("module", "targets"),
    [
        ("model.layers.0.mlp.experts+base_layer.", []),
        ("model.layers.0.mlp.experts", ["mlp.experts.down_proj"]),
        ("model.layers.0.mlp.experts.0.w1", []),
        ("model.layers.0.mlp.experts.1.w1", []),
        ("model.layers.0.mlp.gate", ["mlp.gate.weight"]),
        ("layers.0.mlp.gate", []),
    ],
)
def test_experts_of_known_families(
    module: str, targets: list[str], train: Any, asked: Answers
) -> None:
    moe = "model.layers.0.block_sparse_moe"
    stored = base(MIXTRAL, f"{moe}.experts.0.w1.weight", f"{moe}.gate.weight")
    found, note = find_renames(stored, [train(module, target_parameters=targets)])
    assert found["model.layers.0.mlp.experts.0.w1.weight"] == f"{moe}.experts.0.w1.weight"
    assert found["model.layers.0.mlp.gate.weight"] == f"{moe}.gate.weight"
    assert note is None
    assert asked == []


def test_the_spelling_of_older_adapters_is_listed(train: Any, asked: Answers) -> None:
    stored = base(LLAVA, f"model.language_model.{Q}.weight", f"model.vision_tower.{Q}.weight")
    found, _ = find_renames(stored, [train(f"language_model.model.{Q}")])
    assert found == {f"language_model.model.{Q}.weight": f"model.language_model.{Q}.weight"}
    assert asked == []


def test_a_module_of_parts_is_not_a_layer(train: Any, asked: Answers) -> None:
    # a router that is a module of its own on disk, and a parameter in memory
    router = "model.layers.0.block_sparse_moe.router"
    stored = base({"model_type": "granitemoe"}, f"{router}.layer.weight")
    found, _ = find_renames(stored, [train(router)])
    assert found == {f"{router}.weight": f"{router}.layer.weight"}
    assert asked == []


def test_a_numbered_layer_is_no_expert(train: Any, asked: Answers) -> None:
    stored = base({"model_type": "vit"}, "vit.encoder.layer.0.output.dense.weight", "vit.layers.x")
    found, _ = find_renames(stored, [train("vit.layers.0.mlp.fc2")])
    assert "vit.layers.0.mlp.fc2.weight" in found
    stored = base(OTHER, "model.layers.0.fc2.weight")
    assert find_renames(stored, [train("model.layers.0.fc1")])[1] == "asked"


def test_one_expert_of_a_fused_base(train: Any, asked: Answers) -> None:
    fused = "model.layers.0.mlp.experts.gate_up_proj"
    adapter = train("model.layers.0.block_sparse_moe.experts.1.w1")
    assert find_renames(base(MIXTRAL, fused), [adapter]) == (
        {"model.layers.0.block_sparse_moe.experts.gate_up_proj": fused},
        None,
    )
    assert asked == []


def test_families_that_are_never_renamed_are_not_asked_for(train: Any, asked: Answers) -> None:
    stored = base(LLAMA, f"model.{Q}.weight")
    assert find_renames(stored, [train("model.layers.7.self_attn.q_proj")]) == ({}, None)
    assert find_renames(base({}, f"model.{Q}.weight"), [train("x.y")]) == ({}, None)
    assert asked == []


def test_transformers_is_asked_for_the_rest(
    train: Any, monkeypatch: pytest.MonkeyPatch, asked: Answers
) -> None:
    stored = base(OTHER, f"model.llm.{Q}.weight", f"model.llm.{Q}.bias", "a.q.weight")
    adapter = train("model.new.q", f"model.older.{Q}", f"model.llm.{Q}")
    assert find_renames(stored, [adapter]) == ({}, "asked")
    assert asked == [(FOLDER, list(stored.tensors), ["model.new.q", f"model.older.{Q}"])]
    answer = MemoryNames(
        {"model.new.q.weight": "a.q.weight"}, {f"model.older.{Q}": f"model.llm.{Q}"}
    )
    monkeypatch.setattr(renames, "transformers_names", lambda *_: answer)
    assert find_renames(stored, [adapter]) == (
        {
            "model.new.q.weight": "a.q.weight",
            f"model.older.{Q}.weight": f"model.llm.{Q}.weight",
            f"model.older.{Q}.bias": f"model.llm.{Q}.bias",
        },
        None,
    )


@pytest.mark.parametrize("targets", [[], ["experts.up_proj"]])
def test_layers_made_of_other_tensors_are_refused(
    targets: list[str], train: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = "model.experts" if targets else "model.q_proj"
    made = {f"{module}.{end}": f"'model.qkv.{end}' by Chunk" for end in ("bias", "weight")}
    made |= {"model.experts.up_proj": "'model.w13' by Interleave", "model.q_proj.x.y": "other"}
    monkeypatch.setattr(renames, "transformers_names", lambda *_: MemoryNames(made=made))
    adapter = train(module, target_parameters=targets)
    with pytest.raises(PlanError, match="no tensor of the base: transformers makes it") as error:
        find_renames(base(OTHER, "model.qkv.weight"), [adapter])
    assert error.value.got == "'model.qkv.weight' by Chunk"
    assert str(error.value.where) == f"module '{module}' of {adapter.path}"


def test_what_others_are_made_of_does_not_matter(
    train: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = MemoryNames({"a.b.weight": "a.weight"}, made={"a.b.weight": "x", "c.weight": "y"})
    monkeypatch.setattr(renames, "transformers_names", lambda *_: answer)
    assert find_renames(base(OTHER, "a.weight"), [train("a.b", "d.e")]) == (
        {"a.b.weight": "a.weight"},
        None,
    )


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let the subprocess print something, or fail."""

    def set_answer(stdout: str = "", *, error: Exception | None = None) -> list[Any]:
        calls: list[Any] = []

        def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
            calls.append((command, options))
            if error is not None:
                raise error
            return subprocess.CompletedProcess(command, 0, stdout, "")

        monkeypatch.setattr(renames.importlib.util, "find_spec", lambda name: object())
        monkeypatch.setattr(renames.subprocess, "run", run)
        return calls

    return set_answer


def test_without_transformers_nothing_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(renames.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(renames.subprocess, "run", None)
    names = transformers_names(FOLDER, ["a"], [])
    assert (names.renames, names.forms, names.made) == ({}, {}, {})
    assert names.note is not None
    assert "not installed" in names.note


def test_the_last_line_is_the_answer(answer: Any) -> None:
    calls = answer('some noise\n{"renames": {"b": "a"}, "forms": {"m": "n"}, "made": {"c": "d"}}\n')
    expected = MemoryNames({"b": "a"}, {"m": "n"}, {"c": "d"})
    assert transformers_names(FOLDER, iter(["a", "c"]), iter(["m"])) == expected
    ((command, options),) = calls
    assert command == [
        sys.executable,
        "-m",
        "streammerge.engine.inmemory_names",
        str(FOLDER.resolve()),
    ]
    assert json.loads(options["input"]) == {"names": ["a", "c"], "modules": ["m"]}
    assert options["timeout"] == renames.TIMEOUT_SECONDS
    assert options["check"] is True


@pytest.mark.parametrize("stdout", ["", "not json", '{"a": ', "[]", "7", '{"renames": {}}'])
def test_an_answer_that_is_none_is_noted(stdout: str, answer: Any) -> None:
    answer(stdout)
    names = transformers_names(FOLDER, [], [])
    assert names.renames == {}
    assert names.note is not None
    assert names.note.startswith("transformers could not name the layers (")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            subprocess.CalledProcessError(1, "python", stderr="Traceback\nValueError: odd\n"),
            "ValueError: odd",
        ),
        (
            subprocess.CalledProcessError(3, "python", stderr=" \n"),
            "Command 'python' returned non-zero exit status 3.",
        ),
        (subprocess.TimeoutExpired("python", 9), "Command 'python' timed out after 9 seconds"),
    ],
)
def test_a_failure_is_noted_with_its_last_line(error: Exception, reason: str, answer: Any) -> None:
    answer(error=error)
    note = f"transformers could not name the layers ({reason})"
    assert transformers_names(FOLDER, [], []) == MemoryNames(note=note)


def test_what_a_slow_process_said_is_not_shown_as_bytes(answer: Any) -> None:
    # subprocess gives bytes here even where text was asked for
    answer(error=subprocess.TimeoutExpired("python", 9, stderr=b"a warning\n"))
    note = transformers_names(FOLDER, [], []).note
    assert note is not None
    assert "b'" not in note
