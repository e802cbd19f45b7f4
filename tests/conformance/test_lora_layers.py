"""LoRA and DoRA on convolutions, embeddings, Conv1D and attention, against PEFT."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from streammerge.backends import torch_factors
from streammerge.errors import AdapterError, PlanError

pytestmark = pytest.mark.filterwarnings("ignore")

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
WINDOWS = ["line", "plane", "space", "point"]


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Conv1d(7, 11, 3)
        self.plane = nn.Conv2d(5, 9, (3, 2), bias=False)
        self.space = nn.Conv3d(4, 6, (2, 1, 3))
        self.point = nn.Conv2d(8, 13, 1)


class Points(nn.Module):
    """Windows of one in other than two dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Conv1d(8, 13, 1)
        self.space = nn.Conv3d(6, 5, 1)


class Tables(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tall = nn.Embedding(103, 18)
        self.wide = nn.Embedding(7, 33)
        self.thin = nn.Embedding(50, 1)
        self.one = nn.Embedding(1, 9)


class Transposed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin0 = Conv1D(43, 24)
        self.lin1 = Conv1D(24, 430)
        self.lin2 = Conv1D(1, 9)


class Attention(nn.Module):
    def __init__(self, *, bias: bool = True) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(24, 4, bias=bias)
        self.other = nn.MultiheadAttention(14, 2, bias=bias)


class UnbiasedAttention(Attention):
    def __init__(self) -> None:
        super().__init__(bias=False)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch, tiny_tiles: None) -> None:
    """Look at weights four to seven rows at a time, and merge them four rows at a time."""
    monkeypatch.setattr(torch_factors, "SCAN_BYTES", 64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("use_dora", [False, True], ids=["plain", "dora"])
def test_convolutions(dtype: torch.dtype, mill: Any, *, use_dora: bool) -> None:
    mill.check(Convolutions, LoraConfig(target_modules=WINDOWS, use_dora=use_dora, r=4), dtype)
    config = LoraConfig(
        target_modules=WINDOWS,
        use_dora=use_dora,
        rank_pattern={"plane": 17, "line": 1},
        alpha_pattern={"space": 3},
        use_rslora=True,
    )
    mill.check(Convolutions, config, dtype)


@pytest.mark.usefixtures("tiny_tiles")
@pytest.mark.parametrize("use_dora", [False, True], ids=["plain", "dora"])
def test_convolutions_in_tiles_of_four_rows(mill: Any, *, use_dora: bool) -> None:
    config = LoraConfig(target_modules=WINDOWS, use_dora=use_dora)
    mill.check(Convolutions, config, torch.bfloat16, threads=2)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_bias_of_b_of_a_convolution(dtype: torch.dtype, mill: Any) -> None:
    config = LoraConfig(target_modules=["line", "space"], lora_bias=True, lora_alpha=3)
    merged = mill.check(Convolutions, config, dtype)
    before = mill.model(Convolutions, dtype).state_dict()
    assert not torch.equal(merged["line.bias"], before["line.bias"])


def test_convolutions_in_turn(mill: Any) -> None:
    dora = LoraConfig(target_modules=WINDOWS, use_dora=True)
    plain = LoraConfig(target_modules=WINDOWS, r=3)
    mill.check_in_turn(Convolutions, torch.bfloat16, dora, plain, dora)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rank", [4, 33])
def test_windows_of_one_are_within_the_rounding_of_a_product(
    rank: int, dtype: torch.dtype, mill: Any
) -> None:
    # PEFT convolves a line with a window of one, which adds up in an order that depends on the
    # threads; and it cannot merge a window of one in space at all
    base = mill.base(Points, dtype)
    config = LoraConfig(target_modules=["line", "space"], r=rank, lora_alpha=6)
    adapter = mill.adapter(Points, config, dtype=dtype)
    merged = mill.export(base, adapter)
    tensors = load_file(adapter / "adapter_model.safetensors")
    before = mill.model(Points, dtype).state_dict()
    unit = 2.0**-53 if dtype is torch.float64 else 2.0**-24
    eps = 0.0 if dtype.itemsize > 2 else torch.finfo(dtype).eps / 2
    for name in ("line", "space"):
        a, b = (
            tensors[f"base_model.model.{name}.lora_{letter}.weight"].double().flatten(1)
            for letter in "AB"
        )
        scaling = 6 / rank
        weight = before[f"{name}.weight"].double().flatten(1)
        expected = weight + scaling * (b @ a)
        # R products and sums, the scaling, the sum with W, and the rounding to the base's dtype
        bound = unit * (rank + 2) * scaling * (b.abs() @ a.abs())
        bound += (unit + eps) * (expected.abs() + bound)
        got = merged[f"{name}.weight"].double().flatten(1)
        assert ((got - expected).abs() <= bound).all()
        assert not torch.equal(got, weight)

    class Line(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.line = nn.Conv1d(8, 13, 1)

    line = LoraConfig(target_modules=["line"], r=rank, lora_alpha=6, use_dora=True)
    adapter = mill.adapter(Line, line, dtype=dtype)
    merged = mill.export(mill.base(Line, dtype), adapter)
    expected = mill.peft(Line, dtype, adapter)["line.weight"].double()
    got = merged["line.weight"].double()
    # both are within the same bound of the formula: at most one step of the dtype apart
    step = torch.finfo(dtype).eps * expected.abs() + 64 * rank * unit
    assert ((got - expected).abs() <= step).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("use_dora", [False, True], ids=["plain", "dora"])
def test_embeddings(dtype: torch.dtype, mill: Any, *, use_dora: bool) -> None:
    tables = ["tall", "wide", "thin", "one"]
    mill.check(Tables, LoraConfig(target_modules=tables, use_dora=use_dora, lora_alpha=3), dtype)
    config = LoraConfig(
        target_modules=tables,
        use_dora=use_dora,
        rank_pattern={"tall": 3},
        alpha_pattern={"wide": 0.5},
        use_rslora=True,
    )
    mill.check(Tables, config, dtype)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_mica_on_embeddings(dtype: torch.dtype, mill: Any) -> None:
    config = LoraConfig(
        target_modules=["tall", "wide"], init_lora_weights="mica", r=4, rank_pattern={"tall": 2}
    )
    mill.check(Tables, config, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norms_of_stored_columns(dtype: torch.dtype, mill: Any) -> None:
    config = LoraConfig(target_modules=["lin0", "lin1", "lin2"], use_dora=True, lora_alpha=3)
    mill.check(Transposed, config, dtype)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("build", [Tables, Transposed])
def test_norms_of_stored_columns_piece_by_piece(build: Any, dtype: torch.dtype, mill: Any) -> None:
    targets = ["tall", "wide", "thin", "one"] if build is Tables else ["lin0", "lin1", "lin2"]
    dora = LoraConfig(target_modules=targets, use_dora=True, lora_alpha=3)
    mill.check(build, dora, dtype, threads=2)
    plain = LoraConfig(target_modules=targets, r=3)
    # the norms are those of what stands after the adapters before
    mill.check_in_turn(build, dtype, dora, plain, dora)


def test_norms_of_a_large_table(mill: Any) -> None:
    class Large(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            # above the size from which torch shares a reduction among threads
            self.table = nn.Embedding(70_001, 3)

    for dtype in DTYPES[:3]:
        mill.check(Large, LoraConfig(target_modules=["table"], use_dora=True, r=2), dtype)


def test_a_column_of_zeros_has_no_direction(mill: Any) -> None:
    # PEFT divides by its norm of zero
    def build() -> nn.Module:
        model = Transposed()
        nn.init.zeros_(model.lin0.weight)
        return model

    def keep(name: str, parameter: nn.Parameter) -> None:
        del name
        parameter.add_(1.0 if parameter.ndim == 1 else 0.0)

    base = mill.base(build, torch.bfloat16)
    dora = LoraConfig(target_modules=["lin0"], use_dora=True)
    adapter = mill.adapter(build, dora, dtype=torch.bfloat16, change=keep)
    merged = mill.export(base, adapter, allow_nonfinite=True)
    assert merged["lin0.weight"].isnan().all()
    assert mill.peft(build, torch.bfloat16, adapter)["lin0.weight"].isnan().all()


# attention in one module


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("build", [Attention, UnbiasedAttention])
def test_attention(build: Any, dtype: torch.dtype, mill: Any) -> None:
    config = LoraConfig(target_modules=["attn", "other"], r=4, lora_alpha=3)
    merged = mill.check(build, config, dtype)
    before = mill.model(build, dtype).state_dict()
    for name in ("attn.in_proj_weight", "attn.out_proj.weight", "other.in_proj_weight"):
        assert not torch.equal(merged[name], before[name])
    config = LoraConfig(
        target_modules=["attn", "other"],
        rank_pattern={"attn": 3},
        alpha_pattern={"other": 5},
        use_rslora=True,
    )
    mill.check(build, config, dtype)


@pytest.mark.parametrize(
    "options", [{"lora_bias": True}, {"bias": "all"}, {"bias": "lora_only"}], ids=str
)
def test_biases_of_attention(options: dict[str, Any], mill: Any) -> None:
    config = LoraConfig(target_modules=["attn"], **options)
    merged = mill.check(Attention, config, torch.bfloat16)
    before = mill.model(Attention, torch.bfloat16).state_dict()
    assert not torch.equal(merged["attn.out_proj.bias"], before["attn.out_proj.bias"])
    # training has no use for a bias of B here
    assert torch.equal(merged["attn.in_proj_bias"], before["attn.in_proj_bias"])


@pytest.mark.usefixtures("tiny_tiles")
def test_attention_in_turn(mill: Any) -> None:
    config = LoraConfig(target_modules=["attn", "other"])
    mill.check_in_turn(Attention, torch.bfloat16, config, config, threads=3)


def test_attention_adds_what_its_forward_adds(mill: Any) -> None:
    config = LoraConfig(target_modules=["attn"], r=4, lora_alpha=3)
    base = mill.base(Attention, torch.float64)
    adapter = mill.adapter(Attention, config, dtype=torch.float64)
    merged = mill.export(base, adapter)
    tensors = load_file(adapter / "adapter_model.safetensors")
    path = "base_model.model.attn.base_layer.out_proj.lora_{}.weight"
    delta = tensors[path.format("B")] @ tensors[path.format("A")] * (3 / 4)
    before = mill.model(Attention, torch.float64).attn.out_proj.weight
    torch.testing.assert_close(merged["attn.out_proj.weight"], before + 2 * delta)


# refusals


@pytest.mark.parametrize(
    ("targets", "options", "match"),
    [
        (["line"], {"velora_config": {"num_groups": 4}}, "no VeLoRA for a convolution"),
        (["plane"], {"init_lora_weights": "mica"}, "no MiCA for a convolution"),
        (["point"], {"init_lora_weights": "olora"}, "no init_lora_weights: olora for a conv"),
    ],
)
def test_variants_of_linear_layers_alone_are_refused(
    targets: list[str], options: dict[str, Any], match: str, mill: Any, edit_config: Any
) -> None:
    base = mill.base(Convolutions, torch.bfloat16)
    adapter = mill.adapter(Convolutions, LoraConfig(target_modules=targets))
    edit_config(adapter, **options)
    with pytest.raises(AdapterError, match=match):
        mill.export(base, adapter)


@pytest.mark.parametrize(
    ("build", "target", "options", "match"),
    [
        (Tables, "tall", {"monteclora_config": {"num_samples": 4}}, "no MonteCLoRA for an embed"),
        (Attention, "attn", {"init_lora_weights": "mica"}, "no MiCA for a nn.Multihead"),
        (Attention, "attn", {"init_lora_weights": "pissa"}, "no init_lora_weights: pissa for a nn"),
    ],
)
def test_variants_of_other_layers_are_refused(
    build: Any, target: str, options: dict[str, Any], match: str, mill: Any, edit_config: Any
) -> None:
    base = mill.base(build, torch.bfloat16)
    adapter = mill.adapter(build, LoraConfig(target_modules=[target]))
    edit_config(adapter, **options)
    with pytest.raises(AdapterError, match=match):
        mill.export(base, adapter)


def test_another_window_or_table_is_refused(mill: Any) -> None:
    class Others(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.line = nn.Conv1d(7, 11, 5)
            self.plane = nn.Conv2d(5, 9, (2, 3))
            self.tall = nn.Embedding(104, 18)

    class Ours(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.line = nn.Conv1d(7, 11, 3)
            self.plane = nn.Conv2d(5, 9, (3, 2))
            self.tall = nn.Embedding(103, 18)

    base = mill.base(Others, torch.bfloat16)
    for target in ("line", "plane", "tall"):
        adapter = mill.adapter(Ours, LoraConfig(target_modules=[target]), name=target)
        with pytest.raises(PlanError, match="shape mismatch: another base"):
            mill.export(base, adapter)


def test_a_convolution_of_groups_is_refused(mill: Any) -> None:
    # PEFT refuses to merge it too
    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.line = nn.Conv1d(8, 12, 3, groups=2)

    base = mill.base(Grouped, torch.bfloat16)
    adapter = mill.adapter(Grouped, LoraConfig(target_modules=["line"], r=4))
    with pytest.raises(AdapterError, match="a convolution in groups has no merged form"):
        mill.export(base, adapter)
