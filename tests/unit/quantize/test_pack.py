"""Packed layouts: round trips, bytes as GPTQModel writes them, shapes that are refused."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from streammerge.checkpoint.header import TensorSpec
from streammerge.dtypes import Dtype
from streammerge.errors import QuantizationError
from streammerge.quantize.linear import QuantizedLinear
from streammerge.quantize.pack import PackedLayout, pack_awq, pack_gptq, unpack_awq, unpack_gptq
from streammerge.quantize.settings import QuantizeSettings

DTYPES = {torch.int32: Dtype.I32, torch.float16: Dtype.F16}


def random_linear(
    rows: int, features: int, bits: int, group_size: int, *, seed: int = 0, lowest_zero: int = 1
) -> QuantizedLinear:
    random = torch.Generator().manual_seed(seed)
    size = features if group_size == -1 else group_size
    groups = -(-features // size)
    highest = 2**bits - 1
    return QuantizedLinear(
        codes=torch.randint(0, highest + 1, (rows, features), generator=random).to(torch.uint8),
        scales=(torch.rand(rows, groups, generator=random) + 0.25).half().float(),
        zeros=torch.randint(
            lowest_zero, highest + 1, (rows, groups), generator=random, dtype=torch.int32
        ),
        g_idx=(torch.arange(features) // size).to(torch.int32),
        bits=bits,
        group_size=size,
    )


def regular_linear(bits: int) -> QuantizedLinear:
    """Return the linear of which GPTQModel made the bytes below."""
    n, k, g = torch.arange(32)[:, None], torch.arange(64)[None], torch.arange(2)[None]
    return QuantizedLinear(
        codes=((5 * n + 3 * k + n * k) % 2**bits).to(torch.uint8),
        scales=2.0 ** -((n + g) % 4 + 2),
        zeros=(1 + (n + 2 * g) % (2**bits - 1)).to(torch.int32),
        g_idx=(torch.arange(64) // 32).to(torch.int32),
        bits=bits,
        group_size=32,
    )


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()[:16]


def assert_same(left: QuantizedLinear, right: QuantizedLinear) -> None:
    for name in ("codes", "scales", "zeros", "g_idx"):
        ours, theirs = getattr(left, name), getattr(right, name)
        assert ours.dtype == theirs.dtype, name
        assert torch.equal(ours, theirs), name
    assert (left.bits, left.group_size) == (right.bits, right.group_size)


# GPTQModel 7.6.0, `TorchLinear.pack_original` and `convert_gptq_v2_to_v1_format_module`:
# words of input 1's output, digest of all codes, digests of the zeros as v2 and as v1
GPTQ_GOLDEN = {
    2: ([1431655765] * 3, "313cbf39f5161d30", "73b843c221edd716", "b279e0e41734e3c9"),
    3: (
        [1295307597, -749914925, 886263092],
        "e6aa82308a8e7500",
        "ad5e2e102404bfd5",
        "5306a6ab70a53be8",
    ),
    4: ([496311701] * 3, "705d9df65b1aa4ed", "1aba52b8a5fc1c54", "91ea23c35ae43df2"),
    8: (
        [286066949, 555555093, 825043237],
        "1982a2fd6674d797",
        "de89af6ee5c7f2cf",
        "15f9eb3f28fa2b18",
    ),
}


class TestGolden:
    @pytest.mark.parametrize("bits", [2, 3, 4, 8])
    def test_gptq_bytes_are_those_of_gptqmodel(self, bits: int) -> None:
        words, codes, zeros_v2, zeros_v1 = GPTQ_GOLDEN[bits]
        v1, v2 = pack_gptq(regular_linear(bits)), pack_gptq(regular_linear(bits), "gptq_v2")
        assert v1["qweight"][:3, 1].tolist() == words
        assert digest(v1["qweight"]) == digest(v2["qweight"]) == codes
        assert digest(v2["qzeros"]) == zeros_v2
        assert digest(v1["qzeros"]) == zeros_v1

    def test_awq_bytes_are_those_of_gptqmodel(self) -> None:
        packed = pack_awq(regular_linear(4))
        assert packed["qweight"][1].tolist() == [-782664717] * 4
        assert digest(packed["qweight"]) == "5151120907865d7f"
        assert packed["qzeros"][1].tolist() == [-1469802669, 837562331, -1183471516, 1123889644]
        assert digest(packed["qzeros"]) == "e5832042af0b2f99"

    def test_a_word_of_awq_by_hand(self) -> None:
        linear = replace(
            regular_linear(4), codes=torch.arange(32)[:, None].expand(32, 64).to(torch.uint8) % 16
        )
        # outputs 0 2 4 6 1 3 5 7 from the lowest bits on
        assert pack_awq(linear)["qweight"][0, 0].item() == 0x75316420

    def test_a_word_of_gptq_by_hand(self) -> None:
        linear = replace(
            regular_linear(4), codes=torch.arange(64)[None].expand(32, 64).to(torch.uint8) % 8
        )
        assert pack_gptq(linear)["qweight"][0, 0].item() == 0x76543210

    def test_zeros_are_stored_less_one_by_gptq_and_as_they_are_by_v2(self) -> None:
        linear = replace(regular_linear(4), zeros=torch.full((32, 2), 8, dtype=torch.int32))
        assert set(pack_gptq(linear)["qzeros"].flatten().tolist()) == {0x77777777}
        # 0x88888888 as a signed number
        assert set(pack_gptq(linear, "gptq_v2")["qzeros"].flatten().tolist()) == {-0x77777778}


class TestRoundTrip:
    @settings(max_examples=60, deadline=None)
    @given(
        bits=st.sampled_from([2, 4, 8]),
        rows=st.integers(1, 70),
        features=st.integers(1, 70),
        group_size=st.sampled_from([-1, 1, 7, 16, 128]),
        is_v2=st.booleans(),
        seed=st.integers(0, 1000),
    )
    def test_gptq_of_any_shape(
        self, bits: int, rows: int, features: int, group_size: int, is_v2: bool, seed: int
    ) -> None:
        linear = random_linear(
            rows, features, bits, group_size, seed=seed, lowest_zero=0 if is_v2 else 1
        )
        form = "gptq_v2" if is_v2 else "gptq"
        back = unpack_gptq(
            pack_gptq(linear, form), bits=bits, group_size=group_size, checkpoint_format=form
        )
        assert_same(back, linear)
        assert torch.equal(back.dequantize(), linear.dequantize())

    @settings(max_examples=20, deadline=None)
    @given(rows=st.integers(1, 4), features=st.integers(1, 4), seed=st.integers(0, 1000))
    def test_three_bits(self, rows: int, features: int, seed: int) -> None:
        linear = random_linear(32 * rows, 32 * features, 3, 16, seed=seed)
        assert_same(unpack_gptq(pack_gptq(linear), bits=3, group_size=16), linear)

    @settings(max_examples=30, deadline=None)
    @given(
        rows=st.integers(1, 9),
        groups=st.integers(1, 5),
        group_size=st.sampled_from([-1, 1, 3, 32]),
        seed=st.integers(0, 1000),
    )
    def test_awq(self, rows: int, groups: int, group_size: int, seed: int) -> None:
        features = 11 * groups if group_size == -1 else group_size * groups
        linear = random_linear(8 * rows, features, 4, group_size, seed=seed, lowest_zero=0)
        assert_same(unpack_awq(pack_awq(linear), group_size=group_size), linear)

    def test_groups_out_of_order_are_kept_by_gptq(self) -> None:
        linear = random_linear(16, 64, 4, 16)
        linear.g_idx = linear.g_idx[torch.randperm(64, generator=torch.Generator().manual_seed(3))]
        assert_same(unpack_gptq(pack_gptq(linear), bits=4, group_size=16), linear)

    def test_what_fills_up_the_last_word_is_zero(self) -> None:
        linear = replace(random_linear(3, 9, 4, -1), codes=torch.full((3, 9), 15).to(torch.uint8))
        packed = pack_gptq(linear, "gptq_v2")
        assert packed["qweight"][1].tolist() == [15, 15, 15]
        assert int(packed["qzeros"][0, 0]) >> 12 == 0


class TestRefusals:
    def test_gptq_cannot_store_a_zero_of_zero(self) -> None:
        linear = random_linear(8, 32, 4, 32)
        linear.zeros[3, 0] = 0
        with pytest.raises(QuantizationError, match="gptq_v2"):
            pack_gptq(linear)
        assert_same(
            unpack_gptq(
                pack_gptq(linear, "gptq_v2"), bits=4, group_size=32, checkpoint_format="gptq_v2"
            ),
            linear,
        )

    @pytest.mark.parametrize(("rows", "features"), [(33, 64), (64, 40), (16, 32)])
    def test_three_bits_want_multiples_of_32(self, rows: int, features: int) -> None:
        with pytest.raises(QuantizationError, match=f"multiples of 32; got {rows} x {features}"):
            pack_gptq(random_linear(rows, features, 3, -1))

    @pytest.mark.parametrize(("rows", "features"), [(9, 64), (8, 63)])
    def test_awq_wants_eights_and_whole_groups(self, rows: int, features: int) -> None:
        with pytest.raises(QuantizationError, match=f"got {rows} x {features}"):
            pack_awq(random_linear(rows, features, 4, 32))

    def test_awq_stores_four_bits_in_order_only(self) -> None:
        with pytest.raises(QuantizationError, match="4 bits only"):
            pack_awq(random_linear(8, 32, 8, 32))
        linear = random_linear(8, 64, 4, 32)
        linear.g_idx = linear.g_idx.flip(0)
        with pytest.raises(QuantizationError, match="out of order"):
            pack_awq(linear)

    @pytest.mark.parametrize("pack", [pack_gptq, pack_awq])
    def test_values_that_would_be_changed(self, pack: object) -> None:
        assert callable(pack)
        linear = random_linear(8, 32, 4, 32)
        with pytest.raises(QuantizationError, match="a code has more bits"):
            pack(replace(linear, codes=linear.codes + 16))
        with pytest.raises(QuantizationError, match="a zero is not a code"):
            pack(replace(linear, zeros=linear.zeros + 16))
        for scale in (float("nan"), float("inf"), 70000.0):
            with pytest.raises(QuantizationError, match="too large for float16"):
                pack(replace(linear, scales=torch.full((8, 1), scale)))
        with pytest.raises(QuantizationError, match="rounded on storing"):
            pack(replace(linear, scales=torch.full((8, 1), 0.1)))

    def test_five_bits(self) -> None:
        with pytest.raises(QuantizationError, match=r"2, 3, 4 or 8 bits.*got 5"):
            PackedLayout("gptq", 5, 32).tensors("m", rows=32, features=32)


class TestLayout:
    @pytest.mark.parametrize("method", ["gptq", "awq"])
    @pytest.mark.parametrize("bits", [2, 3, 4, 8])
    @pytest.mark.parametrize(("rows", "features"), [(32, 64), (96, 160), (7, 50), (8, 33)])
    @pytest.mark.parametrize("group_size", [-1, 32])
    def test_foretells_what_is_packed(
        self, method: str, bits: int, rows: int, features: int, group_size: int
    ) -> None:
        settings_ = QuantizeSettings("awq" if method == "awq" else "rtn", bits, group_size)
        layout = PackedLayout.of(settings_)
        linear = random_linear(rows, features, bits, group_size)
        pack = pack_awq if method == "awq" else pack_gptq
        try:
            specs = layout.tensors("m", rows=rows, features=features)
        except QuantizationError:
            with pytest.raises(QuantizationError):
                pack(linear)
            return
        packed = {
            f"m.{end}": TensorSpec(f"m.{end}", DTYPES[tensor.dtype], tuple(tensor.shape))
            for end, tensor in pack(linear).items()
        }
        assert packed == {spec.name: spec for spec in specs}

    def test_a_bias_is_stored_as_it_is(self) -> None:
        specs = PackedLayout("awq", 4, 128).tensors(
            "layers.0.q_proj", rows=64, features=256, bias=Dtype.BF16
        )
        assert [(spec.name, spec.dtype, spec.shape) for spec in specs] == [
            ("layers.0.q_proj.qweight", Dtype.I32, (256, 8)),
            ("layers.0.q_proj.qzeros", Dtype.I32, (2, 8)),
            ("layers.0.q_proj.scales", Dtype.F16, (2, 64)),
            ("layers.0.q_proj.bias", Dtype.BF16, (64,)),
        ]

    def test_says_which_shapes_only_gptqmodel_loads(self) -> None:
        layout = PackedLayout("gptq", 4, 128)
        assert layout.is_whole(64, 256)
        assert not layout.is_whole(63, 256)
        assert not layout.is_whole(64, 200)
        assert PackedLayout("gptq", 4, -1).is_whole(64, 200)
        assert not PackedLayout("gptq", 3, -1).is_whole(64, 40)

    def test_refusal_names_the_module(self) -> None:
        with pytest.raises(QuantizationError, match=r"layers\.0\.q_proj"):
            PackedLayout("gptq", 3, 32).tensors("layers.0.q_proj", rows=33, features=64)
