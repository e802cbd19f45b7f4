"""Opening an adapter: modules with their tensors, replacements, rows, and damage that is named."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import pytest
import torch

from streammerge.adapters.adapter import Adapter, open_adapter
from streammerge.adapters.tuners import all_tuners
from streammerge.adapters.tuners.lora import Lora
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


def scalings(adapter: Adapter) -> dict[str, tuple[int, float]]:
    """Rank and scaling by module."""
    settings = adapter.config.settings
    return {
        module.module: (settings.rank_of(module.module), settings.scaling_of(module.module))
        for module in adapter.modules
    }


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
    assert module.where == f"module 'model.layers.0.q_proj' of {folder}"
    assert (module.depth, module.is_inner, module.is_embedding) == (0, False, False)
    found = {name: (tensor.name, tensor.shape) for name, tensor in module.tensors.items()}
    assert found == {"lora_A": (A, (2, 5)), "lora_B": (B, (3, 2))}
    assert scalings(adapter) == {"model.layers.0.q_proj": (2, 2.0)}
    assert (adapter.replacements, adapter.rows, adapter.shared, adapter.twins) == ((), (), {}, ())
    assert sorted(adapter.keys) == [A, B]
    suffix = "bin" if legacy else "safetensors"
    assert module.tensors["lora_A"].path == folder / f"adapter_model.{suffix}"


def test_safetensors_win_over_bin(make_adapter: MakeAdapter) -> None:
    make_adapter({A: zeros(2, 9), B: zeros(9, 2)}, legacy=True)
    (module,) = open_adapter(make_adapter(plain())).modules
    assert module.tensors["lora_A"].shape == (2, 5)


def test_scaling_and_rank_follow_the_patterns(make_adapter: MakeAdapter) -> None:
    folder = make_adapter(
        {**plain(), f"{HEAD}.lora_A.weight": zeros(4, 5), f"{HEAD}.lora_B.weight": zeros(7, 4)},
        rank_pattern={"lm_head": 4},
        alpha_pattern={"lm_head": 3},
        use_rslora=True,
    )
    assert scalings(open_adapter(folder)) == {
        "model.layers.0.q_proj": (2, 4 / 2**0.5),
        "lm_head": (4, 1.5),
    }


def test_embedding_is_opened(make_adapter: MakeAdapter) -> None:
    folder = make_adapter(
        {f"{EMBED}.lora_embedding_A": zeros(2, 9), f"{EMBED}.lora_embedding_B": zeros(4, 2)}
    )
    (module,) = open_adapter(folder).modules
    assert module.is_embedding
    assert module.module == "model.embed_tokens"
    shapes = {name: tensor.shape for name, tensor in module.tensors.items()}
    assert shapes == {"lora_embedding_A": (2, 9), "lora_embedding_B": (4, 2)}


def test_dora_and_lora_bias_are_opened(make_adapter: MakeAdapter) -> None:
    folder = make_adapter(
        {**plain(), f"{Q}.lora_magnitude_vector": zeros(3), f"{Q}.lora_B.bias": zeros(3)},
        use_dora=True,
        lora_bias=True,
    )
    (module,) = open_adapter(folder).modules
    assert module.tensors["lora_magnitude_vector"].name == f"{Q}.lora_magnitude_vector"
    assert module.tensors["lora_B.bias"].name == f"{Q}.lora_B.bias"


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
    assert all(tensor.dtype.is_mergeable for tensor in module.tensors.values())


@pytest.mark.parametrize(
    ("dtype", "name"),
    [(torch.int8, Dtype.I8), (torch.bool, Dtype.BOOL), (torch.float8_e4m3fn, Dtype.F8_E4M3)],
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
    ("a", "b"),
    [
        ((2, 5), (3, 2, 1)),
        ((2, 5, 3), (3, 2)),
        ((2, 5, 3, 3), (3, 2, 3, 3)),
        ((2, 5, 3, 3), (3, 2, 1)),
    ],
)
def test_factors_that_cannot_be_multiplied_are_refused(
    make_adapter: MakeAdapter, a: tuple[int, ...], b: tuple[int, ...]
) -> None:
    fault = fault_of(make_adapter({A: zeros(*a), B: zeros(*b)}))
    assert fault.what == "factors of the adapter do not belong together"
    assert fault.got == f"lora_A {a}, lora_B {b}"


@pytest.mark.parametrize("window", [(3,), (3, 3), (2, 3, 1)])
def test_a_convolution_is_opened(make_adapter: MakeAdapter, window: tuple[int, ...]) -> None:
    one = (1,) * len(window)
    (module,) = open_adapter(make_adapter({A: zeros(2, 5, *window), B: zeros(3, 2, *one)})).modules
    assert module.tensors["lora_A"].shape == (2, 5, *window)


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
@pytest.mark.parametrize("shape", [(2,), (2, 3), (3, 3), (0,), ()])
def test_vector_that_does_not_fit_is_refused(
    make_adapter: MakeAdapter, key: str, shape: tuple[int, ...]
) -> None:
    folder = make_adapter({**plain(), key: zeros(*shape)}, use_dora="magnitude" in key)
    fault = fault_of(folder)
    assert fault.what == "vector does not fit lora_B"
    assert (fault.expected, fault.got) == ("(3,)", str(shape))


@pytest.mark.parametrize("key", [f"{Q}.lora_magnitude_vector", f"{Q}.lora_B.bias"])
def test_a_scalar_is_no_vector(make_adapter: MakeAdapter, key: str) -> None:
    tensors = {A: zeros(2, 5), B: zeros(1, 2), key: zeros()}
    fault = fault_of(make_adapter(tensors, use_dora="magnitude" in key))
    assert (fault.what, fault.got) == ("vector does not fit lora_B", "()")


@pytest.mark.parametrize("shape", [(3,), (1, 3), (3, 1), (1, 3, 1, 1)])
def test_a_magnitude_may_have_dimensions_of_one(
    make_adapter: MakeAdapter, shape: tuple[int, ...]
) -> None:
    key = f"{Q}.lora_magnitude_vector"
    (module,) = open_adapter(make_adapter({**plain(), key: zeros(*shape)}, use_dora=True)).modules
    assert module.tensors["lora_magnitude_vector"].shape == shape


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


# tensors of other forms


def test_wrapped_parameters_are_modules_of_their_own(make_adapter: MakeAdapter) -> None:
    path = "base_model.model.model.layers.0.mlp.experts"
    tensors = {
        f"{path}.base_layer.lora_A.weight": zeros(8, 5),
        f"{path}.base_layer.lora_B.weight": zeros(6, 8),
        f"{path}.lora_A.weight": zeros(8, 3),
        f"{path}.lora_B.weight": zeros(5, 8),
    }
    modules = open_adapter(make_adapter(tensors)).modules
    found = {(m.module, m.depth): m.tensors["lora_A"].shape for m in modules}
    experts = "model.layers.0.mlp.experts"
    assert found == {(experts, 1): (8, 5), (experts, 0): (8, 3)}


def test_the_projection_inside_a_wrapped_layer_is_told_apart(make_adapter: MakeAdapter) -> None:
    path = "base_model.model.attn"
    tensors = {
        f"{path}.lora_A.weight": zeros(2, 4),
        f"{path}.lora_B.weight": zeros(12, 2),
        f"{path}.base_layer.out_proj.lora_A.weight": zeros(2, 4),
        f"{path}.base_layer.out_proj.lora_B.weight": zeros(4, 2),
    }
    modules = open_adapter(make_adapter(tensors)).modules
    assert {(m.module, m.is_inner) for m in modules} == {("attn", False), ("attn.out_proj", True)}


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        ([4, 0, 7], (4, 0, 7)),
        ({"embed_tokens": [4, 0, 7]}, (4, 0, 7)),
        ({"tokens": [1], "embed_tokens": [4, 0, 7]}, (4, 0, 7)),
        # the longest end of the path
        ({"embed_tokens": [1], "model.embed_tokens": [4, 0, 7]}, (4, 0, 7)),
        # a tied head, or a wrapper's name
        ({"wte": [4, 0, 7]}, (4, 0, 7)),
    ],
)
def test_rows_of_tokens_have_their_indices(
    make_adapter: MakeAdapter, named: object, expected: tuple[int, ...]
) -> None:
    key = f"{EMBED}.token_adapter.trainable_tokens_delta"
    folder = make_adapter({key: zeros(3, 5)}, trainable_token_indices=named)
    (rows,) = open_adapter(folder).rows
    assert (rows.module, rows.tensor.name, rows.indices) == ("model.embed_tokens", key, expected)


def test_an_adapter_of_token_rows_alone(make_adapter: MakeAdapter) -> None:
    folder = make_adapter(
        {f"{EMBED}.trainable_tokens_delta": zeros(1, 5)},
        peft_type="TRAINABLE_TOKENS",
        token_indices=[2],
    )
    adapter = open_adapter(folder)
    assert adapter.config.tuner is all_tuners()["TRAINABLE_TOKENS"]
    assert (adapter.modules, [rows.indices for rows in adapter.rows]) == ((), [(2,)])


@pytest.mark.parametrize(
    ("indices", "shape", "expected"),
    [
        (None, (2, 5), "none"),
        ({"lm_head": [1, 2], "wte": [1, 2]}, (2, 5), "none"),
        ([1, 2, 3], (2, 5), "3 rows"),
        ([1, 2], (2,), "2 rows"),
        ([1, 2], (2, 5, 1), "2 rows"),
        ([1, 2], (), "2 rows"),
    ],
)
def test_rows_without_their_indices_are_refused(
    make_adapter: MakeAdapter, indices: object, shape: tuple[int, ...], expected: str
) -> None:
    key = f"{EMBED}.token_adapter.trainable_tokens_delta"
    fault = fault_of(make_adapter({key: zeros(*shape)}, trainable_token_indices=indices))
    assert fault.what == "token rows and the indices in adapter_config.json disagree"
    assert (fault.expected, fault.got) == (expected, str(shape))


def test_a_row_that_is_named_twice_is_refused(make_adapter: MakeAdapter) -> None:
    key = f"{EMBED}.token_adapter.trainable_tokens_delta"
    fault = fault_of(make_adapter({key: zeros(2, 5)}, trainable_token_indices=[3, 3]))
    assert fault.what == "token indices name a row twice"


def test_rows_hold_values(make_adapter: MakeAdapter) -> None:
    key = f"{EMBED}.token_adapter.trainable_tokens_delta"
    tensors = {key: zeros(2, 5, dtype=torch.int8)}
    fault = fault_of(make_adapter(tensors, trainable_token_indices=[3, 4]))
    assert (fault.what, fault.got) == ("adapter tensor has a dtype that cannot be merged", "I8")


class Sharing(Lora):
    """All of its modules share a tensor."""

    peft_type = "LORA"
    shared = frozenset({"common"})


@pytest.fixture
def _sharing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streammerge.adapters.config.find_tuner", lambda _kind: Sharing())


@pytest.mark.usefixtures("_sharing")
def test_shared_tensors_stand_beside_the_modules(make_adapter: MakeAdapter) -> None:
    adapter = open_adapter(make_adapter({**plain(), "base_model.common": zeros(4, 4)}))
    assert {name: tensor.shape for name, tensor in adapter.shared.items()} == {"common": (4, 4)}
    assert len(adapter.modules) == 1


@pytest.mark.usefixtures("_sharing")
def test_a_shared_tensor_that_is_there_twice_or_of_another_dtype(
    make_adapter: MakeAdapter,
) -> None:
    twice = {**plain(), "base_model.common": zeros(1), "base_model.common.default": zeros(1)}
    assert fault_of(make_adapter(twice)).what == "two keys of the adapter mean the same tensor"
    narrow = {**plain(), "base_model.common": zeros(1).to(torch.float8_e4m3fn)}
    assert fault_of(make_adapter(narrow)).got == "F8_E4M3"


def test_two_keys_for_the_same_rows_are_refused(make_adapter: MakeAdapter) -> None:
    tensors = {
        f"{EMBED}.token_adapter.trainable_tokens_delta": zeros(1, 5),
        f"{EMBED}.trainable_tokens_delta": zeros(1, 5),
    }
    fault = fault_of(make_adapter(tensors, trainable_token_indices=[3]))
    assert fault.what == "two keys of the adapter mean the same tensor"
