"""The jobs of a persistent GEMM launch: each is somebody's, once."""

from __future__ import annotations

import pytest

_host = pytest.importorskip("peftkern._host")

PROJECT, MAIN, GRADIENT_B, GRADIENT_A, SUM = range(1, 6)


def tiles(size: int, of: int) -> range:
    return range(-(-size // of))


SIZES = [((4096,), 4096), ((11008,), 4096), ((8,), 520), ((776,), 1288), ((4096, 1024, 1024), 4096), ((776, 8), 1288)]


def of_layers(kind: int, sizes: tuple[int, ...], of: int, others: range) -> list[tuple[int, int, int, int]]:
    return [(kind, t, other, layer) for layer, size in enumerate(sizes) for t in tiles(size, of) for other in others]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("blocks", [1, 2, 7, 78, 132])
@pytest.mark.parametrize(
    "needs", [(1, 1, 1), (1, 1, 0), (1, 0, 1), (0, 1, 1), (0, 0, 1), (0, 1, 0), (1, 0, 0)], ids=str
)
@pytest.mark.parametrize("M", [1, 128, 1024, 1300, 2049, 8192, 20_000])
@pytest.mark.parametrize(("N", "K"), SIZES, ids=str)
def test_every_job_is_taken_once(N, K, M, needs, blocks, masked):
    """Of a backward pass; without dx and dA there is nothing to project."""
    dx, dA, dB = needs
    project = bool(dx or dA)
    b_sizes = [size * dB for size in N]
    jobs, parts, started, _ = _host.gemm_jobs(M, [K * dx], sum(N), len(N) * project, b_sizes, K * dA, blocks, masked)
    expected = [(PROJECT, t, 0, layer) for layer in range(len(N)) for t in tiles(M * project, 128)]
    expected += [(MAIN, t, out, 0) for t in tiles(M, 128) for out in tiles(K * dx, 256)]
    expected += of_layers(GRADIENT_B, b_sizes, 128, range(parts))
    expected += of_layers(GRADIENT_A, (K * dA,), 128, range(parts))
    assert sorted(jobs) == sorted(expected)
    assert 1 <= started <= min(blocks, len(jobs))
    assert 1 <= parts <= 4


@pytest.mark.parametrize("blocks", [1, 7, 132])
@pytest.mark.parametrize("projects", [0, 1])
@pytest.mark.parametrize("M", [1024, 1300, 8192])
@pytest.mark.parametrize("N", [(4096,), (4096, 1024, 1024), (776, 8), (0, 24, 0, 520)], ids=str)
def test_every_job_of_a_forward_pass_is_taken_once(N, M, projects, blocks):
    jobs, _, _, _ = _host.gemm_jobs(M, N, 4096, projects, [], 0, blocks)
    expected = [(PROJECT, t, 0, 0) for t in tiles(M * projects, 128)]
    expected += [
        (MAIN, t, out, layer) for layer, size in enumerate(N) for t in tiles(M, 128) for out in tiles(size, 256)
    ]
    assert sorted(jobs) == sorted(expected)


@pytest.mark.parametrize("blocks", [1, 7, 132])
@pytest.mark.parametrize("dA", [False, True])
@pytest.mark.parametrize("M", [1024, 1300, 2049, 8192, 20_000])
@pytest.mark.parametrize(("N", "K"), SIZES, ids=str)
def test_fused_projects_leave_a_sum_a_block_and_layer(N, K, M, dA, blocks):
    jobs, parts, _, starters = _host.gemm_jobs(M, [K], sum(N), len(N), N, K * dA, blocks, fused=True)
    projects = [job[1:] for job in jobs if job[0] == PROJECT]
    expected = [(t, layer) for layer in range(len(N)) for t in tiles(M, 256)]
    assert sorted((tile, layer) for tile, _, layer in projects) == sorted(expected)
    assert starters == min(_host.gemm_fused_blocks(M, K), blocks)
    assert all(turn == tile // starters for tile, turn, _ in projects)
    others = [(MAIN, t, out, 0) for t in tiles(M, 128) for out in tiles(K, 256)]
    others += of_layers(GRADIENT_A, (K * dA,), 128, range(parts))
    others += of_layers(SUM, N, 128, range(1))
    assert sorted(job for job in jobs if job[0] != PROJECT) == sorted(others)


def test_the_usual_layers_leave_no_round_half_empty():
    """4096 -> 4096: 32 fused projections, which take a main tile's time, and 1024 main tiles are eight rounds."""
    jobs, _, blocks, _ = _host.gemm_jobs(8192, [4096], 4096, 1, [4096], 4096, 132, fused=True)
    assert sum(job[0] in (PROJECT, MAIN) for job in jobs) == 8 * blocks


@pytest.mark.parametrize(
    ("M", "outs", "rank", "features", "fuses"),
    [
        (8192, 4096, 8, 4096, True),
        (8192, 4096, 16, 24576, True),
        (8192, 4096, 16, 24584, False),
        (8192, 2048, 16, 24576, True),  # by 16 blocks
        (8192, 2048, 16, 24584, False),
        (100_000, 4096, 16, 24576, True),
        (1024, 4096, 16, 2 * 24576, True),  # by four
        (1025, 4096, 16, 2 * 24576, False),
        (8192, 4096, 24, 4096, False),
        (1024, 4096, 64, 4096, False),
    ],
)
def test_which_layers_are_fused(M, outs, rank, features, fuses):
    """Sums of dB, [features, 16] in float32 a block: 12 MiB of eight blocks or fewer."""
    assert _host.gemm_fuses(M, outs, rank, features) == fuses


@pytest.mark.parametrize(
    ("M", "outs", "blocks"),
    [
        (8192, 4096, 8),
        (8192, 11008, 8),
        (8192, 2048, 16),
        (8192, 3072, 11),
        (8192, 8, 16),
        (1025, 4096, 5),
        (100_000, 4096, 8),
    ],
)
def test_fused_blocks_keep_up_with_the_main_tiles(M, outs, blocks):
    """Of 132 blocks they take half of the rounds; eight, for those that the first main tiles wait for."""
    assert _host.gemm_fused_blocks(M, outs) == blocks


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
