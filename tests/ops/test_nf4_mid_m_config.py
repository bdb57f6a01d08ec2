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
        assert c["tokens"] >= M
        assert (c["tiles"] - 1) * c["rows"] < N <= c["tiles"] * c["rows"]
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
        assert c["tiles"] * c["split"] >= 80


# For up to 32, 64, 128 tokens: tokens and rows that the kernel is compiled for, rows of a tile, blocks that share it.
CHOSEN_ON_HOPPER = {
    (4096, 4096): [(32, 64, 64, 2), (64, 64, 64, 2), (128, 192, 144, 4)],
    (11008, 4096): [(32, 128, 96, 2), (64, 128, 96, 2), (128, 192, 176, 2)],
    (28672, 8192): [(32, 128, 112, 1), (64, 128, 112, 1), (128, 256, 224, 1)],
    (14336, 4096): [(32, 128, 112, 2), (64, 128, 112, 2), (128, 192, 112, 1)],
    (4096, 14336): [(32, 64, 64, 2), (64, 64, 64, 2), (128, 192, 144, 4)],
}


@pytest.mark.parametrize(("N", "K"), CHOSEN_ON_HOPPER)
def test_choice_on_hopper(N, K):
    """The fastest of those timed on an H100, but 112 rows at 65 to 128 tokens, an estimate."""
    for tokens, chosen in zip(((17, 32), (33, 64), (65, 128)), CHOSEN_ON_HOPPER[N, K], strict=True):
        for M in tokens:
            c = _host.nf4_mid_m_config(M, N, K, 132)
            assert (c["tokens"], c["max_rows"], c["rows"], c["split"]) == chosen


def test_is_pure():
    a, b = (_host.nf4_mid_m_config(64, 4096, 4096) for _ in range(2))
    assert a == b
    assert all(isinstance(v, int) for v in itertools.chain(a.values()))
