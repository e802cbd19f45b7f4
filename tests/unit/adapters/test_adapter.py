"""Opening an adapter: modules with their scaling, replacements, and damage that is named."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import pytest
import torch

from streammerge.adapters.adapter import open_adapter
from streammerge.dtypes import Dtype
from streammerge.errors import AdapterError, CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

    class MakeAdapter(Protocol):
        def __call__(
            self,
            tensors: dict[str, torch.Tensor] | None = None,
            *,
            legacy: bool = False,
            **options: Any,
        ) -> Path: ...


Q = "base_model.model.model.layers.0.q_proj"
A, B = f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"
EMBED = "base_model.model.model.embed_tokens"
HEAD = "base_model.model.lm_head"


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def plain() -> dict[str, torch.Tensor]:
    return {A: zeros(2, 5), B: zeros(3, 2)}


def fault_of(folder: Path) -> AdapterError:
    with pytest.raises(AdapterError) as caught:
        open_adapter(folder)
    assert len(str(caught.value).splitlines()) == 1
    return caught.value


@pytest.mark.parametrize("legacy", [False, True])
def test_plain_lora_is_opened(make_adapter: MakeAdapter, *, legacy: bool) -> None:
    folder = make_adapter(plain(), legacy=legacy)
    adapter = open_adapter(folder)
    (module,) = adapter.modules
    assert adapter.path == folder
    assert module.module == "model.layers.0.q_proj"
    assert (module.a.name, module.a.shape, module.b.name, module.b.shape) == (A, (2, 5), B, (3, 2))
    assert (module.rank, module.scaling, module.is_embedding) == (2, 2.0, False)
    assert (module.magnitude, module.b_bias) == (None, None)
    assert adapter.replacements == ()
    assert adapter.twins == ()
    assert sorted(adapter.keys) == [A, B]
    suffix = "bin" if legacy else "safetensors"
    assert module.a.path == folder / f"adapter_model.{suffix}"


def test_safetensors_win_over_bin(make_adapter: MakeAdapter) -> None:
    make_adapter({A: zeros(2, 9), B: zeros(9, 2)}, legacy=True)
    (module,) = open_adapter(make_adapter(plain())).modules
    assert module.a.shape == (2, 5)


def test_scaling_and_rank_follow_the_patterns(make_adapter: MakeAdapter) -> None:
    folder = make_adapter(
        {**plain(), f"{HEAD}.lora_A.weight": zeros(4, 5), f"{HEAD}.lora_B.weight": zeros(7, 4)},
        rank_pattern={"lm_head": 4},
        alpha_pattern={"lm_head": 3},
        use_rslora=True,
    )
    scalings = {
        module.module: (module.rank, module.scaling) for module in open_adapter(folder).modules
    }
    assert scalings == {"model.layers.0.q_proj": (2, 4 / 2**0.5), "lm_head": (4, 1.5)}


def test_embedding_is_opened(make_adapter: MakeAdapter) -> None:
    folder = make_adapter(
        {f"{EMBED}.lora_embedding_A": zeros(2, 9), f"{EMBED}.lora_embedding_B": zeros(4, 2)}
    )
    (module,) = open_adapter(folder).modules
    assert module.is_embedding
    assert (module.module, module.rank) == ("model.embed_tokens", 2)
    assert (module.a.shape, module.b.shape) == ((2, 9), (4, 2))


def test_dora_and_lora_bias_are_opened(make_adapter: MakeAdapter) -> None:
    folder = make_adapter(
        {**plain(), f"{Q}.lora_magnitude_vector": zeros(3), f"{Q}.lora_B.bias": zeros(3)},
        use_dora=True,
        lora_bias=True,
    )
    (module,) = open_adapter(folder).modules
    assert module.magnitude is not None
    assert module.b_bias is not None
    assert module.magnitude.name == f"{Q}.lora_magnitude_vector"
    assert module.b_bias.name == f"{Q}.lora_B.bias"


def test_replacements_and_base_copies_are_told_apart(make_adapter: MakeAdapter) -> None:
    folder = make_adapter(
        {
            **plain(),
            f"{Q}.base_layer.weight": zeros(3, 5),
            f"{HEAD}.weight": zeros(9, 5),
            "base_model.model.model.norm.bias": zeros(5),
        }
    )
    found = {r.path: (r.tensor.name, r.is_base_copy) for r in open_adapter(folder).replacements}
    assert found == {
        "model.layers.0.q_proj.weight": (f"{Q}.base_layer.weight", True),
        "lm_head.weight": (f"{HEAD}.weight", False),
        "model.norm.bias": ("base_model.model.model.norm.bias", False),
    }


def test_twins_are_set_aside(make_adapter: MakeAdapter) -> None:
    folder = make_adapter(
        {
            f"{HEAD}.weight": zeros(9, 5),
            f"{HEAD}.modules_to_save.weight": zeros(9, 5),
            f"{HEAD}.original_module.weight": zeros(9, 5),
        }
    )
    adapter = open_adapter(folder)
    assert [r.tensor.name for r in adapter.replacements] == [f"{HEAD}.weight"]
    assert sorted(adapter.twins) == [
        f"{HEAD}.modules_to_save.weight",
        f"{HEAD}.original_module.weight",
    ]
    assert len(adapter.keys) == 3


def test_saved_twin_alone_is_the_replacement(make_adapter: MakeAdapter) -> None:
    folder = make_adapter({f"{HEAD}.modules_to_save.default.weight": zeros(9, 5)})
    adapter = open_adapter(folder)
    assert [(r.path, r.is_base_copy) for r in adapter.replacements] == [("lm_head.weight", False)]
    assert adapter.twins == ()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_mergeable_dtypes_are_opened(make_adapter: MakeAdapter, dtype: torch.dtype) -> None:
    folder = make_adapter({A: zeros(2, 5, dtype=dtype), B: zeros(3, 2, dtype=dtype)})
    (module,) = open_adapter(folder).modules
    assert module.a.dtype.is_mergeable


@pytest.mark.parametrize(
    ("dtype", "name"), [(torch.int8, Dtype.I8), (torch.float8_e4m3fn, Dtype.F8_E4M3)]
)
def test_other_dtypes_are_refused(
    make_adapter: MakeAdapter, dtype: torch.dtype, name: Dtype
) -> None:
    fault = fault_of(make_adapter({A: zeros(2, 5), B: zeros(3, 2).to(dtype)}))
    assert fault.what == "adapter tensor has a dtype that cannot be merged"
    assert fault.got == name.value
    assert B in str(fault)


@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 5), (10,)])
@pytest.mark.parametrize("key", [A, B])
def test_ungathered_shard_is_refused(
    make_adapter: MakeAdapter, key: str, shape: tuple[int, ...]
) -> None:
    fault = fault_of(make_adapter({**plain(), key: zeros(*shape)}))
    assert fault.what.startswith("adapter tensor is empty or flat")
    assert "ZeRO-3" in fault.what
    assert fault.got == f"shape {shape}"
    assert f"key '{key}'" in str(fault)


@pytest.mark.parametrize(
    ("a", "b"), [((3, 5), (3, 3)), ((2, 5), (3, 3)), ((3, 5), (3, 2)), ((5, 2), (2, 3))]
)
def test_rank_mismatch_is_refused(
    make_adapter: MakeAdapter, a: tuple[int, int], b: tuple[int, int]
) -> None:
    fault = fault_of(make_adapter({A: zeros(*a), B: zeros(*b)}))
    assert fault.what == "rank of the tensors and of adapter_config.json disagree"
    assert (fault.expected, fault.got) == ("r = 2", f"lora_A {a}, lora_B {b}")


def test_rank_of_a_pattern_must_fit_too(make_adapter: MakeAdapter) -> None:
    assert fault_of(make_adapter(plain(), rank_pattern={"q_proj": 3})).expected == "r = 3"


@pytest.mark.parametrize(
    ("a", "b"), [((2, 5, 3, 3), (3, 2, 1, 1)), ((2, 5), (3, 2, 1)), ((), (3, 2))]
)
def test_convolution_is_refused(
    make_adapter: MakeAdapter, a: tuple[int, ...], b: tuple[int, ...]
) -> None:
    fault = fault_of(make_adapter({A: zeros(*a), B: zeros(*b)}))
    assert fault.what == "adapter is on a convolution, which is not merged by this version"


@pytest.mark.parametrize(
    ("keys", "what"),
    [
        ([A], "module has no lora_B"),
        ([B], "module has no lora_A"),
        ([f"{Q}.lora_magnitude_vector"], "module has no lora_A and no lora_B"),
        ([f"{Q}.lora_embedding_A"], "module has no lora_embedding_B"),
        ([f"{Q}.lora_embedding_B"], "module has no lora_embedding_A"),
        ([f"{Q}.lora_embedding_A", B], "module has the factors of an embedding and of a layer"),
    ],
)
def test_incomplete_module_is_refused(
    make_adapter: MakeAdapter, keys: list[str], what: str
) -> None:
    folder = make_adapter({key: zeros(2, 2) for key in keys})
    fault = fault_of(folder)
    assert fault.what == what
    assert fault.where == f"module 'model.layers.0.q_proj' of {folder}"


def test_dora_without_magnitude_is_refused(make_adapter: MakeAdapter) -> None:
    fault = fault_of(make_adapter(plain(), use_dora=True))
    assert fault.what == "adapter's use_dora and its tensors disagree"
    assert fault.expected == "a lora_magnitude_vector"


def test_magnitude_without_dora_is_refused(make_adapter: MakeAdapter) -> None:
    fault = fault_of(make_adapter({**plain(), f"{Q}.lora_magnitude_vector": zeros(3)}))
    assert fault.expected == "no lora_magnitude_vector"


@pytest.mark.parametrize("key", [f"{Q}.lora_magnitude_vector", f"{Q}.lora_B.bias"])
@pytest.mark.parametrize("shape", [(2,), (3, 1), (0,), ()])
def test_vector_that_does_not_fit_is_refused(
    make_adapter: MakeAdapter, key: str, shape: tuple[int, ...]
) -> None:
    folder = make_adapter({**plain(), key: zeros(*shape)}, use_dora="magnitude" in key)
    fault = fault_of(folder)
    assert fault.what == "vector does not fit lora_B"
    assert (fault.expected, fault.got) == ("(3,)", str(shape))


@pytest.mark.parametrize("key", [f"{Q}.lora_magnitude_vector", f"{Q}.lora_B.bias"])
def test_vector_of_another_dtype_is_refused(make_adapter: MakeAdapter, key: str) -> None:
    folder = make_adapter({**plain(), key: zeros(3, dtype=torch.int8)}, use_dora="magnitude" in key)
    assert fault_of(folder).got == "I8"


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (A, f"{Q}.lora_A.default.weight"),
        (A, "model.layers.0.q_proj.lora_A.weight"),
        (f"{HEAD}.weight", "lm_head.weight"),
        (f"{HEAD}.weight", f"{HEAD}.base_layer.weight"),
        (f"{HEAD}.modules_to_save.weight", f"{HEAD}.modules_to_save.default.weight"),
    ],
)
def test_two_keys_for_one_tensor_are_refused(
    make_adapter: MakeAdapter, first: str, second: str
) -> None:
    fault = fault_of(make_adapter({first: zeros(2, 5), second: zeros(2, 5)}))
    assert fault.what == "two keys of the adapter mean the same tensor"
    assert fault.hint == "several adapters in one file? Save one adapter per folder"


def test_adapter_without_tensors_is_refused(make_adapter: MakeAdapter) -> None:
    assert fault_of(make_adapter({})).what == "adapter holds no tensor"


def test_adapter_without_a_file_says_what_is_there(make_adapter: MakeAdapter) -> None:
    folder = make_adapter()
    fault = fault_of(folder)
    assert fault.what == "adapter has no tensors"
    assert fault.got == "adapter_config.json"


def test_what_is_not_a_folder_is_refused(tmp_path: Path) -> None:
    assert fault_of(tmp_path / "none").what == "adapter is not a folder"


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_model.bin"])
def test_damaged_tensors_are_a_checkpoint_error(make_adapter: MakeAdapter, name: str) -> None:
    folder = make_adapter()
    (folder / name).write_bytes(b"damaged file")
    with pytest.raises(CheckpointError, match=name):
        open_adapter(folder)
