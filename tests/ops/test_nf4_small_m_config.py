"""Launch configuration of the NF4 matmul for few tokens: every row, token and block of K is somebody's, and it fits."""

from __future__ import annotations

import itertools

import pytest

_host = pytest.importorskip("peftkern._host")

SHAPES = [(4096, 4096), (11008, 4096), (4096, 11008), (28672, 8192), (8192, 28672), (1024, 4096), (14336, 4096)]
SHAPES += [(4096, 14336), (1, 64), (17, 192), (257, 2112), (1_000_003, 64), (2_000_000, 8192), (100, 1 << 20)]
DEVICES = [(132, 231_424), (108, 165_888), (46, 100_352), (1, 100_352)]


@pytest.mark.parametrize("device", DEVICES, ids=lambda d: f"{d[0]}sm-{d[1] >> 10}k")
@pytest.mark.parametrize(("N", "K"), SHAPES)
def test_covers_and_fits(N, K, device):
    multiprocessors, smem_limit = device
    for M in (1, 4, 5, 8, 9, 16, 17, 32):
        c = _host.nf4_small_m_config(M, N, K, multiprocessors, smem_limit)
        assert c["tokens"] >= M
        assert c["passes"] * c["slices"] * c["quads"] * 256 >= K > (c["passes"] - 1) * c["slices"] * c["quads"] * 256
        assert N // c["ctas"] >= 1
        longest = -(-N // c["ctas"])
        assert c["tiles"] * c["rows"] >= longest > (c["tiles"] - 1) * c["rows"]
        assert c["smem"] <= smem_limit
        assert c["threads"] % c["rows"] == 0


@pytest.mark.parametrize(("N", "K"), SHAPES[:8])
def test_every_multiprocessor_of_hopper_works(N, K):
    for M in (1, 8, 16, 32):
        c = _host.nf4_small_m_config(M, N, K)
        assert c["ctas"] == min(132 * c["ctas_per_sm"], -(-N // 4))


@pytest.mark.parametrize("M", [1, 8, 16])
def test_two_short_launches_share_a_multiprocessor(M):
    """The next launch gets ready beside this one only if both fit: 228 KB, of which 1 KB per CTA is the system's."""
    c = _host.nf4_small_m_config(M, 1024, 4096)
    assert c["ctas_per_sm"] == 1
    assert 2 * (c["smem"] + 1024) <= 228 * 1024


def test_is_pure():
    a, b = (_host.nf4_small_m_config(8, 4096, 4096) for _ in range(2))
    assert a == b
    assert all(isinstance(v, int) for v in itertools.chain(a.values()))
