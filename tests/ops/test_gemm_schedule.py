"""The jobs of a persistent GEMM launch: each is somebody's, once."""

from __future__ import annotations

import pytest

_host = pytest.importorskip("peftkern._host")

PROJECT, MAIN, GRADIENT_B, GRADIENT_A, SUM = range(1, 6)


def tiles(size: int, of: int) -> range:
    return range(-(-size // of))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("blocks", [1, 2, 7, 78, 132])
@pytest.mark.parametrize(
    "needs", [(1, 1, 1), (1, 1, 0), (1, 0, 1), (0, 1, 1), (0, 0, 1), (0, 1, 0), (1, 0, 0)], ids=str
)
@pytest.mark.parametrize("M", [1, 128, 1024, 1300, 2049, 8192, 20_000])
@pytest.mark.parametrize(("N", "K"), [(4096, 4096), (11008, 4096), (8, 520), (776, 1288)])
def test_every_job_is_taken_once(N, K, M, needs, blocks, masked):
    """Of a backward pass; without dx and dA there is nothing to project."""
    dx, dA, dB = needs
    project = bool(dx or dA)
    jobs, parts, started = _host.gemm_jobs(M, K * dx, N, project, N * dB, K * dA, blocks, masked)
    jobs = [(kind, tile, 0 if kind == PROJECT else other) for kind, tile, other in jobs]
    expected = [(PROJECT, t, 0) for t in tiles(M * project, 128)]
    expected += [(MAIN, t, out) for t in tiles(M, 128) for out in tiles(K * dx, 256)]
    expected += [(GRADIENT_B, f, part) for f in tiles(N * dB, 128) for part in range(parts)]
    expected += [(GRADIENT_A, f, part) for f in tiles(K * dA, 128) for part in range(parts)]
    assert sorted(jobs) == sorted(expected)
    assert 1 <= started <= min(blocks, len(jobs))
    assert 1 <= parts <= 4


@pytest.mark.parametrize("blocks", [1, 7, 132])
@pytest.mark.parametrize("dA", [False, True])
@pytest.mark.parametrize("M", [1024, 1300, 2049, 8192, 20_000])
@pytest.mark.parametrize(("N", "K"), [(4096, 4096), (11008, 4096), (8, 520), (776, 1288)])
def test_fused_projects_leave_a_sum_a_block(N, K, M, dA, blocks):
    jobs, parts, _ = _host.gemm_jobs(M, K, N, True, N, K * dA, blocks, fused=True)
    projects = [(tile, turn) for kind, tile, turn in jobs if kind == PROJECT]
    assert sorted(tile for tile, _ in projects) == list(tiles(M, 256))
    starters = sum(turn == 0 for _, turn in projects)
    assert starters == min(16, -(-M // 512), blocks)
    assert all(turn == tile // starters for tile, turn in projects)
    others = [(MAIN, t, out) for t in tiles(M, 128) for out in tiles(K, 256)]
    others += [(GRADIENT_A, f, part) for f in tiles(K * dA, 128) for part in range(parts)]
    others += [(SUM, f, 0) for f in tiles(N, 128)]
    assert sorted(job for job in jobs if job[0] != PROJECT) == sorted(others)


def test_the_usual_layers_leave_no_round_half_empty():
    """4096 -> 4096: 32 fused projections, which take a main tile's time, and 1024 main tiles are eight rounds."""
    jobs, _, blocks = _host.gemm_jobs(8192, 4096, 4096, True, 4096, 4096, 132, fused=True)
    assert sum(kind in (PROJECT, MAIN) for kind, _, _ in jobs) == 8 * blocks


@pytest.mark.parametrize(
    ("rank", "features", "fuses"),
    [(8, 4096, True), (16, 16384, True), (16, 16392, False), (24, 4096, False), (64, 4096, False)],
)
def test_which_layers_are_fused(rank, features, fuses):
    """Sums of dB by 16 blocks: [16384, 16] in float32 each at most, 16 MiB together."""
    assert _host.gemm_fuses(rank, features) == fuses


@pytest.mark.parametrize(
    ("K", "N", "least", "most"), [(4096, 4096, 0, 0), (4096, 11008, 0, 0), (11008, 4096, 4, 8)], ids=str
)
def test_fused_layers_have_as_many_gradient_blocks_as_were_fastest(K, N, least, most):
    """Measured at 0, 4 and 8: each of the first two layers loses 2 to 8% by any, the last one 2% by none."""
    assert least <= _host.gemm_gradient_blocks(8192, N, K, fused=True) <= most


def test_fragment_columns():
    """wgmma's thread q of four multiplies columns 2 q, 2 q + 1, 8 + 2 q, 9 + 2 q of 16: those of its own 16 of X."""
    columns = [_host.gemm_fragment_column(k) for k in range(192)]
    assert sorted(columns) == list(range(192))
    for k, place in enumerate(columns):
        box, thread, step = k // 64, k // 16 % 4, k // 4 % 4
        own = [box * 64 + step * 16 + 2 * thread + i for i in (0, 1, 8, 9)]
        assert place == own[k % 4]
