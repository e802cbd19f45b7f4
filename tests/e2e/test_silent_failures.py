"""What other mergers are known to lose without a word: here each is merged rightly, or refused.

Expected values are numpy's, from the definition; bases are F32, so that they are exact but for the
order of sums.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import streammerge
from streammerge.errors import (
    AdapterError,
    CheckpointError,
    ConfigError,
    NonFiniteError,
    PlanError,
    ResourceError,
    StreamMergeError,
    UnsupportedError,
)

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    Array = np.ndarray[tuple[int, ...], np.dtype[Any]]

HIDDEN, INNER, VOCAB, RANK, EXPERTS = 16, 24, 40, 4, 3
PREFIX = "base_model.model."
Q = "model.layers.0.self_attn.q_proj"
CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": VOCAB}


class Lab:
    """Writes a base and adapters, merges them, and knows what should come out."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.base, self.output = folder, folder / "base", folder / "merged"
        self._random = np.random.default_rng(5)

    def values(self, *shape: int) -> Array:
        return self._random.standard_normal(shape, dtype=np.float32)

    def llama(self, **more: Array) -> dict[str, Array]:
        return {
            "model.embed_tokens.weight": self.values(VOCAB, HIDDEN),
            f"{Q}.weight": self.values(HIDDEN, HIDDEN),
            "model.layers.0.self_attn.v_proj.weight": self.values(HIDDEN, HIDDEN),
            "model.norm.weight": self.values(HIDDEN),
            **more,
        }

    def moe(self) -> dict[str, Array]:
        tensors = self.llama()
        for expert in range(EXPERTS):
            before = f"model.layers.0.mlp.experts.{expert}"
            tensors[f"{before}.gate_proj.weight"] = self.values(INNER, HIDDEN)
            tensors[f"{before}.up_proj.weight"] = self.values(INNER, HIDDEN)
            tensors[f"{before}.down_proj.weight"] = self.values(HIDDEN, INNER)
        tensors["model.layers.0.mlp.gate.weight"] = self.values(EXPERTS, HIDDEN)
        return tensors

    def write_base(
        self, tensors: Mapping[str, Array], *, shards: int = 1, config: dict[str, Any] | None = None
    ) -> None:
        """Write tensors into shards in turn, so that neighbours are apart."""
        self.base.mkdir(exist_ok=True)
        names = [f"model-{n + 1:05d}-of-{shards:05d}.safetensors" for n in range(shards)]
        weight_map = {}
        for number, name in enumerate(names):
            part = {k: v for at, (k, v) in enumerate(tensors.items()) if at % shards == number}
            save_file(part, self.base / name, metadata={"format": "pt"})
            weight_map.update(dict.fromkeys(part, name))
        index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (self.base / "model.safetensors.index.json").write_text(json.dumps(index))
        (self.base / "config.json").write_text(json.dumps(config or CONFIG))
        (self.base / "generation_config.json").write_text("{}")

    def lora(self, module: str, shape: tuple[int, int]) -> tuple[dict[str, Array], Array]:
        """Factors for one module, and `B @ A`."""
        a, b = self.values(RANK, shape[1]), self.values(shape[0], RANK)
        key = f"{PREFIX}{module}"
        return {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}, b @ a

    def write_adapter(
        self, tensors: Mapping[str, Array], name: str = "adapter", **options: Any
    ) -> Path:
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        save_file(dict(tensors), folder / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, **options}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        return folder

    def merge(self, *adapters: Path, **options: Any) -> dict[str, Array]:
        streammerge.export(
            {
                "model_name_or_path": str(self.base),
                "adapter_name_or_path": [str(path) for path in adapters],
                "export_dir": str(self.output),
                "threads": 1,
                **options,
            }
        )
        tensors: dict[str, Array] = {}
        for path in sorted(self.output.glob("*.safetensors")):
            tensors.update(load_file(path))
        return tensors

    def refuses(
        self, kind: type[StreamMergeError], match: str, *adapters: Path, **options: Any
    ) -> None:
        with pytest.raises(kind, match=match):
            self.merge(*adapters, **options)
        assert not self.output.exists()


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path)


def same(got: Array, expected: Array) -> None:
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


# dropped without a word


def test_adapters_on_embeddings_are_merged(lab: Lab) -> None:
    base = lab.llama(**{"lm_head.weight": lab.values(VOCAB, HIDDEN)})
    lab.write_base(base, config={**CONFIG, "tie_word_embeddings": False})
    a, b = lab.values(RANK, VOCAB), lab.values(HIDDEN, RANK)
    key = f"{PREFIX}model.embed_tokens.lora_embedding"
    merged = lab.merge(lab.write_adapter({f"{key}_A": a, f"{key}_B": b}))
    same(merged["model.embed_tokens.weight"], base["model.embed_tokens.weight"] + 2 * (b @ a).T)
    assert np.array_equal(merged["lm_head.weight"], base["lm_head.weight"])


def test_the_bias_of_b_is_merged(lab: Lab) -> None:
    base = lab.llama(**{f"{Q}.bias": lab.values(HIDDEN)})
    lab.write_base(base)
    factors, delta = lab.lora(Q, (HIDDEN, HIDDEN))
    bias = lab.values(HIDDEN)
    adapter = lab.write_adapter({**factors, f"{PREFIX}{Q}.lora_B.bias": bias}, lora_bias=True)
    merged = lab.merge(adapter)
    same(merged[f"{Q}.weight"], base[f"{Q}.weight"] + 2 * delta)
    same(merged[f"{Q}.bias"], base[f"{Q}.bias"] + 2 * bias)


def test_one_unmatched_key_among_many_stops_the_merge(lab: Lab) -> None:
    lab.write_base(lab.llama())
    factors, _ = lab.lora(Q, (HIDDEN, HIDDEN))
    stray, _ = lab.lora("model.layers.7.self_attn.q_proj", (HIDDEN, HIDDEN))
    adapter = lab.write_adapter({**factors, **stray})
    lab.refuses(PlanError, r"model\.layers\.7\.self_attn\.q_proj", adapter)


def test_a_key_of_no_known_form_stops_the_merge(lab: Lab) -> None:
    lab.write_base(lab.llama())
    factors, _ = lab.lora(Q, (HIDDEN, HIDDEN))
    adapter = lab.write_adapter({**factors, f"{PREFIX}{Q}.something": lab.values(4)})
    lab.refuses(PlanError, "something", adapter)


@pytest.mark.parametrize("name", ["score.weight", "classifier.bias"])
def test_a_head_that_the_base_lacks_is_added(name: str, lab: Lab) -> None:
    lab.write_base(lab.llama())
    factors, _ = lab.lora(Q, (HIDDEN, HIDDEN))
    head = lab.values(3, HIDDEN) if name.endswith("weight") else lab.values(3)
    adapter = lab.write_adapter(
        {**factors, f"{PREFIX}{name}": head},
        modules_to_save=[name.partition(".")[0]], task_type="SEQ_CLS",
    )  # fmt: skip
    assert np.array_equal(lab.merge(adapter)[name], head)


@pytest.mark.parametrize("key", [f"{Q}.base_layer.bias", f"{Q}.bias"])
def test_trained_biases_replace_those_of_the_base(key: str, lab: Lab) -> None:
    lab.write_base(lab.llama(**{f"{Q}.bias": lab.values(HIDDEN)}))
    factors, _ = lab.lora(Q, (HIDDEN, HIDDEN))
    bias = lab.values(HIDDEN)
    merged = lab.merge(lab.write_adapter({**factors, f"{PREFIX}{key}": bias}, bias="all"))
    assert np.array_equal(merged[f"{Q}.bias"], bias)


def test_an_adapter_on_a_tied_head_becomes_a_head_of_its_own(lab: Lab) -> None:
    base = lab.llama()
    lab.write_base(base, config={**CONFIG, "tie_word_embeddings": True})
    factors, delta = lab.lora("lm_head", (VOCAB, HIDDEN))
    merged = lab.merge(lab.write_adapter(factors))
    embedding = base["model.embed_tokens.weight"]
    assert np.array_equal(merged["model.embed_tokens.weight"], embedding)
    same(merged["lm_head.weight"], embedding + 2 * delta)
    assert json.loads((lab.output / "config.json").read_text())["tie_word_embeddings"] is False


def test_modules_outside_target_modules_are_merged_too(lab: Lab) -> None:
    base = lab.llama()
    lab.write_base(base)
    first, _ = lab.lora(Q, (HIDDEN, HIDDEN))
    second, delta = lab.lora("model.layers.0.self_attn.v_proj", (HIDDEN, HIDDEN))
    merged = lab.merge(lab.write_adapter({**first, **second}, target_modules=["q_proj"]))
    name = "model.layers.0.self_attn.v_proj.weight"
    same(merged[name], base[name] + 2 * delta)


# experts


def test_attention_only_leaves_experts_and_their_names_alone(lab: Lab) -> None:
    base = lab.moe()
    lab.write_base(base, shards=3, config={**CONFIG, "model_type": "qwen3_moe"})
    factors, _ = lab.lora(Q, (HIDDEN, HIDDEN))
    merged = lab.merge(lab.write_adapter(factors))
    assert merged.keys() == base.keys()
    assert all(np.array_equal(merged[n], base[n]) for n in base if n != f"{Q}.weight")


@pytest.mark.parametrize("shards", [1, 4])
def test_adapters_on_fused_experts_reach_experts_that_are_stored_apart(
    shards: int, lab: Lab
) -> None:
    base = lab.moe()
    lab.write_base(base, shards=shards, config={**CONFIG, "model_type": "qwen3_moe"})
    key = f"{PREFIX}model.layers.0.mlp.experts"
    a, b = lab.values(RANK * EXPERTS, HIDDEN), lab.values(2 * INNER, RANK * EXPERTS)
    c, d = lab.values(RANK * EXPERTS, INNER), lab.values(HIDDEN, RANK * EXPERTS)
    adapter = lab.write_adapter(
        {
            f"{key}.base_layer.lora_A.weight": a, f"{key}.base_layer.lora_B.weight": b,
            f"{key}.lora_A.weight": c, f"{key}.lora_B.weight": d,
        },
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        peft_version="0.21.2",
    )  # fmt: skip
    merged = lab.merge(adapter)
    assert merged.keys() == base.keys()
    for expert in range(EXPERTS):
        rows = slice(expert * RANK, (expert + 1) * RANK)
        first, second = b[:, expert::EXPERTS] @ a[rows], d[:, expert::EXPERTS] @ c[rows]
        before = f"model.layers.0.mlp.experts.{expert}"
        for name, delta in (
            ("gate_proj", first[:INNER]), ("up_proj", first[INNER:]), ("down_proj", second),
        ):  # fmt: skip
            full = f"{before}.{name}.weight"
            same(merged[full], base[full] + 2 * delta)


@pytest.mark.parametrize("shards", [1, 4])
def test_adapters_on_single_experts_are_merged(shards: int, lab: Lab) -> None:
    base = lab.moe()
    lab.write_base(base, shards=shards, config={**CONFIG, "model_type": "qwen3_moe"})
    tensors, deltas = {}, {}
    for expert in (0, 2):
        module = f"model.layers.0.mlp.experts.{expert}.gate_proj"
        factors, deltas[f"{module}.weight"] = lab.lora(module, (INNER, HIDDEN))
        tensors.update(factors)
    merged = lab.merge(lab.write_adapter(tensors))
    for name, tensor in base.items():
        same(merged[name], tensor + 2 * deltas.get(name, 0))


# quantized bases


def test_codes_with_scales_are_not_added_to(lab: Lab) -> None:
    base = lab.llama(**{f"{Q}.weight_scale": lab.values(HIDDEN, 1)})
    config = {**CONFIG, "quantization_config": {"quant_method": "compressed-tensors"}}
    lab.write_base(base, config=config)
    factors, _ = lab.lora(Q, (HIDDEN, HIDDEN))
    lab.refuses(UnsupportedError, "compressed-tensors of this variety", lab.write_adapter(factors))


def test_float8_codes_are_not_added_to(lab: Lab) -> None:
    base = lab.llama()
    lab.write_base(base)
    path = lab.base / "model-00001-of-00001.safetensors"
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    begin, _ = header[f"{Q}.weight"]["data_offsets"]
    data = bytearray(raw[8 + length :])
    # the same bytes, seen as four times as many codes
    header[f"{Q}.weight"].update(dtype="F8_E4M3", shape=[HIDDEN, 4 * HIDDEN])
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    assert begin >= 0
    factors, _ = lab.lora(Q, (HIDDEN, 4 * HIDDEN))
    lab.refuses(PlanError, "quantized tensor", lab.write_adapter(factors))


def test_packed_weights_are_not_skipped(lab: Lab) -> None:
    base = lab.llama()
    base[f"{Q}.qweight"] = base.pop(f"{Q}.weight").astype(np.int32)
    lab.write_base(base)
    factors, _ = lab.lora(Q, (HIDDEN, HIDDEN))
    lab.refuses(PlanError, "no base tensor", lab.write_adapter(factors))


# files beside the weights


def test_the_index_counts_bytes(lab: Lab) -> None:
    base = lab.llama()
    lab.write_base(base)
    factors, _ = lab.lora(Q, (HIDDEN, HIDDEN))
    lab.merge(lab.write_adapter(factors), export_size="2KB")
    index = json.loads((lab.output / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in base.values())


def test_no_unmerged_copy_of_the_weights_comes_along(lab: Lab) -> None:
    lab.write_base(lab.llama())
    (lab.base / "consolidated.safetensors").write_bytes(b"unmerged")
    factors, _ = lab.lora(Q, (HIDDEN, HIDDEN))
    lab.merge(lab.write_adapter(factors))
    assert not (lab.output / "consolidated.safetensors").exists()
    assert (lab.output / "generation_config.json").exists()
    with safe_open(next(lab.output.glob("*.safetensors")), "np") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_stale_shard_in_the_base_is_not_merged(lab: Lab) -> None:
    base = lab.llama()
    lab.write_base(base)
    save_file({f"{Q}.weight": lab.values(HIDDEN, HIDDEN)}, lab.base / "model-old.safetensors")
    factors, delta = lab.lora(Q, (HIDDEN, HIDDEN))
    adapter = lab.write_adapter(factors)
    lab.refuses(CheckpointError, "model-old", adapter)
    merged = lab.merge(adapter, ignore_files=["model-old.safetensors"])
    same(merged[f"{Q}.weight"], base[f"{Q}.weight"] + 2 * delta)


def test_a_folder_with_shards_in_it_is_not_written_into(lab: Lab) -> None:
    lab.write_base(lab.llama())
    factors, _ = lab.lora(Q, (HIDDEN, HIDDEN))
    adapter = lab.write_adapter(factors)
    lab.output.mkdir()
    stale = lab.output / "model-00009-of-00009.safetensors"
    stale.write_bytes(b"stale")
    with pytest.raises((ConfigError, ResourceError), match="not empty"):
        lab.merge(adapter)
    assert stale.read_bytes() == b"stale"
    lab.merge(adapter, overwrite=True)
    assert not stale.exists()


# values


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_stop_the_merge(value: float, lab: Lab) -> None:
    lab.write_base(lab.llama())
    factors, _ = lab.lora(Q, (HIDDEN, HIDDEN))
    factors[f"{PREFIX}{Q}.lora_B.weight"][3, 2] = value
    lab.refuses(NonFiniteError, Q.replace(".", r"\."), lab.write_adapter(factors))


def test_overflow_of_the_output_dtype_stops_the_merge(lab: Lab) -> None:
    lab.write_base(lab.llama())
    factors, _ = lab.lora(Q, (HIDDEN, HIDDEN))
    factors[f"{PREFIX}{Q}.lora_B.weight"] *= 1e5
    lab.refuses(NonFiniteError, "overflows F16", lab.write_adapter(factors), infer_dtype="float16")


@pytest.mark.parametrize(
    ("options", "factor"),
    [
        ({"use_rslora": True}, 2 * RANK / RANK**0.5),
        ({"alpha_pattern": {"q_proj": 12}}, 12 / RANK),
        ({"r": 1, "lora_alpha": 3, "rank_pattern": {"q_proj": RANK}}, 3 / RANK),
        ({"lora_alpha": 0}, 0.0),
    ],
)
def test_scaling_is_that_of_training(options: dict[str, Any], factor: float, lab: Lab) -> None:
    base = lab.llama()
    lab.write_base(base)
    factors, delta = lab.lora(Q, (HIDDEN, HIDDEN))
    merged = lab.merge(lab.write_adapter(factors, **options))
    same(merged[f"{Q}.weight"], base[f"{Q}.weight"] + factor * delta)


def test_a_configuration_without_rank_or_alpha_is_peft_s_default_or_refused(lab: Lab) -> None:
    lab.write_base(lab.llama())
    factors, _ = lab.lora(Q, (HIDDEN, HIDDEN))
    adapter = lab.write_adapter(factors)
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "lora_alpha": 8}')
    # the rank is 8 by default, and the tensors say 4
    lab.refuses(AdapterError, "rank of the tensors", adapter)


def test_dora_magnitudes_are_applied(lab: Lab) -> None:
    base = lab.llama()
    lab.write_base(base)
    factors, delta = lab.lora(Q, (HIDDEN, HIDDEN))
    magnitude = np.abs(lab.values(HIDDEN)) + 1
    adapter = lab.write_adapter(
        {**factors, f"{PREFIX}{Q}.lora_magnitude_vector": magnitude}, use_dora=True
    )
    adapted = base[f"{Q}.weight"] + 2 * delta
    norms = np.linalg.norm(adapted, axis=1)
    same(lab.merge(adapter)[f"{Q}.weight"], (magnitude / norms)[:, None] * adapted)


# runs that stop, and runs again


def test_a_rerun_with_another_adapter_does_not_mix(lab: Lab) -> None:
    base = lab.llama()
    lab.write_base(base)
    q, v = Q, "model.layers.0.self_attn.v_proj"
    first, _ = lab.lora(q, (HIDDEN, HIDDEN))
    broken, _ = lab.lora(v, (HIDDEN, HIDDEN))
    broken[f"{PREFIX}{v}.lora_B.weight"][0, 0] = np.nan
    options = {"export_size": "1KB"}
    one = lab.write_adapter({**first, **broken}, "one")
    with pytest.raises(NonFiniteError):
        lab.merge(one, **options)
    second, second_delta = lab.lora(q, (HIDDEN, HIDDEN))
    merged = lab.merge(lab.write_adapter(second, "two"), **options)
    same(merged[f"{q}.weight"], base[f"{q}.weight"] + 2 * second_delta)
    assert np.array_equal(merged[f"{v}.weight"], base[f"{v}.weight"])


def test_a_second_run_is_not_a_second_merge(lab: Lab) -> None:
    base = lab.llama()
    lab.write_base(base)
    factors, _ = lab.lora(Q, (HIDDEN, HIDDEN))
    adapter = lab.write_adapter(factors)
    before = {path.name: path.stat().st_mtime_ns for path in lab.base.iterdir()}
    first = lab.merge(adapter)
    again = lab.merge(adapter, overwrite=True)
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert {path.name: path.stat().st_mtime_ns for path in lab.base.iterdir()} == before


@pytest.mark.parametrize("key", ["simulate_nf4", "load_in_4bit", "lora_scale"])
def test_an_unknown_option_is_not_ignored(key: str, lab: Lab) -> None:
    lab.write_base(lab.llama())
    factors, _ = lab.lora(Q, (HIDDEN, HIDDEN))
    lab.refuses(ConfigError, key, lab.write_adapter(factors), **{key: True})
