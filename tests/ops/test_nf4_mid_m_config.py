"""Launch configuration of the NF4 matmul for 17 to 128 tokens: tiles cover the problem, and blocks fit the device."""

from __future__ import annotations

import itertools

import pytest

_host = pytest.importorskip("peftkern._host")

SHAPES = [(4096, 4096), (11008, 4096), (4096, 11008), (28672, 8192), (8192, 28672), (1024, 4096), (14336, 4096)]
SHAPES += [(8, 64), (200, 320), (264, 2112), (1_000_000, 64), (2_000_000, 8192), (104, 1 << 20)]
TOKENS = (17, 32, 33, 63, 64, 65, 96, 97, 128)


@pytest.mark.parametrize("multiprocessors", [1, 2, 114, 132])
@pytest.mark.parametrize(("N", "K"), SHAPES)
def test_tiles_cover_the_problem(N, K, multiprocessors):
    for M in TOKENS:
        c = _host.nf4_mid_m_config(M, N, K, multiprocessors)
        assert (c["token_tiles"] - 1) * c["tokens"] < M <= c["token_tiles"] * c["tokens"]
        assert (c["out_tiles"] - 1) * c["rows"] < N <= c["out_tiles"] * c["rows"]
        assert c["rows"] % 16 == 0
        assert 16 <= c["rows"] <= c["max_rows"]
        # Every block of a cluster has a chunk of 256 of the contraction.
        assert 1 <= c["split"] <= min(4, -(-K // 256))
        # A multiprocessor has 64 K registers and 2048 threads.
        assert c["blocks"] * c["threads"] <= 1024


@pytest.mark.parametrize(("N", "K"), SHAPES[:7])
def test_most_multiprocessors_of_hopper_work(N, K):
    for M in TOKENS:
        c = _host.nf4_mid_m_config(M, N, K)
        assert c["out_tiles"] * c["token_tiles"] * c["split"] >= 80


def test_is_pure():
    a, b = (_host.nf4_mid_m_config(64, 4096, 4096) for _ in range(2))
    assert a == b
    assert all(isinstance(v, int) for v in itertools.chain(a.values()))
