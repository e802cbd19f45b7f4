"""WaveFT against PEFT."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import WaveFTConfig, get_peft_model
from peft.tuners.waveft.constants import WAVELET_REDUCTIONS
from peft.tuners.waveft.wavelet import Wavelet
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from streammerge.adapters.adapter import open_adapter
from streammerge.adapters.tuners import waveft
from streammerge.adapters.tuners.wavelets import lowpass, wavelet_names
from streammerge.checkpoint.header import StoredTensor
from streammerge.dtypes import Dtype
from streammerge.errors import AdapterError, PlanError

# with several threads PEFT's own last digits depend on their number, but for db1
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(23, 41)
        self.lin1 = nn.Linear(58, 3, bias=False)
        self.conv0 = Conv1D(37, 29)
        self.conv1 = Conv1D(4, 31)


class Square(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = Conv1D(24, 24)


class Large(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(131, 97)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(3, 4)


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Net(), Net()])
        self.lin0 = nn.Linear(9, 8)


def config(**options: Any) -> WaveFTConfig:
    targets = ["lin0", "lin1", "conv0", "conv1"]
    plain = {"n_frequency": 90, "target_modules": targets, "init_weights": False}
    return WaveFTConfig(**{**plain, **options})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"use_idwt": False}, {"wavelet_family": "db4"}], ids=str)
def test_linear_and_conv1d(
    options: dict[str, Any], dtype: torch.dtype, mill: Any, tiny_tiles: None
) -> None:
    mill.check(Net, config(**options), dtype)


@pytest.mark.parametrize("wavelet", wavelet_names())
def test_wavelets(wavelet: str, mill: Any) -> None:
    assert lowpass(wavelet) == list(Wavelet(wavelet).rec_lo)
    mill.check(Net, config(wavelet_family=wavelet), torch.float32)


def test_wavelets_that_peft_cannot_use_are_refused(mill: Any, edit_config: Any) -> None:
    adapter = mill.adapter(Net, config())
    for wavelet in [name for name in WAVELET_REDUCTIONS if name not in wavelet_names()]:
        layer: Any = get_peft_model(Small(), config(n_frequency=3, wavelet_family=wavelet))
        with pytest.raises((ValueError, RuntimeError)):
            layer.merge_and_unload()
        edit_config(adapter, wavelet_family=wavelet)
        with pytest.raises(AdapterError, match="no usable filter"):
            open_adapter(adapter)
        edit_config(adapter, use_idwt=False)
        assert open_adapter(adapter).modules
        edit_config(adapter, use_idwt=True)


@pytest.mark.parametrize("wavelet", ["db1", "db2", "sym7", "db10", "coif4"])
def test_spectra_without_zeros(wavelet: str, mill: Any) -> None:
    options = {"n_frequency": 131 * 97, "target_modules": ["lin"], "wavelet_family": wavelet}
    if wavelet == "db1":
        torch.set_num_threads(2)
    mill.check(Large, config(**options), torch.float32)


@pytest.mark.parametrize("wavelet", ["db1", "db2", "sym5", "db8", "coif3"])
def test_ranges_of_rows(wavelet: str, mill: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waveft, "_PRODUCTS", 1)
    options = {"n_frequency": 131 * 97, "target_modules": ["lin"], "wavelet_family": wavelet}
    mill.check(Large, config(**options), torch.float32)


@pytest.mark.parametrize("wavelet", ["db2", "coif4", "db10"])
def test_ranges_of_rows_in_float64(
    wavelet: str, mill: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = mill.base(Large, torch.float64)
    options = {"n_frequency": 131 * 97, "target_modules": ["lin"], "wavelet_family": wavelet}
    adapter = mill.adapter(Large, config(**options))
    merged = mill.export(base, adapter)
    monkeypatch.setattr(waveft, "_PRODUCTS", 1)
    ours = mill.export(base, adapter)["lin.weight"]
    torch.testing.assert_close(ours, merged["lin.weight"], rtol=0, atol=1e-12)


def test_sizes_and_options(mill: Any) -> None:
    for options in (
        {"n_frequency": 1, "target_modules": ["lin1"]},
        {"n_frequency": 58 * 3, "target_modules": ["lin1"], "random_loc_seed": 0},
        {"scaling": 2.5, "random_loc_seed": 2**40, "bias": "all"},
        {"scaling": -300, "use_idwt": False},
        {"target_modules": ["lin0"], "modules_to_save": ["lin1"]},
        {"proportional_parameters": True},
        {"proportional_parameters": True, "n_frequency": 3},
    ):
        mill.check(Net, config(**options), torch.bfloat16)
    for wavelet in ("db1", "coif1"):
        mill.check(Square, config(target_modules=["conv"], wavelet_family=wavelet), torch.float16)


def test_zeros_keep_their_sign_as_in_peft(mill: Any) -> None:
    class Zeros(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(8, 8)
            self.lin.weight.data = torch.full((8, 8), -0.0)

    for scaling in (2.0, -2.0):
        for use_idwt in (True, False):
            options = {"n_frequency": 5, "target_modules": ["lin"], "scaling": scaling}
            mill.check(Zeros, config(**options, use_idwt=use_idwt), torch.bfloat16)


def test_patterns_of_frequencies(mill: Any) -> None:
    patterns = {r"layers\.1\.lin0": 7, "lin0": 11, "conv.": 13}
    options = {"n_frequency_pattern": patterns, "target_modules": ["lin0", "lin1", "conv0"]}
    mill.check(Deep, config(**options), torch.bfloat16)
    adapter = open_adapter(mill.folder / "adapter")
    found = {m.module: m.tensors["waveft_spectrum"].shape[0] for m in adapter.modules}
    assert found == {
        "lin0": 11,
        "layers.0.lin0": 11,
        "layers.0.lin1": 90,
        "layers.0.conv0": 13,
        "layers.1.lin0": 7,
        "layers.1.lin1": 90,
        "layers.1.conv0": 13,
    }


def test_two_adapters_in_turn(mill: Any) -> None:
    second = config(n_frequency=9, target_modules=["lin0", "conv1"], wavelet_family="sym3")
    third = config(n_frequency=9, target_modules=["lin0"], use_idwt=False)
    mill.check_in_turn(Net, torch.bfloat16, config(), second, third)


@pytest.mark.parametrize("options", [{}, {"use_idwt": False}, {"wavelet_family": "db3"}], ids=str)
def test_weighted_sum(options: dict[str, Any], mill: Any) -> None:
    base = mill.base(Net, torch.float64)
    adapters = [mill.adapter(Net, config(n_frequency=n, **options), name=f"n{n}") for n in (20, 40)]
    plain = load_file(base / "model.safetensors")
    apart = [mill.export(base, adapter) for adapter in adapters]
    merged = mill.export(base, *adapters, adapter_weights=[0.5, -2.0])
    for name in ("lin0.weight", "conv0.weight"):
        one, two = (alone[name] - plain[name] for alone in apart)
        expected = plain[name] + 0.5 * one - 2.0 * two
        torch.testing.assert_close(merged[name], expected, rtol=0, atol=1e-12)


def test_another_base(mill: Any) -> None:
    adapter = mill.adapter(Net, config(target_modules=["lin0"]))
    with pytest.raises(PlanError, match="another base"):
        mill.export(mill.base(Small, torch.float32), adapter)


def test_damaged_adapters(mill: Any, edit_config: Any) -> None:
    adapter = mill.adapter(Net, config(n_frequency_pattern={"lin0": 40}))
    edit_config(adapter, n_frequency_pattern={"lin0": 41})
    with pytest.raises(AdapterError, match="n_frequency = 41"):
        open_adapter(adapter)
    edit_config(adapter, n_frequency_pattern={"lin0": 40}, random_loc_seed=None)
    with pytest.raises(AdapterError, match="bad random_loc_seed"):
        open_adapter(adapter)
    edit_config(adapter, random_loc_seed=1)
    mill.rewrite(adapter, "lin0.waveft_spectrum", lambda tensor: tensor[:0])
    with pytest.raises(AdapterError, match="spectrum"):
        open_adapter(adapter)


def test_shares_of_entries_that_do_not_fit(mill: Any) -> None:
    adapter = mill.adapter(Net, config(proportional_parameters=True))
    mill.rewrite(adapter, "lin0.waveft_spectrum", lambda tensor: tensor[1:])
    with pytest.raises(PlanError, match="entries"):
        mill.export(mill.base(Net, torch.float32), adapter)


def test_description(mill: Any) -> None:
    adapter = open_adapter(mill.adapter(Net, config(target_modules=["lin0"])))
    (module,) = adapter.modules
    described = adapter.config.tuner.describe(module, adapter.config.settings)
    assert described == {"entries": 90, "scaling": 25.0, "wavelet": "db1", "dtype": "F32"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("wavelet", [None, "db1", "db4", "coif4"])
def test_memory_is_what_was_planned(
    wavelet: str | None, dtype: torch.dtype, peak_bytes: Any
) -> None:
    shape, count = (700, 900), 3000
    stored = StoredTensor("spectrum", Dtype.F32, (count,), Path("none"), 0)
    term = waveft.WaveTerm(False, stored, 25.0, 777, wavelet, dtype.itemsize)
    weight = SimpleNamespace(shape=shape, dtype=dtype, compute_dtype=dtype)
    factor = torch.randn(count, dtype=dtype)
    assert peak_bytes(lambda: term.prepare([factor], weight)) <= term.work_bytes(shape)
