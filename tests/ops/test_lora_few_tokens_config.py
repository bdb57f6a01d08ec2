"""Which LoRA matmuls of few tokens have kernels of their own, who makes S in them, and that they fit."""

from __future__ import annotations

import itertools

import pytest

_host = pytest.importorskip("peftkern._host")


def test_choice_on_hopper():
    choose = _host.lora_few_tokens_kernel
    assert [choose(M, 4096, 4096, 16) for M in (1, 16, 17, 64, 65)] == ["small_m"] * 2 + ["mid_m"] * 2 + ["dequantize"]
    assert [choose(M, 4097, 4096, 16) for M in (1, 32, 33)] == ["small_m"] * 2 + ["dequantize"]  # rows of y: 16 n bytes
    assert [choose(4, 4096, 4096, r) for r in (1, 256, 257)] == ["small_m"] * 2 + ["dequantize"]


@pytest.mark.parametrize("M", [1, 8, 32, 64])
def test_what_has_no_kernel(M):
    for more in ({"half": False}, {"aligned": False}, {"blocksize": 32}, {"compute_capability": 75}):
        assert _host.lora_few_tokens_kernel(M, 4096, 4096, 16, **more) == "dequantize"
    assert _host.lora_few_tokens_kernel(M, 4096, 4000, 16) == "dequantize"


def test_other_gpus_have_small_m_alone():
    for capability in (80, 89, 100, 120):
        chosen = [_host.lora_few_tokens_kernel(M, 4096, 4096, 16, compute_capability=capability) for M in (1, 32, 33)]
        assert chosen == ["small_m", "small_m", "dequantize"]


@pytest.mark.parametrize("multiprocessors", [14, 84, 132])
@pytest.mark.parametrize(("N", "K"), [(4096, 4096), (11008, 4096), (28672, 8192), (4096, 11008), (1, 64), (40, 192)])
def test_who_makes_S(N, K, multiprocessors):
    for M, padded in itertools.product((1, 8, 16, 32), (16, 64, 256)):
        without, c = (_host.nf4_small_m_config(M, N, K, multiprocessors, padded=p) for p in (0, padded))
        assert without["parts"] == without["makers"] == 0
        assert 1 <= c["parts"] <= min(8, K // 64)
        assert c["parts"] == 1 or c["parts"] * M * padded <= 8192
        assert c["tiles"] == without["tiles"]  # it costs nobody a tile
        assert 0 < c["ctas"] <= N
        assert c["makers"] == c["parts"] * padded // 16
        if c["parts"] > 1:  # and nobody a place
            assert c["makers"] + c["ctas"] <= c["ctas_per_sm"] * multiprocessors


@pytest.mark.parametrize("multiprocessors", [66, 132])
@pytest.mark.parametrize(("N", "K"), [(4096, 4096), (11008, 4096), (28672, 8192), (4096, 28672), (8, 64), (40, 192)])
def test_who_makes_S_for_mid_m(N, K, multiprocessors):
    for M, padded in itertools.product((17, 32, 33, 64), (16, 64, 256)):
        c = _host.nf4_mid_m_config(M, N, K, multiprocessors, padded)
        assert 1 <= c["parts"] <= min(8, K // 64)
        if c["parts"] > 1:  # it costs nobody a place
            assert c["parts"] * padded // 16 + c["tiles"] * c["split"] <= multiprocessors * c["blocks"]
    for M, padded, parts in ((32, 16, 4), (32, 64, 1), (64, 16, 4), (64, 64, 4), (64, 256, 4)):
        assert _host.nf4_mid_m_config(M, 4096, 4096, padded=padded)["parts"] == parts


@pytest.mark.parametrize("smem_limit", [231_424, 165_888, 100_352])
@pytest.mark.parametrize(("N", "K"), [(4096, 4096), (28672, 8192), (1, 64), (100, 1 << 20), (1_000_003, 64)])
def test_S_fits_beside_what_small_m_keeps(N, K, smem_limit):
    for M, padded in itertools.product((1, 8, 16, 32), (16, 64, 256)):
        without = _host.nf4_small_m_config(M, N, K, 132, smem_limit)
        c = _host.nf4_small_m_config(M, N, K, 132, smem_limit, padded)
        assert c["smem"] <= smem_limit
        assert c["tiles"] * c["rows"] >= -(-N // c["ctas"])
        assert c["ctas"] <= N
        if all(c[key] == without[key] for key in ("tokens", "ctas", "tiles", "slices")):
            parked = 4 * c["tiles"] * c["rows"] * c["tokens"] if c["passes"] == 1 else 0
            assert c["smem"] - without["smem"] == 2 * c["tokens"] * padded + parked


@pytest.mark.parametrize("padded", [16, 64])
@pytest.mark.parametrize("M", [1, 8, 16])
def test_two_short_launches_share_a_multiprocessor_with_an_adapter_too(M, padded):
    """The next launch gets ready beside this one only if both fit: 228 KB, of which 1 KB per CTA is the system's."""
    c = _host.nf4_small_m_config(M, 1024, 4096, padded=padded)
    assert c["ctas_per_sm"] == 1
    assert 2 * (c["smem"] + 1024) <= 228 * 1024
