"""NF4 beyond 2^31 elements, on a GPU: weights, activations and results, compared in slices so that memory stays small.

Each test holds at most about 20 GB and takes a few seconds.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from peftkern import NF4Weight, dequantize_nf4, nf4_matmul, quantize_nf4
from peftkern.ops import backends
from peftkern.ops.nf4 import reference
from peftkern.testing.nf4 import dense_nf4, random_nf4, row_slice
from peftkern.testing.numerics import assert_within

NEEDED_BYTES = 30 << 30
DTYPE = torch.bfloat16
N, K = 32769, 65536  # 2^31 + 65536 weights; a row is a whole number of blocks of scales
SLICE = 512  # rows: 34 M weights, whose decoding in eager PyTorch takes about 1 GB
TALL, NARROW = 2**31 // 64 + 129, 64  # tokens whose activations are more than 2^31 elements

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture(autouse=True)
def _memory() -> Iterator[None]:
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if free < NEEDED_BYTES:
        pytest.skip(f"{free >> 30} GiB of device memory free, {NEEDED_BYTES >> 30} needed")
    yield
    torch.cuda.empty_cache()


def skip_reference(*ops: str) -> None:
    """The reference holds many copies of the whole weight, over 100 GB."""
    for op in ops:
        if backends()[op]["CUDA"] == "reference":
            pytest.skip(f"{op} has no kernel here")


def row_slices(rows: int, size: int = SLICE) -> Iterator[slice]:
    for first in range(0, rows, size):
        yield slice(first, min(first + size, rows))


def poisoned(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.full(shape, float("nan"), dtype=dtype, device="cuda")


def randn(shape: tuple[int, ...], std: float = 1.0) -> torch.Tensor:
    """Normal values made slice by slice: no float32 copy of the whole."""
    out = torch.empty(shape, dtype=DTYPE, device="cuda").view(-1)
    for part in out.split(1 << 26):
        part.copy_(torch.randn(part.shape, device="cuda").mul_(std))
    return out.view(shape)


def leave_poison_behind(nbytes: int) -> None:
    """Memory that the allocator hands out next is full of NaN, without filling it inside the op."""
    torch.cuda.empty_cache()
    del_me = torch.full((nbytes // 2,), float("nan"), dtype=DTYPE, device="cuda")
    del del_me


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dequantize(dtype, double_quant):
    skip_reference("nf4_dequantize_out")
    q = random_nf4((N, K), double_quant=double_quant, device="cuda")
    out = poisoned((N, K), dtype)
    dequantize_nf4(q, out=out)
    for rows in row_slices(N):
        expected = dense_nf4(row_slice(q, rows.start, rows.stop), dtype)
        assert torch.equal(out[rows], expected), f"rows {rows.start} to {rows.stop}"


@pytest.mark.parametrize("columns", [128, 127])
@pytest.mark.parametrize("double_quant", [True, False])
def test_dequantize_a_slice(double_quant, columns):
    skip_reference("nf4_dequantize_slice_out")
    q = random_nf4((N, K), double_quant=double_quant, device="cuda")
    out = poisoned((N, columns), DTYPE)
    torch.ops.peftkern.nf4_dequantize_slice_out(
        *q.tensors(), q.blocksize, q.nested_blocksize, N, K, 0, K - columns, out
    )
    for rows in row_slices(N):
        expected = dense_nf4(row_slice(q, rows.start, rows.stop), DTYPE)
        assert torch.equal(out[rows], expected[:, K - columns :]), f"rows {rows.start} to {rows.stop}"


@pytest.mark.parametrize("tail", [0, 33])
def test_quantize(tail):
    """The tail makes the last block short and the last byte half used."""
    skip_reference("nf4_quantize", "nf4_quantize_absmax")
    numel = N * K + tail
    weight = randn((numel,), 0.02)
    plain = quantize_nf4(weight, double_quant=False)
    step = 1 << 25
    for begin in range(0, numel, step):
        end = min(begin + step, numel)
        packed, absmax = reference.quantize(weight[begin:end], 64)
        assert torch.equal(plain.packed[begin // 2 : (end + 1) // 2], packed), f"codes from {begin}"
        assert torch.equal(plain.absmax[begin // 64 : -(-end // 64)], absmax), f"scales from {begin}"
    nested = quantize_nf4(weight)
    assert torch.equal(nested.packed, plain.packed)
    assert nested.nested_offset is not None
    torch.testing.assert_close(nested.nested_offset.double(), plain.absmax.double().mean(), rtol=1e-5, atol=0)
    codes, nested_absmax = reference.quantize_absmax(plain.absmax, nested.nested_offset, nested.nested_code, 256)
    assert torch.equal(nested.absmax, codes)
    assert torch.equal(nested.nested_absmax, nested_absmax)


# Few tokens, tiles, and (blocks of 32) the weight decoded in slices.
@pytest.mark.parametrize(("M", "blocksize"), [(1, 64), (2, 64), (64, 64), (300, 64), (5000, 64), (2, 32), (300, 32)])
def test_matmul_with_a_huge_weight(M, blocksize):
    skip_reference("nf4_matmul")
    q = random_nf4((N, K), blocksize, device="cuda")
    x, bias = randn((M, K)), randn((N,))
    leave_poison_behind(M * N * DTYPE.itemsize)
    y = nf4_matmul(x, q, bias)
    checked = x[torch.linspace(0, M - 1, min(M, 300), device="cuda").long()]
    got = y[torch.linspace(0, M - 1, min(M, 300), device="cuda").long()]
    assert y.shape == (M, N)
    x64 = checked.double()
    for rows in row_slices(N):
        part = row_slice(q, rows.start, rows.stop)
        eager = torch.nn.functional.linear(checked, dense_nf4(part, DTYPE), bias[rows])
        truth = torch.nn.functional.linear(x64, dense_nf4(part, torch.float64), bias[rows].double())
        assert_within(got[:, rows], eager, truth, f"rows {rows.start} to {rows.stop}")


@pytest.mark.parametrize(("M", "blocksize"), [(1, 64), (2, 64), (64, 64), (300, 64), (2, 32), (300, 32)])
def test_dx_with_a_huge_weight(M, blocksize):
    skip_reference("nf4_matmul_dx")
    q = random_nf4((N, K), blocksize, device="cuda")
    dy = randn((M, N))
    leave_poison_behind(M * K * DTYPE.itemsize)
    dx = dx_of(dy, q)
    dense = torch.empty((N, K), dtype=DTYPE, device="cuda")
    truth = torch.zeros((M, K), dtype=torch.float64, device="cuda")
    for rows in row_slices(N):
        part = row_slice(q, rows.start, rows.stop)
        dense[rows] = dense_nf4(part, DTYPE)
        truth += dy[:, rows].double() @ dense_nf4(part, torch.float64)
    assert_within(dx, dy @ dense, truth, "dx")


@pytest.mark.parametrize("blocksize", [64, 32])
@pytest.mark.parametrize("dx", [False, True])
def test_more_than_2_to_the_31_activations(dx, blocksize):
    """Row counts beyond every grid limit but x's, and offsets beyond int32 on both sides."""
    skip_reference("nf4_matmul", "nf4_matmul_dx")
    q = random_nf4((NARROW, NARROW), blocksize, device="cuda")
    x = randn((TALL, NARROW))
    leave_poison_behind(x.nbytes)
    y = dx_of(x, q) if dx else nf4_matmul(x, q)
    eager, truth = dense_nf4(q, DTYPE), dense_nf4(q, torch.float64)
    if not dx:
        eager, truth = eager.T, truth.T
    for rows in row_slices(TALL, 1 << 20):
        part = x[rows]
        assert_within(y[rows], part @ eager, part.double() @ truth, f"rows {rows.start} to {rows.stop}")


def dx_of(dy: torch.Tensor, q: NF4Weight) -> torch.Tensor:
    return torch.ops.peftkern.nf4_matmul_dx(dy, *q.tensors(), q.blocksize, q.nested_blocksize, q.shape[1])
