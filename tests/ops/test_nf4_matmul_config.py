"""Which kernel the CUDA NF4 matmul takes, and the configurations of its tiles and scratch."""

from __future__ import annotations

import pytest

_host = pytest.importorskip("peftkern._host")

SIZES = (1, 64, 65, 1000, 4096, 11008, 28672)
TOKENS = (1, 17, 33, 64, 65, 128, 200, 256, 300, 513, 2048, 4096)
CAPABILITIES = (75, 80, 86, 89, 90, 100, 120)


def kernel(M: int, N: int = 4096, K: int = 4096, **traits: object) -> str:
    return _host.nf4_matmul_kernel(M, N, K, **traits)


@pytest.mark.parametrize(
    ("M", "forward", "dx"),
    [
        (1, "small_m", "tile"),
        (8, "small_m", "tile"),
        (16, "small_m", "tile"),
        (17, "mid_m", "tile"),
        (128, "mid_m", "tile"),
        (129, "tile", "tile"),
        (1024, "tile", "tile"),
        (1025, "tile", "dequantize"),
        (2048, "tile", "dequantize"),
        (2049, "dequantize", "dequantize"),
    ],
)
def test_kernel_by_tokens_on_hopper(M, forward, dx):
    assert kernel(M) == forward
    assert kernel(M, dx=True) == dx


@pytest.mark.parametrize(
    "slow",
    [
        {"half": False},
        {"aligned": False},
        {"blocksize": 32},
        {"K": 4097},
        {"K": 4096 + 32},
        {"compute_capability": 75},
    ],
    ids=str,
)
@pytest.mark.parametrize("compute_capability", [80, 90])
def test_kernel_of_what_the_tensor_cores_do_not_take(slow, compute_capability):
    traits = {"compute_capability": compute_capability, **slow}
    for M in (1, 8):
        assert kernel(M, **traits) == "gemv"
        assert kernel(M, dx=True, **traits) == "dequantize"
    for M in (9, 16, 17, 64, 4096):
        assert kernel(M, **traits) == "dequantize"
        assert kernel(M, dx=True, **traits) == "dequantize"


@pytest.mark.parametrize("compute_capability", CAPABILITIES)
def test_wgmma_on_hopper_only(compute_capability):
    for M in (1, 8, 9, 16, 17, 64, 4096, 4097, 100_000):
        for dx in (False, True):
            found = kernel(M, compute_capability=compute_capability, dx=dx)
            if compute_capability != 90:
                assert found not in ("mid_m", "tile")
            if found == "mid_m":
                assert 17 <= M <= 128
                assert not dx
            if found == "small_m":
                assert compute_capability >= 80
                assert M <= 32
                assert not dx
            if found == "gemv":
                assert M <= 8
                assert not dx
    if compute_capability >= 80:
        assert kernel(16, compute_capability=compute_capability) == "small_m"


def test_wgmma_stores_whole_rows():
    assert [kernel(32, N=N) for N in (4096, 4104, 4100, 4097)] == ["mid_m", "mid_m", "small_m", "small_m"]
    assert [kernel(64, N=N) for N in (4096, 4104, 4100, 4097)] == ["mid_m", "mid_m", "dequantize", "dequantize"]
    assert [kernel(200, N=N) for N in (4096, 4104, 4100, 4097)] == ["tile", "tile", "dequantize", "dequantize"]
    assert [kernel(64, N=N, dx=True) for N in (4104, 4100)] == ["tile", "tile"]


@pytest.mark.parametrize("blocksize", [64, 128, 4096])
def test_larger_blocks_change_nothing(blocksize):
    kernels = ["small_m", "mid_m", "tile", "dequantize"]
    assert [kernel(M, blocksize=blocksize) for M in (1, 17, 129, 2049)] == kernels


@pytest.mark.parametrize("multiprocessors", [1, 2, 114, 132])
@pytest.mark.parametrize("contraction", SIZES)
@pytest.mark.parametrize("outs", SIZES)
def test_tiles_cover_the_problem(outs, contraction, multiprocessors):
    for M in TOKENS:
        tokens, token_tiles, out_tiles, whole, split = _host.nf4_tile_config(M, outs, contraction, multiprocessors)
        assert tokens in (64, 128, 256)
        assert (token_tiles - 1) * tokens < M <= token_tiles * tokens
        assert (out_tiles - 1) * 128 < outs <= out_tiles * 128
        # A cluster's blocks share a tile's batches of 32 tokens, and its chunks of 256 of the contraction.
        assert 1 <= split <= min(8, tokens // 32)
        assert split == 1 or split <= -(-contraction // 256)
        # Tiles by one block each fill whole rounds of the multiprocessors; only the rest is split.
        tiles = token_tiles * out_tiles
        assert 0 <= whole <= tiles
        assert (whole == tiles) == (split == 1)
        assert whole == tiles or (whole % multiprocessors == 0 and tiles - whole < multiprocessors)


@pytest.mark.parametrize(("blocksize", "nested"), [(32, 1), (64, 1), (64, 256), (4096, 1), (4096, 256)])
@pytest.mark.parametrize("element_size", [2, 4])
@pytest.mark.parametrize("K", [64, 4096, 8192, 28672, 101])
def test_scratch_is_bounded_and_cut_between_blocks(K, element_size, blocksize, nested):
    budget = _host.nf4_scratch_bytes()
    fits = budget // (K * element_size)
    for N in (0, 1, fits):
        assert _host.nf4_scratch_rows(N, K, element_size, blocksize, nested) == N
    for N in (fits + 1, 3 * fits + 5, 100 * fits):
        rows = _host.nf4_scratch_rows(N, K, element_size, blocksize, nested)
        assert 0 < rows <= N
        if rows == N:  # a single row of blocks is longer than the weight, or than the budget
            assert K % 64
            continue
        assert rows * K % (blocksize * nested) == 0
        smallest = next(r for r in (2**i for i in range(40)) if r * K % (blocksize * nested) == 0)
        assert rows * K * element_size <= max(budget, smallest * K * element_size)
        if smallest * K * element_size <= budget:  # and it uses most of what it may
            assert (rows + smallest) * K * element_size > budget


def test_the_own_gemm_takes_several_rounds_of_tiles():
    assert _host.nf4_own_gemm(8192, 4096, 4096)
    assert _host.nf4_own_gemm(8192, 4096, 4096, dx=True)
    assert _host.nf4_own_gemm(2048, 28672, 8192)
    assert not _host.nf4_own_gemm(2048, 28672, 8192, dx=True)
    assert not _host.nf4_own_gemm(4096, 4096, 4096)
    for other in ({"half": False}, {"aligned": False}, {"compute_capability": 80}, {"compute_capability": 100}):
        assert not _host.nf4_own_gemm(8192, 4096, 4096, **other)
    assert not _host.nf4_own_gemm(8192, 4092, 4096)
