"""An AWQ export of a tiny Llama: what it loses, how it is stored, and a run that was cut off."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast
from transformers.utils.quantization_config import AwqConfig

import streammerge
from streammerge.errors import QuantizationError, StreamMergeError, UnsupportedError
from streammerge.quantize import methods
from streammerge.quantize.pack import unpack_awq, unpack_gptq

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings("ignore")

WORDS, GROUP = 150, 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a base whose norms are uneven, and texts."""
    path = tmp_path_factory.mktemp("awq")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=64,
        tie_word_embeddings=True, attention_bias=True,
    )  # fmt: skip
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("layernorm.weight"):
                parameter.copy_(torch.randn(64).exp())
            elif name.endswith("bias"):
                parameter.normal_(0, 0.02)
            elif name.endswith("proj.weight"):
                parameter.normal_(0, 0.1)
    model.save_pretrained(path / "base")
    inner = Tokenizer(models.WordLevel({f"w{i}": i for i in range(WORDS)}, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="w0").save_pretrained(path / "base")
    draws = torch.randint(0, WORDS, (40, 30))
    rows = [{"text": " ".join(f"w{word}" for word in row)} for row in draws.tolist()]
    (path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def export(folder: Path, method: str, name: str | None = None, **options: Any) -> Path:
    output = folder / (name or method)
    streammerge.export(
        {
            "model_name_or_path": str(folder / "base"),
            "export_dir": str(output),
            "export_quantization_bit": 4,
            "export_quantization_method": method,
            "export_quantization_dataset": str(folder / "texts.jsonl"),
            "export_quantization_group_size": GROUP,
            "export_quantization_nsamples": 8,
            "export_quantization_maxlen": 32,
            "threads": 1,
            "overwrite": True,
            **options,
        }
    )
    return output


@pytest.fixture(scope="module")
def outputs(folder: Path) -> dict[str, Path]:
    return {method: export(folder, method) for method in ("awq", "rtn")}


def read(output: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for path in output.glob("*.safetensors"):
        tensors.update(load_file(path))
    return tensors


def unpacked(output: Path, folder: Path) -> Any:
    """Return the model that a loader would make of a checkpoint, in float32."""
    tensors = read(output)
    state = {name: t.float() for name, t in tensors.items() if t.is_floating_point()}
    for name in [name for name in tensors if name.endswith(".qweight")]:
        module = name.removesuffix(".qweight")
        of = {n.rpartition(".")[2]: t for n, t in tensors.items() if n.startswith(f"{module}.")}
        if "g_idx" in of:
            linear = unpack_gptq(of, bits=4, group_size=GROUP)
        else:
            linear = unpack_awq(of, group_size=GROUP)
        state[f"{module}.weight"] = linear.dequantize()
        del state[f"{module}.scales"]
    model: Any = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    return model


@torch.no_grad()
def divergence(model: Any, folder: Path) -> float:
    """Return the mean divergence of next words from the base's, on words it has not seen."""
    base: Any = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    ids = torch.randint(0, WORDS, (8, 32), generator=torch.Generator().manual_seed(5))
    right, got = (m(ids).logits.log_softmax(dim=-1) for m in (base, model))
    return float((right.exp() * (right - got)).sum(dim=-1).mean())


def test_it_loses_less_than_rounding(outputs: dict[str, Path], folder: Path) -> None:
    lost = {method: divergence(unpacked(path, folder), folder) for method, path in outputs.items()}
    assert 0 < lost["awq"] < 0.8 * lost["rtn"]


def test_what_is_stored(outputs: dict[str, Path], folder: Path) -> None:
    ours, base = read(outputs["awq"]), read(folder / "base")
    ends = {name.rpartition(".")[2] for name in ours if "q_proj" in name}
    assert ends == {"qweight", "qzeros", "scales", "bias"}
    for name, tensor in base.items():
        if name.endswith("proj.weight"):
            assert name not in ours
            continue
        assert (ours[name].dtype, ours[name].shape) == (tensor.dtype, tensor.shape)
        takes_scales = "layernorm" in name or name.endswith("v_proj.bias")
        assert torch.equal(ours[name], tensor) is not takes_scales
    config = json.loads((outputs["awq"] / "config.json").read_text())["quantization_config"]
    assert config["zero_point"] is True
    known = AwqConfig.from_dict(config).to_dict()
    wanted = {"bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True}
    assert wanted.items() <= known.items()


def test_a_run_that_was_cut_off_ends_in_the_same_bytes(
    outputs: dict[str, Path], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0
    real: Callable[..., Any] = methods.quantize_awq

    def fail(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 12:
            raise QuantizationError("cut off")
        return real(*arguments, **options)

    monkeypatch.setattr(methods, "quantize_awq", fail)
    with pytest.raises(StreamMergeError, match="cut off"):
        export(folder, "awq", "again")
    assert not (folder / "again").exists()
    calls = 100
    again = export(folder, "awq", "again")
    # the first layer's seven linears were not done twice
    assert calls == 107
    names = sorted(path.name for path in outputs["awq"].glob("*.safetensors"))
    assert names
    for name in names:
        assert (again / name).read_bytes() == (outputs["awq"] / name).read_bytes()


def test_what_has_no_form_is_refused_before_anything_is_written(folder: Path) -> None:
    with pytest.raises(UnsupportedError, match="asymmetric"):
        export(folder, "awq", "refused", export_quantization_sym=True)
    with pytest.raises(UnsupportedError, match="4 bits only"):
        export(folder, "awq", "refused", export_quantization_bit=8)
    with pytest.raises(QuantizationError, match="shape"):
        export(folder, "awq", "refused", export_quantization_group_size=64)
    assert not list(folder.glob("*refused*"))
