"""Launch configuration of the NF4 matmul for few tokens: every row, token and block of K is somebody's, and it fits."""

from __future__ import annotations

import itertools

import pytest

_host = pytest.importorskip("peftkern._host")

SHAPES = [(4096, 4096), (11008, 4096), (4096, 11008), (28672, 8192), (8192, 28672), (1024, 4096), (14336, 4096)]
SHAPES += [(4096, 14336), (1, 64), (17, 192), (257, 2112), (1_000_003, 64), (2_000_000, 8192), (100, 1 << 20)]
DEVICES = [(132, True, 231_424), (108, False, 165_888), (46, False, 100_352), (1, False, 100_352)]


@pytest.mark.parametrize("device", DEVICES, ids=lambda d: f"{d[0]}sm-{d[2] >> 10}k")
@pytest.mark.parametrize(("N", "K"), SHAPES)
def test_covers_and_fits(N, K, device):
    multiprocessors, clusters, smem_limit = device
    for M in (1, 4, 5, 8, 9, 16, 17, 32, 33, 64):
        c = _host.nf4_small_m_config(M, N, K, multiprocessors, clusters, smem_limit)
        assert c["token_groups"] * c["tokens"] >= M > (c["token_groups"] - 1) * c["tokens"]
        assert c["passes"] * c["cluster"] * c["slices"] * c["quads"] * 256 >= K
        assert (c["passes"] - 1) * c["cluster"] * c["slices"] * c["quads"] * 256 < K
        longest = -(-N // c["row_groups"])
        assert N // c["row_groups"] >= 1
        assert c["tiles"] * c["rows"] >= longest > (c["tiles"] - 1) * c["rows"]
        assert c["ctas"] == c["row_groups"] * c["token_groups"] * c["cluster"]
        assert c["smem"] <= smem_limit
        assert c["cluster"] == 1 or clusters
        assert c["threads"] % c["rows"] == 0


@pytest.mark.parametrize(("N", "K"), SHAPES[:8])
def test_rows_are_even_on_hopper(N, K):
    """No CTA has more than one row more than another, and all multiprocessors work."""
    for M in (1, 8, 16, 32, 64):
        c = _host.nf4_small_m_config(M, N, K)
        assert c["ctas"] >= 128
        assert -(-N // c["row_groups"]) - N // c["row_groups"] <= 1


@pytest.mark.parametrize("M", [1, 8, 16])
def test_two_launches_share_a_multiprocessor(M):
    """The next launch gets ready beside this one only if both fit: 228 KB, of which 1 KB per CTA is the system's."""
    c = _host.nf4_small_m_config(M, 4096, 4096)
    assert c["ctas_per_sm"] == 1
    assert 2 * (c["smem"] + 1024) <= 228 * 1024


def test_is_pure():
    a, b = (_host.nf4_small_m_config(8, 4096, 4096) for _ in range(2))
    assert a == b
    assert all(isinstance(v, int) for v in itertools.chain(a.values()))
