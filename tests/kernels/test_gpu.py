"""The cases of the interpreter on a device."""

from __future__ import annotations

import pytest
import torch
from cases import (
    BF16,
    OPERATIONS,
    Case,
    Draw,
    check_decoding,
    check_e4m3_encoding,
    sample,
)

from streammerge_kernels import dora_merge_

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


def has_tma() -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability() >= (9, 0)


def on_gpu(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.cuda()


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_sample_is_within_its_bound_on_a_gpu(operation: str) -> None:
    if operation == "tma" and not has_tma():
        pytest.skip("needs sm_90 or newer")
    cases = sample(operation, seed=0, count=60)
    failed = [case.name for case in cases if OPERATIONS[operation](case, on_gpu).violations]
    assert failed == []


def test_codecs_are_exact_for_every_code_on_a_gpu() -> None:
    assert check_decoding(on_gpu) == {"nf4": 0, "e4m3": 0, "mxfp4": 0}
    assert check_e4m3_encoding(on_gpu) == 0


def test_a_merge_gives_the_same_bits_every_time() -> None:
    case = Case("dora", (1000, 5000), (16,), BF16, BF16)
    results = []
    for _ in range(3):
        draw = Draw(case, on_gpu)
        weight, terms = on_gpu(draw.normal(1000, 5000).bfloat16()), draw.terms()
        results.append(dora_merge_(weight, terms, on_gpu(draw.normal(1000))))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
