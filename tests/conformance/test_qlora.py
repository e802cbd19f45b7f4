"""`qlora_base: dequantized-nf4` merges onto what transformers and bitsandbytes had in training."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import bitsandbytes
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

import streammerge
from streammerge.errors import ConfigError, PlanError

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]

SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
ATTENTION = ["q_proj", "v_proj"]
# the configuration, and what is trained
FAMILIES: dict[str, tuple[Any, list[str]]] = {
    "llama": (lambda: transformers.LlamaConfig(**SIZES), [*ATTENTION, "down_proj"]),
    "tied": (lambda: transformers.Qwen2Config(**SIZES, tie_word_embeddings=True), ATTENTION),
    "experts": (
        lambda: transformers.Qwen3MoeConfig(**SIZES, head_dim=32, num_experts=3,
                                            num_experts_per_tok=2, moe_intermediate_size=64),
        ATTENTION,
    ),
    "gpt2": (
        lambda: transformers.GPT2Config(vocab_size=96, n_embd=128, n_layer=2, n_head=4,
                                        n_positions=64, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0),
        ["c_attn", "c_fc"],
    ),
    "vision": (
        lambda: transformers.LlavaConfig(
            text_config=transformers.LlamaConfig(**SIZES),
            vision_config=transformers.CLIPVisionConfig(
                hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
                image_size=28, patch_size=14,
            ),
        ),
        ATTENTION,
    ),
}  # fmt: skip


class Case:
    """A base, an adapter, and the model on which that would be trained in 4 bits."""

    def __init__(
        self, folder: Path, family: str, dtype: torch.dtype = torch.bfloat16, **options: Any
    ) -> None:
        self.base, self.adapter, self.out = (folder / n for n in ("base", "adapter", "out"))
        self.dtype = dtype
        configuration, targets = FAMILIES[family]
        torch.manual_seed(3)
        config = configuration()
        self.kind: Any = (
            transformers.AutoModelForImageTextToText
            if family == "vision"
            else transformers.AutoModelForCausalLM
        )
        model = self.kind.from_config(config).to(dtype)
        model.save_pretrained(self.base)
        tuned: Any = get_peft_model(
            model.float(),
            LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False,
                       fan_in_fan_out=family == "gpt2", **options),
        )  # fmt: skip
        with torch.no_grad():
            for name, parameter in tuned.named_parameters():
                # deltas of a size as training has them
                if "lora_B" in name:
                    parameter.mul_(0.1)
        tuned.save_pretrained(self.adapter)

    def in_four_bits(self, **options: Any) -> Any:
        """Load the base as QLoRA does."""
        section = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=self.dtype,
            **options,
        )
        return self.kind.from_pretrained(
            self.base, quantization_config=section, dtype=self.dtype, device_map="cpu"
        )

    def decoded(self, **options: Any) -> tuple[Any, set[str]]:
        """Return the base with its linears decoded, and the modules that these are."""
        # before it is run: that packs the codes in another way
        codes = {
            path: bitsandbytes.functional.dequantize_4bit(
                module.weight.data, module.weight.quant_state
            )
            for path, module in self.in_four_bits(**options).named_modules()
            if isinstance(module, bitsandbytes.nn.Linear4bit)
        }
        model = self.kind.from_pretrained(self.base, dtype=self.dtype)
        for path, values in codes.items():
            weight = model.get_submodule(path).weight
            is_turned = isinstance(model.get_submodule(path), transformers.pytorch_utils.Conv1D)
            weight.data = (values.T if is_turned else values).contiguous()
        return model, set(codes)

    def merge(self, **settings: Any) -> Any:
        return streammerge.export({
            "model_name_or_path": str(self.base), "adapter_name_or_path": str(self.adapter),
            "export_dir": str(self.out), "qlora_base": "dequantized-nf4", **settings,
        })  # fmt: skip

    def write_card(self, *lines: str) -> None:
        (self.adapter / "README.md").write_text("\n".join(["# Adapter", "", *lines, ""]))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_merge_is_that_of_peft_onto_the_decoded_model(
    family: str, tmp_path: Path, same_bits: Any
) -> None:
    case = Case(tmp_path, family)
    model, rounded = case.decoded()
    expected: Any = PeftModel.from_pretrained(model, case.adapter)
    expected = expected.merge_and_unload().state_dict()
    report = case.merge()
    merged = case.kind.from_pretrained(case.out, dtype=case.dtype).state_dict()
    same_bits(merged, expected)
    assert report.tensors_changed == len(rounded)
    assert f"NF4 codes of {len(rounded)} linears" in " ".join(report.notes)
    config = json.loads((case.out / "config.json").read_text())
    assert "quantization_config" not in config


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_terms_that_look_at_all_of_a_weight_see_it_rounded(
    family: str, tmp_path: Path, same_bits: Any
) -> None:
    case = Case(tmp_path, family, use_dora=True)
    model, _ = case.decoded()
    expected: Any = PeftModel.from_pretrained(model, case.adapter)
    expected = expected.merge_and_unload().state_dict()
    case.merge()
    same_bits(case.kind.from_pretrained(case.out, dtype=case.dtype).state_dict(), expected)


@pytest.mark.parametrize("settings", [
    {"threads": 3, "io": "direct"}, {"io": "mmap"}, {"io": "buffered", "export_size": "100KB"},
])  # fmt: skip
def test_the_bits_do_not_depend_on_how_it_is_done(
    settings: dict[str, Any], tmp_path: Path, load_folder: Any, same_bits: Any
) -> None:
    case = Case(tmp_path, "llama")
    case.merge(threads=1)
    expected = load_folder(case.out)
    case.merge(**settings, overwrite=True)
    same_bits(load_folder(case.out), expected)


def logits(model: Any) -> torch.Tensor:
    """Run a model as in training: what bitsandbytes runs otherwise on a CPU rounds to bfloat16."""
    with torch.no_grad():
        return model.train()(input_ids=torch.arange(3, 27).view(2, 12)).logits.double()


def distance(left: torch.Tensor, right: torch.Tensor) -> float:
    return float((left - right).norm() / right.norm())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_logits_are_those_of_the_4_bit_model_with_its_adapter(family: str, tmp_path: Path) -> None:
    case = Case(tmp_path, family, torch.float32)
    trained: Any = PeftModel.from_pretrained(case.in_four_bits(), case.adapter)
    wanted = logits(trained)
    case.merge()
    found = logits(case.kind.from_pretrained(case.out, dtype=torch.float32))
    case.merge(qlora_base="original", overwrite=True)
    other = logits(case.kind.from_pretrained(case.out, dtype=torch.float32))
    # the same weights but for one rounding of W_q + dW: 2^-24 for each of some 10 products in a row
    # whose sums have at most 192 terms
    assert distance(found, wanted) < 10 * 192 * 2**-24
    assert distance(other, wanted) > 0.01


def test_logits_in_16_bit_are_nearer_than_onto_the_original(tmp_path: Path) -> None:
    case = Case(tmp_path, "llama")
    wanted = logits(PeftModel.from_pretrained(case.in_four_bits(), case.adapter))
    case.merge()
    found = distance(logits(case.kind.from_pretrained(case.out, dtype=case.dtype)), wanted)
    case.merge(qlora_base="original", overwrite=True)
    other = distance(logits(case.kind.from_pretrained(case.out, dtype=case.dtype)), wanted)
    # one rounding of each weight, 2^-9, as each product's result has; NF4 moves a weight by 2^-4
    assert found < 0.02
    assert found < other / 5


def test_modules_that_the_training_skipped_stay_as_they_are(tmp_path: Path, same_bits: Any) -> None:
    case = Case(tmp_path, "llama")
    skipped = ["lm_head", "up_proj", "model.layers.1.self_attn"]
    case.write_card(
        "The following `bitsandbytes` quantization config was used during training:",
        "- load_in_8bit: False", "- load_in_4bit: True", f"- llm_int8_skip_modules: {skipped}",
        "- bnb_4bit_quant_type: nf4", "- bnb_4bit_use_double_quant: True",
    )  # fmt: skip
    model, rounded = case.decoded(llm_int8_skip_modules=skipped)
    expected: Any = PeftModel.from_pretrained(model, case.adapter)
    report = case.merge()
    merged = case.kind.from_pretrained(case.out, dtype=case.dtype).state_dict()
    same_bits(merged, expected.merge_and_unload().state_dict())
    # what is neither rounded nor trained passes through: of layer 1 k_proj and o_proj, and up_proj
    assert len(rounded) == 14 - 2 - 4
    assert report.tensors_changed == len(rounded) + 2


def test_a_training_without_double_quantization(tmp_path: Path) -> None:
    case = Case(tmp_path, "llama")
    case.write_card("load_in_4bit: true", "bnb_4bit_use_double_quant: false")
    report = case.merge()
    assert "without double quantization" in " ".join(report.notes)
    name = "model.layers.0.mlp.up_proj.weight"
    weight = load_file(case.base / "model.safetensors")[name]
    codes, state = bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4")
    wanted = bitsandbytes.functional.dequantize_4bit(codes, state)
    assert torch.equal(load_file(case.out / "model.safetensors")[name], wanted)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["load_in_4bit: true", "bnb_4bit_quant_type: fp4"], "is not what this adapter"),
        (["- load_in_4bit: True", "- bnb_4bit_quant_type: 'fp4'"], "expected nf4; got fp4"),
    ],
)
def test_a_training_with_other_codes_is_refused(
    lines: list[str], message: str, tmp_path: Path
) -> None:
    case = Case(tmp_path, "llama")
    case.write_card(*lines)
    with pytest.raises(PlanError, match=message):
        case.merge()
    assert not case.out.exists()


def test_trainings_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    case = Case(tmp_path, "llama")
    case.write_card("load_in_4bit: true", "bnb_4bit_use_double_quant: true")
    other = tmp_path / "other"
    other.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (other / name).write_bytes((case.adapter / name).read_bytes())
    (other / "training_args.yaml").write_text("quantization_bit: 4\ndouble_quantization: false\n")
    with pytest.raises(PlanError, match="with and without double quantization"):
        case.merge(adapter_name_or_path=[str(case.adapter), str(other)])


def test_a_quantized_base_is_refused(tmp_path: Path) -> None:
    case = Case(tmp_path, "llama")
    case.in_four_bits().save_pretrained(tmp_path / "coded")
    with pytest.raises(PlanError, match=r"this one is quantized.*remove qlora_base"):
        case.merge(model_name_or_path=str(tmp_path / "coded"))
    case.merge(model_name_or_path=str(tmp_path / "coded"), qlora_base=None)


def test_a_base_merged_onto_its_own_codes_is_the_same_merge(
    tmp_path: Path, load_folder: Any, same_bits: Any
) -> None:
    case = Case(tmp_path, "llama")
    case.in_four_bits().save_pretrained(tmp_path / "coded")
    case.merge(model_name_or_path=str(tmp_path / "coded"), qlora_base=None)
    onto_codes = load_folder(case.out)
    case.merge(overwrite=True)
    same_bits(load_folder(case.out), onto_codes)


def test_codes_of_such_a_merge_are_those_of_what_it_writes(
    tmp_path: Path, load_folder: Any, same_bits: Any
) -> None:
    case = Case(tmp_path, "llama")
    case.merge()
    plain = tmp_path / "plain"
    case.out.rename(plain)
    codes = {"export_quantization_method": "nf4"}
    case.merge(model_name_or_path=str(plain), adapter_name_or_path=None, qlora_base=None, **codes)
    in_two_steps = load_folder(case.out)
    case.merge(**codes, overwrite=True)
    same_bits(load_folder(case.out), in_two_steps)


@pytest.mark.parametrize("base", ["original", "dequantized-nf4"])
def test_without_an_adapter_it_makes_no_sense(base: str, tmp_path: Path) -> None:
    case = Case(tmp_path, "llama")
    with pytest.raises(ConfigError, match=rf"qlora_base: {base} is about what an adapter"):
        case.merge(qlora_base=base, adapter_name_or_path=None)


SIGNS = {
    "card of PEFT": ("README.md", "- quant_method: bitsandbytes\n- load_in_4bit: True\n"),
    "card of Axolotl": ("README.md", "```yaml\nadapter: qlora\nload_in_4bit: true\n```\n"),
    "LLaMA-Factory": ("training_args.yaml", "quantization_bit: 4\nquantization_method: bnb\n"),
}


@pytest.mark.parametrize("sign", SIGNS)
def test_signs_of_4_bits_are_pointed_at(sign: str, tmp_path: Path) -> None:
    case = Case(tmp_path, "llama")
    file, text = SIGNS[sign]
    (case.adapter / file).write_text(text)
    notes = " ".join(case.merge(qlora_base=None).notes)
    assert f"{file} of {case.adapter} says" in notes
    assert "a training on 4 bits, merged onto the weights as they are given" in notes
    assert "compare-bases" in notes
    assert not case.merge(qlora_base="original", overwrite=True).notes


def test_the_name_of_a_4_bit_checkpoint_is_pointed_at(tmp_path: Path) -> None:
    case = Case(tmp_path, "llama")
    path = case.adapter / "adapter_config.json"
    config = json.loads(path.read_text())
    config["base_model_name_or_path"] = "unsloth/llama-3-8b-bnb-4bit"
    path.write_text(json.dumps(config))
    notes = case.merge(qlora_base=None).notes
    assert any("model_name_or_path: unsloth/llama-3-8b-bnb-4bit merges" in note for note in notes)
    notes = case.merge(overwrite=True).notes
    assert any("that checkpoint itself as model_name_or_path" in note for note in notes)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("README.md", "- load_in_4bit: False\n"),
        ("README.md", "load_in_8bit: true\n"),
        ("training_args.yaml", "quantization_bit: 8\n"),
        ("training_args.yaml", "quantization_bit: 4\nquantization_method: hqq\n"),
        ("training_args.yaml", "quantization_bit: none\n"),
    ],
)
def test_what_is_no_sign_is_left_alone(file: str, text: str, tmp_path: Path) -> None:
    case = Case(tmp_path, "llama")
    (case.adapter / file).write_text(text)
    assert not case.merge(qlora_base=None).notes


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"x" * (2 << 20)])
def test_cards_that_cannot_be_read_say_nothing(content: bytes, tmp_path: Path) -> None:
    case = Case(tmp_path, "llama")
    (case.adapter / "README.md").write_bytes(content)
    assert not case.merge(qlora_base=None).notes
