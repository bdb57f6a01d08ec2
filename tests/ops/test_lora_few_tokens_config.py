"""Which LoRA matmuls of few tokens have kernels of their own, and that these cover S and fit."""

from __future__ import annotations

import itertools

import pytest

_host = pytest.importorskip("peftkern._host")

TOKENS = (1, 7, 8, 9, 16, 17, 31, 32, 33, 63, 64)
RANKS = (1, 3, 8, 16, 17, 64, 130, 255, 256)


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


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("K", [64, 192, 4096, 28672])
def test_blocks_cover_S_and_its_padding(K, whole):
    for M, r in itertools.product(TOKENS, RANKS):
        c = _host.lora_project_config(M, K, r, whole)
        assert c["padded"] % 16 == 0
        assert 0 <= c["padded"] - r < 16
        assert c["row_tiles"] * 16 == c["padded"]
        assert 16 * c["token_tiles"] >= M > 16 * (c["token_tiles"] - 1)
        assert 1 <= c["parts"] <= 8
        assert c["bytes"] == (2 * 16 * c["token_tiles"] * c["padded"] if whole else 4 * c["parts"] * M * c["padded"])
        if whole:
            assert c["parts"] == 8  # the blocks of a cluster
        else:
            assert c["parts"] <= K // 64
            assert c["parts"] == 1 or c["parts"] * M * c["padded"] <= 8192


@pytest.mark.parametrize("M", [1, 8, 9, 16])
@pytest.mark.parametrize("rank", [4, 16, 64, 128])
@pytest.mark.parametrize(("N", "K"), [(4096, 4096), (28672, 8192), (1, 64), (5, 192), (100, 1 << 20), (1_000_003, 64)])
def test_S_made_in_the_matmul_fits(N, K, rank, M):
    padded = -(-rank // 16) * 16
    cluster = _host.small_m_cluster(M, N, K, padded)
    assert cluster in (0, 2, 4, 8)
    if cluster == 0:
        return
    without = _host.nf4_small_m_config(M, N, K)
    c = _host.nf4_small_m_config(M, N, K, cluster=cluster, padded=padded)
    assert c["cluster"] == cluster
    assert c["ctas"] % cluster == 0
    assert c["tokens"] == without["tokens"] >= M
    assert c["tiles"] * c["rows"] * c["ctas"] >= N
    parked = 4 * c["tiles"] * c["rows"] * c["tokens"] if c["passes"] > 1 else 0
    parked_without = 4 * without["tiles"] * without["rows"] * without["tokens"] if without["passes"] > 1 else 0
    parts = 16 + 4 * cluster * M * padded  # a barrier, then the parts of S
    assert c["smem"] == without["smem"] - parked_without + parked + parts
    assert 2 * (c["smem"] + 1024) <= 228 * 1024  # the next launch's CTAs, or two of this one's, side by side


def test_who_makes_S():
    assert _host.small_m_cluster(1, 4096, 4096, 16) > 0
    assert _host.small_m_cluster(17, 4096, 4096, 16) == 0
    assert _host.small_m_cluster(1, 4096, 4096, 144) == 0
    for capability in (80, 89, 100, 120):
        assert _host.small_m_cluster(1, 4096, 4096, 16, compute_capability=capability) == 0
