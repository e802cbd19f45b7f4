"""Every kind of adapter on every kind of layer it takes, as PEFT saves it and merges it.

The models are plain modules of a few layers; sizes are odd on purpose, and some weights have fewer
rows than a tile.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import peft
import pytest
import torch
from peft.tuners.lora.config import BdLoraConfig
from torch import nn
from transformers.pytorch_utils import Conv1D

from streammerge.adapters.tuners import NOT_MERGEABLE, all_tuners
from streammerge.errors import StreamMergeError

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.filterwarnings("ignore")

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def net(**layers: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.ModuleDict({name: make() for name, make in layers.items()})


MODELS = {
    "mlp": net(lin0=lambda: nn.Linear(10, 20), lin1=lambda: nn.Linear(20, 2)),
    "mlp32": net(lin0=lambda: nn.Linear(10, 32), lin1=lambda: nn.Linear(32, 2)),
    "norm": net(
        lin0=lambda: nn.Linear(10, 20),
        layernorm0=lambda: nn.LayerNorm(20),
        layernorm1=lambda: nn.LayerNorm(20),
    ),
    "emb": net(
        emb=lambda: nn.Embedding(101, 5),
        conv1d=lambda: Conv1D(3, 5),
        lin0=lambda: nn.Linear(10, 2),
    ),
    "conv1d": net(conv1d=lambda: nn.Conv1d(1, 1, 2)),
    "conv1d-wide": net(conv1d=lambda: nn.Conv1d(8, 12, 5)),
    "conv1d-groups": net(conv1d=lambda: nn.Conv1d(8, 16, 2, groups=4)),
    "conv2d": net(conv2d=lambda: nn.Conv2d(5, 10, 3), lin0=lambda: nn.Linear(10, 2)),
    "conv2d-one": net(conv2d=lambda: nn.Conv2d(1, 10, 1)),
    "conv2d-wide": net(conv2d=lambda: nn.Conv2d(32, 16, 3), lin0=lambda: nn.Linear(10, 2)),
    "conv2d-groups": net(conv2d=lambda: nn.Conv2d(5, 10, 3, groups=5)),
    "conv3d": net(conv3d=lambda: nn.Conv3d(5, 10, 3), lin0=lambda: nn.Linear(10, 2)),
    "mha": net(mha=lambda: nn.MultiheadAttention(10, 2), lin0=lambda: nn.Linear(10, 2)),
}
ONE, BOTH = {"target_modules": ["lin0"]}, {"target_modules": ["lin0", "lin1"]}
LAST = {"target_modules": ["lin1"]}
SAVED = {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}
NORM, EMB, TRANSPOSED = ({"target_modules": [name]} for name in ("layernorm0", "emb", "conv1d"))
CONV2, CONV3 = {"target_modules": ["conv2d"]}, {"target_modules": ["conv3d"]}
CONV2_LIN, CONV3_LIN = (
    {"target_modules": ["conv2d", "lin0"]},
    {"target_modules": ["conv3d", "lin0"]},
)
# by configuration: a model and options
CASES: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "LoraConfig": [
        ("mlp", ONE), ("mlp", BOTH), ("mlp", LAST), ("mlp", SAVED),
        ("mlp", {**ONE, "lora_alpha": 4}), ("mlp", {**BOTH, "use_rslora": True}),
        ("mlp", {**BOTH, "use_dora": True, "lora_alpha": 32}),
        ("mlp", {**ONE, "kasa_config": peft.KasaConfig(), "r": 4}),
        ("mlp", {**ONE, "init_lora_weights": "mica", "r": 4}),
        ("mlp", {**ONE, "velora_config": peft.VeloraConfig(num_groups=2, init_type="random")}),
        ("mlp", {**BOTH, "velora_config": peft.VeloraConfig(num_groups=2,
                                                            init_type="batch_average")}),
        ("mlp", {**ONE, "monteclora_config": peft.MontecloraConfig(num_samples=2)}),
        ("mlp", {**BOTH, "lora_bias": True, "lora_alpha": 32}),
        ("mlp", {**ONE, "bias": "lora_only"}), ("mlp", {**ONE, "bias": "all"}),
        ("mlp", {"target_parameters": ["lin0.weight"]}),
        ("mlp", {**ONE, "target_parameters": ["lin1.weight"]}),
        ("mlp", {**BOTH, "use_bdlora": BdLoraConfig(target_modules_bd_a=["lin0"],
                                                    match_strict=False)}),
        ("mlp", {**BOTH, "use_bdlora": BdLoraConfig(target_modules_bd_b=["lin1"], nblocks=2,
                                                    match_strict=False)}),
        ("mlp", {**BOTH, "use_bdlora": BdLoraConfig(target_modules_bd_a=["lin0"], nblocks=2,
                                                    target_modules_bd_b=["lin1"])}),
        ("emb", TRANSPOSED), ("emb", EMB), ("emb", {"target_modules": ["emb", "conv1d"]}),
        ("emb", {**TRANSPOSED, "use_dora": True}), ("emb", {**EMB, "use_dora": True}),
        ("emb", {**TRANSPOSED, "trainable_token_indices": {"emb": [0, 10]}}),
        ("conv1d", TRANSPOSED), ("conv1d", {**TRANSPOSED, "use_dora": True}),
        ("conv1d-wide", TRANSPOSED), ("conv2d", CONV2), ("conv2d", CONV2_LIN),
        ("conv2d", {**CONV2, "use_dora": True}), ("conv2d", {**CONV2_LIN, "use_dora": True}),
        ("conv2d", {**CONV2, "lora_bias": True, "lora_alpha": 32}), ("conv2d-one", CONV2),
        ("conv3d", CONV3), ("conv3d", CONV3_LIN), ("conv3d", {**CONV3, "use_dora": True}),
        ("conv3d", {**CONV3, "lora_bias": True, "lora_alpha": 32}),
        ("mha", {"target_modules": ["mha"]}), ("mha", {"target_modules": ["mha", "lin0"]}),
    ],
    "IA3Config": [
        (model, {"target_modules": targets, "feedforward_modules": feedforward, **more})
        for model, targets, feedforward, more in (
            ("mlp", ["lin0"], [], {}), ("mlp", ["lin0"], ["lin0"], {}),
            ("mlp", ["lin1"], [], {}), ("mlp", ["lin1"], ["lin1"], {}),
            ("mlp", ["lin0", "lin1"], ["lin0"], {}),
            ("mlp", ["lin0"], ["lin0"], {"modules_to_save": ["lin1"]}),
            ("emb", ["conv1d"], ["conv1d"], {}), ("emb", ["conv1d", "lin0"], ["lin0"], {}),
            ("conv2d", ["conv2d"], [], {}), ("conv2d", ["conv2d"], ["conv2d"], {}),
            ("conv2d", ["conv2d", "lin0"], ["conv2d"], {}),
            ("conv3d", ["conv3d"], [], {}), ("conv3d", ["conv3d", "lin0"], ["conv3d"], {}),
        )
    ],
    "BeftConfig": [("mlp", ONE), ("mlp", LAST), ("mlp", BOTH), ("mlp", SAVED)],
    "LoHaConfig": [
        ("mlp", ONE), ("mlp", BOTH), ("mlp", SAVED), ("mlp", {**ONE, "alpha": 4}),
        ("conv2d", CONV2), ("conv2d", CONV2_LIN),
        ("conv2d", {**CONV2, "use_effective_conv2d": True}),
        ("conv1d", TRANSPOSED), ("conv1d", {**TRANSPOSED, "r": 2}),
        ("conv1d-groups", {**TRANSPOSED, "r": 4}),
        ("conv1d-wide", {**TRANSPOSED, "r": 2, "use_effective_conv2d": True}),
        ("conv1d-wide", {**TRANSPOSED, "r": 2}), ("conv2d-one", CONV2), ("conv2d-groups", CONV2),
    ],
    "LoKrConfig": [
        ("mlp", ONE), ("mlp", BOTH), ("mlp", SAVED), ("mlp", {**ONE, "alpha": 4}),
        ("mlp", {**ONE, "decompose_both": True, "r": 1, "alpha": 1}),
        ("conv1d", TRANSPOSED), ("conv1d", {**TRANSPOSED, "r": 2}),
        ("conv1d-groups", {**TRANSPOSED, "r": 4}),
        ("conv1d-wide", {**TRANSPOSED, "r": 2, "use_effective_conv2d": True}),
        ("conv2d", CONV2), ("conv2d", CONV2_LIN),
        ("conv2d", {**CONV2, "use_effective_conv2d": True}),
        ("conv2d", {**CONV2_LIN, "use_effective_conv2d": True, "decompose_both": True}),
        ("conv2d", {**CONV2_LIN, "use_effective_conv2d": True, "decompose_factor": 4}),
        ("conv2d-one", CONV2), ("conv2d-groups", CONV2),
    ],
    "OFTConfig": [
        ("mlp", {"r": 2, "oft_block_size": 0, **ONE, "use_cayley_neumann": False}),
        ("mlp", {"r": 2, "oft_block_size": 0, **SAVED}),
        ("mlp", {"r": 2, "oft_block_size": 0, **ONE, "coft": True, "eps": 1e-2}),
        ("mlp", {"r": 2, "oft_block_size": 0, **ONE, "block_share": True}),
        ("mlp", {"r": 0, "oft_block_size": 2, **BOTH, "use_cayley_neumann": True}),
        ("mlp", {"r": 0, "oft_block_size": 2, **ONE, "coft": True, "block_share": True}),
        ("emb", {"r": 1, "oft_block_size": 0, **EMB}),
        ("emb", {"r": 1, "oft_block_size": 0, **EMB, "block_share": True}),
        ("conv2d", {"r": 5, "oft_block_size": 0, **CONV2}),
        ("conv2d", {"r": 5, "oft_block_size": 0, **CONV2, "coft": True, "block_share": True}),
    ],
    "HRAConfig": [
        ("mlp", ONE), ("mlp", BOTH), ("mlp", {**ONE, "apply_GS": True}), ("conv2d", CONV2)],
    "BOFTConfig": [
        ("mlp", {**LAST, "boft_block_size": 2}),
        ("mlp", {**LAST, "boft_block_size": 0, "boft_block_num": 2}),
        ("mlp", {**LAST, "boft_block_size": 10, "boft_n_butterfly_factor": 2}),
        ("mlp32", {**LAST, "boft_block_size": 2, "boft_n_butterfly_factor": 3}),
        ("conv2d", {**CONV2, "boft_block_size": 45}),
        ("conv2d", {**CONV2, "boft_block_size": 0, "boft_block_num": 1}),
        ("conv2d-wide", {**CONV2, "boft_block_size": 2, "boft_n_butterfly_factor": 2}),
    ],
    "RoadConfig": [
        ("mlp", {**ONE, "group_size": 2}), ("mlp", {**BOTH, "group_size": 2}),
        ("mlp", {**ONE, "variant": "road_2", "group_size": 2}),
        ("mlp", {**ONE, "variant": "road_4", "group_size": 2}),
    ],
    "C3AConfig": [
        ("mlp", {**ONE, "block_size": 2}), ("mlp", {**LAST, "block_size": 2}),
        ("mlp", {**SAVED, "block_size": 10}),
        ("mlp", {**BOTH, "block_size_pattern": {"lin0": 5, "lin1": 2}}),
    ],
    "VeraConfig": [("mlp", ONE), ("mlp", BOTH), ("mlp", SAVED), ("emb", TRANSPOSED)],
    "PveraConfig": [("mlp", ONE), ("mlp", BOTH), ("mlp", SAVED), ("emb", TRANSPOSED)],
    "VBLoRAConfig": [
        ("mlp", {**ONE, "vector_length": 1, "num_vectors": 5}),
        ("mlp", {**LAST, "vector_length": 2, "num_vectors": 5}),
        ("mlp", {**BOTH, "vector_length": 1, "num_vectors": 5, "save_only_topk_weights": True}),
        ("emb", {**TRANSPOSED, "vector_length": 1, "num_vectors": 2}),
    ],
    "RandLoraConfig": [
        ("mlp", {**ONE, "randlora_alpha": 1}), ("mlp", {**BOTH, "randlora_alpha": 1}),
        ("mlp", {**BOTH, "sparse": True, "randlora_alpha": 1}),
        ("mlp", {**BOTH, "very_sparse": True, "randlora_alpha": 1}),
    ],
    "FourierFTConfig": [
        ("mlp", {**ONE, "n_frequency": 10}), ("mlp", {**LAST, "n_frequency": 10}),
        ("mlp", {**BOTH, "n_frequency_pattern": {"lin0": 5, "lin1": 10}}),
    ],
    "WaveFTConfig": [
        ("mlp", {**ONE, "n_frequency": 8}), ("mlp", {**BOTH, "n_frequency": 8}),
        ("mlp", {**ONE, "n_frequency": 8, "scaling": 25.0, "wavelet_family": "db1"}),
        ("mlp", {**LAST, "n_frequency": 8, "use_idwt": False}),
        ("mlp", {**ONE, "n_frequency": 16, "wavelet_family": "sym2"}),
        ("mlp", {**ONE, "n_frequency": 16, "proportional_parameters": True}),
    ],
    "TinyLoraConfig": [
        ("mlp", {**ONE, "r": 2, "u": 16}), ("mlp", {**BOTH, "r": 2, "u": 32}),
        ("mlp", {**BOTH, "r": 2, "u": 8, "weight_tying": 1.0}),
        ("emb", {**TRANSPOSED, "r": 2, "u": 16}), ("emb", {**EMB, "r": 2, "u": 16}),
    ],
    "UniLoraConfig": [
        ("mlp", {**ONE, "theta_d_length": 101, "save_indices": True}),
        ("mlp", {**BOTH, "theta_d_length": 101, "save_indices": True}),
        ("emb", {**TRANSPOSED, "theta_d_length": 101, "save_indices": True}),
    ],
    "LNTuningConfig": [
        ("norm", NORM), ("norm", ONE),
    ],
    "TrainableTokensConfig": [("emb", {**EMB, "token_indices": [0, 1, 3]})],
    "MissConfig": [
        ("mlp", {**ONE, "r": 2}), ("mlp", {**BOTH, "r": 2}), ("mlp", {**SAVED, "r": 2}),
        ("mlp", {**ONE, "r": 2, "init_weights": "bat"}),
        ("mlp", {**BOTH, "r": 2, "init_weights": "bat"}),
        ("mlp", {**ONE, "r": 2, "mini_r": 2, "init_weights": "mini"}),
    ],
    "ShiraConfig": [
        ("mlp", {**ONE, "r": 1}), ("mlp", {**LAST, "r": 1}), ("mlp", {**BOTH, "r": 1}),
    ],
    "SupertuningConfig": [
        ("mlp", {**ONE, "sparsity": 0.5}), ("mlp", {**BOTH, "sparsity": 0.5, "select_top": False}),
        ("mlp", {**ONE, "sparsity": 0.5, "r": 2}),
    ],
    "DeloraConfig": [("mlp", ONE), ("mlp", LAST), ("mlp", BOTH)],
    "GraloraConfig": [
        ("mlp", ONE), ("mlp", BOTH), ("mlp", {**BOTH, "hybrid_r": 4}), ("mlp", SAVED),
        ("emb", {**TRANSPOSED, "gralora_k": 1}),
    ],
    "HiraConfig": [
        ("mlp", ONE), ("mlp", BOTH), ("mlp", SAVED), ("emb", TRANSPOSED), ("emb", EMB),
        ("conv1d", TRANSPOSED), ("conv2d", CONV2), ("conv2d", CONV2_LIN), ("conv3d", CONV3),
        ("conv3d", CONV3_LIN),
    ],
    "GloraConfig": [("mlp", ONE), ("mlp", LAST), ("mlp", BOTH), ("mlp", SAVED)],
    "DeftConfig": [
        ("mlp", ONE), ("mlp", BOTH), ("mlp", {**ONE, "decomposition_method": "qr", "alpha": 16}),
        ("mlp", {**ONE, "decomposition_method": "relu", "para": True}),
        ("mlp", {**ONE, "decomposition_method": "qr", "para": True}), ("emb", TRANSPOSED),
    ],
    "OSFConfig": [
        ("mlp", {}), ("mlp", {"target_svd_config": {"lin0.weight": 5, "lin1.weight": 1}})],
    "PsoftConfig": [
        ("mlp", {**ONE, "r": 4, "psoft_alpha": 4}), ("mlp", {**BOTH, "r": 2, "psoft_alpha": 2}),
        ("mlp", {**ONE, "r": 4, "psoft_alpha": 4, "psoft_mag_a": False, "psoft_mag_b": False}),
        ("mlp", {**ONE, "r": 4, "psoft_alpha": 4, "use_cayley_neumann": True}),
        ("mlp", {**ONE, "r": 4, "psoft_alpha": 4, "psoft_orth": False}),
        ("mlp", {**ONE, "r": 4, "psoft_alpha": 4, "ab_svd_init": "pissa_init"}),
    ],
    "PeanutConfig": [
        ("mlp", {**ONE, "r": 2, "depth": 0, "act_fn": "relu"}),
        ("mlp", {**BOTH, "r": 2, "depth": 0, "act_fn": "relu"}),
        ("mlp", {**ONE, "r": 2, "depth": 1, "act_fn": "gelu"}),
    ],
    "AdaLoraConfig": [
        ("mlp", {**ONE, "total_step": 1, "init_lora_weights": False}),
        ("mlp", {**BOTH, "total_step": 1, "init_lora_weights": False}),
        ("conv2d", {**CONV2_LIN, "total_step": 1, "init_lora_weights": False}),
    ],
}  # fmt: skip
ALL = [
    pytest.param(kind, model, options, id=f"{kind}-{model}-{number}")
    for kind, cases in CASES.items()
    for number, (model, options) in enumerate(cases)
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kind", "model", "options"), ALL)
def test_merged_as_peft_merges(
    kind: str, model: str, options: dict[str, Any], dtype: torch.dtype, mill: Any
) -> None:
    # these take the signs of a decomposition from the machine, which is refused unless asked for
    more = {"peft_bugs": "reproduce"} if kind == "PsoftConfig" else {}
    mill.check(MODELS[model], getattr(peft, kind)(**options), dtype, **more)


def test_every_kind_of_peft_is_merged_or_refused_by_name() -> None:
    known = {*all_tuners(), *NOT_MERGEABLE}
    kinds = {kind.value for kind in peft.PeftType}
    assert kinds - known == set()


@pytest.mark.parametrize("kind", sorted(NOT_MERGEABLE))
def test_what_has_no_merged_form_is_refused(kind: str, mill: Any) -> None:
    base = mill.base(MODELS["mlp"], torch.float32)
    adapter = mill.adapter(MODELS["mlp"], peft.LoraConfig(**ONE))
    path = adapter / "adapter_config.json"
    path.write_text(path.read_text().replace('"LORA"', f'"{kind}"'))
    with pytest.raises(StreamMergeError, match="no merged form"):
        mill.export(base, adapter)
    assert not (mill.folder / "merged").exists()
