"""Small bases and adapters of every kind, and the bound within which a GPU's result is.

    |GPU - CPU| <= roundings * ulp(M) + 2 (R + K + 4) 2^-24 M,    M = max(|W| + S, |CPU|)

W is the base, S at least the sum of |scaling| |B| |A| of all adapters, ulp that of the tensor's
dtype. Both sides round sums of F32 (F64 for F64) that differ by no more than the second term: their
order over R differs, and with DoRA that of norms over K.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

HIDDEN, INNER, VOCAB, EXPERTS, LAYERS = 48, 80, 56, 3, 2
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (24, HIDDEN),
    "self_attn.v_proj": (24, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
CONV1D = {
    "attn.c_attn": (HIDDEN, 3 * HIDDEN),
    "attn.c_proj": (HIDDEN, HIDDEN),
    "mlp.c_fc": (HIDDEN, INNER),
}
UNIT = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 2**-23, torch.float64: 2**-52}
Tensors = dict[str, torch.Tensor]


@dataclass
class Merge:
    """One export to be done on either device."""

    settings: dict[str, Any]
    spread: float
    """S."""
    depth: int
    """R + K."""
    roundings: int = 1

    def on(self, output: Path, device: str) -> dict[str, Any]:
        return {**self.settings, "export_dir": str(output), "export_device": device}

    def check(self, base: Tensors, cpu: Tensors, gpu: Tensors) -> None:
        """Compare two exports, all of their tensors."""
        assert gpu.keys() == cpu.keys()
        merged = 0
        for name, expected in cpu.items():
            got = gpu[name]
            assert (got.dtype, got.shape) == (expected.dtype, expected.shape), name
            before = base.get(name)
            if before is not None and same(before, expected):
                assert same(got, before), name
                continue
            merged += 1
            self.check_tensor(name, before, expected, got)
        assert merged

    def check_tensor(
        self, name: str, before: torch.Tensor | None, cpu: torch.Tensor, gpu: torch.Tensor
    ) -> None:
        wide, expected = gpu.double(), cpu.double()
        assert bool(wide.isfinite().all()), name
        most = expected.abs()
        if before is not None and before.shape == cpu.shape:
            most = torch.maximum(most, before.double().abs() + self.spread)
        else:
            most = most.clamp(min=self.spread) + self.spread
        unit = UNIT[cpu.dtype]
        ulp = torch.exp2(torch.floor(torch.log2(most))) * unit
        fine = 2**-53 if cpu.dtype is torch.float64 else 2**-24
        bound = self.roundings * ulp + 2 * (self.depth + 4) * fine * most
        assert bool(((wide - expected).abs() <= bound).all()), name
        if cpu.dtype in (torch.bfloat16, torch.float16):
            # a difference needs a sum next to a tie
            assert (wide != expected).double().mean() < 0.01, name


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    pair = [t.contiguous().reshape(-1).view(torch.uint8) for t in (one, other)]
    return torch.equal(*pair)


def load_folder(folder: Path) -> Tensors:
    tensors: Tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(path))
    return tensors


class Builder:
    """Writes bases and adapters below a folder."""

    def __init__(self, folder: Path, seed: int = 0) -> None:
        self.folder = folder
        self.random = torch.Generator().manual_seed(seed)
        folder.mkdir(exist_ok=True)

    def values(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.random)

    def llama(self, dtype: torch.dtype, *, has_biases: bool = False, name: str = "base") -> Path:
        tensors = {
            "model.embed_tokens.weight": self.values(VOCAB, HIDDEN),
            "lm_head.weight": self.values(VOCAB, HIDDEN),
            "model.norm.weight": self.values(HIDDEN),
        }
        for layer in range(LAYERS):
            for module, shape in SHAPES.items():
                path = f"model.layers.{layer}.{module}"
                tensors[f"{path}.weight"] = self.values(*shape)
                if has_biases:
                    tensors[f"{path}.bias"] = self.values(shape[0])
        config = {"model_type": "llama", "tie_word_embeddings": False}
        return self.save(name, {k: t.to(dtype) for k, t in tensors.items()}, config)

    def gpt2(self, dtype: torch.dtype) -> Path:
        tensors = {"transformer.wte.weight": self.values(VOCAB, HIDDEN)}
        for layer in range(LAYERS):
            for module, (inputs, outputs) in CONV1D.items():
                tensors[f"transformer.h.{layer}.{module}.weight"] = self.values(inputs, outputs)
        return self.save("base", {k: t.to(dtype) for k, t in tensors.items()}, {
            "model_type": "gpt2", "tie_word_embeddings": True,
        })  # fmt: skip

    def gpt_oss(self, dtype: torch.dtype) -> Path:
        """Experts in one tensor each, gate and up in turns."""
        tensors = {"model.embed_tokens.weight": self.values(VOCAB, HIDDEN)}
        for layer in range(LAYERS):
            block = f"model.layers.{layer}.mlp.experts"
            tensors[f"{block}.gate_up_proj"] = self.values(EXPERTS, HIDDEN, 2 * INNER)
            tensors[f"{block}.down_proj"] = self.values(EXPERTS, INNER, HIDDEN)
        return self.save("base", {k: t.to(dtype) for k, t in tensors.items()}, {
            "model_type": "gpt_oss", "tie_word_embeddings": False, "num_hidden_layers": LAYERS,
            "num_local_experts": EXPERTS, "hidden_size": HIDDEN, "intermediate_size": INNER,
        })  # fmt: skip

    def save(self, name: str, tensors: Tensors, config: dict[str, Any]) -> Path:
        path = self.folder / name
        path.mkdir()
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        (path / "config.json").write_text(json.dumps(config))
        return path

    def adapter(
        self,
        shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]],
        *,
        name: str = "adapter",
        dtype: torch.dtype = torch.float32,
        more: Tensors | None = None,
        **config: Any,
    ) -> Path:
        """Write an adapter; `shapes` are those of A and B by module."""
        tensors = dict(more or {})
        for module, pair in shapes.items():
            is_embedding = module.endswith("embed_tokens")
            for letter, shape in zip("AB", pair, strict=True):
                key = f"lora_embedding_{letter}" if is_embedding else f"lora_{letter}.weight"
                tensors[f"{module}.{key}"] = self.factor(*shape)
        path = self.folder / name
        path.mkdir()
        prefixed = {f"base_model.model.{key}": t.to(dtype) for key, t in tensors.items()}
        save_file(prefixed, path / "adapter_model.safetensors")
        settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 10, **config}
        (path / "adapter_config.json").write_text(json.dumps(settings))
        return path

    def factor(self, *shape: int) -> torch.Tensor:
        """No value is above 0.3, so that S is at most R * 0.09 times the scaling."""
        return (0.1 * self.values(*shape)).clamp(-0.3, 0.3)

    def linears(self, rank: int) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
        return {
            f"model.layers.{layer}.{module}": ((rank, k), (n, rank))
            for layer in range(LAYERS)
            for module, (n, k) in SHAPES.items()
        }

    def magnitudes(self) -> Tensors:
        return {
            f"model.layers.{layer}.{module}.lora_magnitude_vector": (self.values(n).abs() + k**0.5)
            for layer in range(LAYERS)
            for module, (n, k) in SHAPES.items()
        }

    def merge(
        self, base: Path, *adapters: Path, rank: int = 4, roundings: int = 1, **settings: Any
    ) -> Merge:
        most = 2.5 * rank * 0.09 * max(1, len(adapters))
        return Merge(
            {
                "model_name_or_path": str(base),
                "adapter_name_or_path": [str(path) for path in adapters],
                **settings,
            },
            spread=most,
            depth=len(adapters) * rank + 3 * HIDDEN,
            roundings=roundings,
        )


def lora(
    build: Builder, dtype: torch.dtype, rank: int = 4, factors: torch.dtype = torch.float32
) -> Merge:
    adapter = build.adapter(build.linears(rank), dtype=factors, r=rank, lora_alpha=2.5 * rank)
    return build.merge(build.llama(dtype), adapter, rank=rank)


def ranks(build: Builder) -> Merge:
    """Targets of one block that cannot share a launch."""
    shapes = build.linears(4)
    for name, (n, k) in SHAPES.items():
        if name.startswith("mlp"):
            shapes |= {
                f"model.layers.{layer}.{name}": ((20, k), (n, 20)) for layer in range(LAYERS)
            }
    adapter = build.adapter(shapes, rank_pattern={r"mlp\.\w+": 20}, alpha_pattern={"o_proj": 7})
    return build.merge(build.llama(torch.bfloat16), adapter, rank=20)


def several(build: Builder, numerics: str) -> Merge:
    adapters = [
        build.adapter(build.linears(rank), name=f"adapter{rank}", r=rank, lora_alpha=2.5 * rank)
        for rank in (4, 20)
    ]
    base = build.llama(torch.bfloat16)
    return build.merge(base, *adapters, rank=20, roundings=2, numerics=numerics)


def dora(build: Builder, dtype: torch.dtype, numerics: str = "peft") -> Merge:
    adapter = build.adapter(build.linears(4), more=build.magnitudes(), use_dora=True)
    return build.merge(build.llama(dtype), adapter, numerics=numerics)


def dora_and_lora(build: Builder, numerics: str) -> Merge:
    first = build.adapter(build.linears(4), more=build.magnitudes(), use_dora=True)
    second = build.adapter(build.linears(4), name="second")
    base = build.llama(torch.bfloat16)
    return build.merge(base, first, second, roundings=2, numerics=numerics)


def experts(build: Builder, dtype: torch.dtype) -> Merge:
    """Whole parameters of experts, each of which is a part of its own."""
    rank = 4
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
    for layer in range(LAYERS):
        block = f"model.layers.{layer}.mlp.experts"
        shapes[f"{block}.base_layer"] = ((rank * EXPERTS, HIDDEN), (2 * INNER, rank * EXPERTS))
        shapes[block] = ((rank * EXPERTS, INNER), (HIDDEN, rank * EXPERTS))
    parameters = ["experts.gate_up_proj", "experts.down_proj"]
    adapter = build.adapter(shapes, target_modules=[], target_parameters=parameters)
    return build.merge(build.gpt_oss(dtype), adapter, roundings=2)


def single_experts(build: Builder) -> Merge:
    """Projections of single experts: of the fused tensor, every other column."""
    rank = 4
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
    for layer in range(LAYERS):
        for expert in range(EXPERTS - 1):
            path = f"model.layers.{layer}.mlp.experts.{expert}"
            shapes[f"{path}.gate_proj"] = shapes[f"{path}.up_proj"] = (
                (rank, HIDDEN), (INNER, rank),
            )  # fmt: skip
            shapes[f"{path}.down_proj"] = ((rank, INNER), (HIDDEN, rank))
    names = ["gate_proj", "up_proj", "down_proj"]
    adapter = build.adapter(shapes, target_modules=names)
    return build.merge(build.gpt_oss(torch.bfloat16), adapter)


def embedding(build: Builder) -> Merge:
    """The delta of an embedding is rounded before it is added."""
    shapes = {"model.embed_tokens": ((4, VOCAB), (HIDDEN, 4)), "lm_head": ((4, HIDDEN), (VOCAB, 4))}
    adapter = build.adapter(shapes, target_modules=["embed_tokens", "lm_head"])
    return build.merge(build.llama(torch.bfloat16), adapter, roundings=2)


def conv1d(build: Builder, **options: Any) -> Merge:
    shapes = {
        f"transformer.h.{layer}.{module}": ((4, inputs), (outputs, 4))
        for layer in range(LAYERS)
        for module, (inputs, outputs) in CONV1D.items()
    }
    more = {}
    if options:
        more = {
            f"transformer.h.{layer}.{module}.lora_magnitude_vector": self_norms
            for layer in range(LAYERS)
            for module, (_, outputs) in CONV1D.items()
            for self_norms in [build.values(outputs).abs() + HIDDEN**0.5]
        }
    adapter = build.adapter(shapes, more=more, fan_in_fan_out=True, **options)
    return build.merge(build.gpt2(torch.bfloat16), adapter)


def biases(build: Builder) -> Merge:
    more = {
        f"model.layers.{layer}.{module}.lora_B.bias": build.factor(n)
        for layer in range(LAYERS)
        for module, (n, _) in SHAPES.items()
    }
    adapter = build.adapter(build.linears(4), more=more, lora_bias=True)
    return build.merge(build.llama(torch.bfloat16, has_biases=True), adapter)


def ia3(build: Builder) -> Merge:
    more = {
        f"model.layers.{layer}.self_attn.k_proj.ia3_l": build.values(24, 1) + 1
        for layer in range(LAYERS)
    }
    adapter = build.adapter(
        {}, more=more, peft_type="IA3", target_modules=["k_proj"], feedforward_modules=[]
    )
    return build.merge(build.llama(torch.bfloat16), adapter)


def halved(build: Builder) -> Merge:
    """A base that becomes another dtype."""
    merge = lora(build, torch.float32)
    merge.settings["infer_dtype"] = "float16"
    merge.roundings = 2
    return merge


BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
CASES: dict[str, tuple[Callable[[Builder], Merge], str]] = {
    "bf16": (lambda b: lora(b, BF16), "14 by kernels"),
    "fp16": (lambda b: lora(b, F16), "14 by kernels"),
    "fp32": (lambda b: lora(b, F32, 20), "14 by kernels"),
    "fp64": (lambda b: lora(b, F64), "14 by torch on the GPU (F64 weights)"),
    "bf16 factors": (lambda b: lora(b, BF16, factors=BF16), "14 by kernels"),
    "several ranks": (ranks, "14 by kernels"),
    "several in turn": (lambda b: several(b, "peft"), "14 by kernels"),
    "several at once": (lambda b: several(b, "fp32"), "14 by kernels"),
    "dora": (lambda b: dora(b, BF16), "14 by kernels"),
    "dora fp32": (lambda b: dora(b, F32), "14 by kernels"),
    "dora and lora": (lambda b: dora_and_lora(b, "peft"), "14 by kernels"),
    "dora and lora at once": (
        lambda b: dora_and_lora(b, "fp32"),
        "14 by torch on the GPU (several terms of which not all are added to the same part)",
    ),
    "experts": (lambda b: experts(b, BF16), "12 by kernels"),
    "single experts": (
        single_experts,
        "4 by kernels, 4 by torch on the GPU (columns that lie apart)",
    ),
    "embedding": (embedding, "2 by kernels"),
    "conv1d": (conv1d, "6 by kernels"),
    "conv1d dora": (
        lambda b: conv1d(b, use_dora=True),
        "6 on the CPU (DoRA on a weight stored (K, N))",
    ),
    "biases": (biases, "14 by kernels, 14 by torch on the GPU (biases)"),
    "ia3": (ia3, "2 on the CPU"),
    "another dtype": (
        halved,
        "14 by torch on the GPU (changes its dtype), 3 on the CPU (only changes its dtype)",
    ),
}
"""What makes a case, and where the note of a run says that its targets were merged."""
