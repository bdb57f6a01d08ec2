"""The NF4 matmul and its dX against float64 over every kind of size, dtype, blocksize and layout."""

from __future__ import annotations

import functools

import pytest
import torch

from peftkern import NF4Weight, nf4_matmul
from peftkern.ops.nf4.weight import BLOCKSIZES
from peftkern.testing.checks import poisoned_memory
from peftkern.testing.nf4 import dense_nf4, random_nf4
from peftkern.testing.numerics import assert_within

TOKENS = (0, 1, 2, 3, 5, 8, 9, 16, 17, 31, 32, 33, 64, 65, 100, 128, 129, 200, 256, 300, 513, 1030, 2050)
SHAPES = ((64, 64), (128, 256), (136, 320), (192, 4096), (300, 1088), (4096, 64), (1000, 192))  # (N, K)
RAGGED = ((40, 100), (33, 65), (64, 1), (1, 64), (130, 72))  # K no multiple of 64, blocks that straddle rows
HALVES = (torch.bfloat16, torch.float16)
FLOATS = (*HALVES, torch.float32)
CPU_TOKENS, CPU_SHAPES = (0, 1, 3, 5, 17, 33), ((64, 64), (136, 320), (40, 100), (33, 65))


def tokens_here(device: torch.device) -> tuple[int, ...]:
    return TOKENS if device.type == "cuda" else CPU_TOKENS


def skip_large_on_cpu(device: torch.device, shape: tuple[int, int]) -> None:
    if device.type == "cpu" and shape not in CPU_SHAPES:
        pytest.skip("covered by smaller shapes on the CPU")


def normal(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.randn(shape, device=device).to(dtype)


def dx_of(dy: torch.Tensor, q: NF4Weight) -> torch.Tensor:
    return torch.ops.peftkern.nf4_matmul_dx(dy, *q.tensors(), q.blocksize, q.nested_blocksize, q.shape[1])


class Checker:
    """Compares with float64 by the project's error rule; the dense weights are decoded once."""

    def __init__(self, q: NF4Weight, dtype: torch.dtype) -> None:
        self.q, self.truth, self.eager = q, dense_nf4(q, torch.float64), dense_nf4(q, dtype)

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None, what: str) -> torch.Tensor:
        with poisoned_memory():
            y = nf4_matmul(x, self.q, bias)
        eager = torch.nn.functional.linear(x, self.eager, bias)
        truth = torch.nn.functional.linear(x.double(), self.truth, None if bias is None else bias.double())
        assert_within(y, eager, truth, f"y, {what}")
        return y

    def dx(self, dy: torch.Tensor, what: str) -> torch.Tensor:
        with poisoned_memory():
            dx = dx_of(dy, self.q)
        assert_within(dx, dy @ self.eager, dy.double() @ self.truth, f"dx, {what}")
        return dx


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_number_of_tokens(shape, dtype, device):
    skip_large_on_cpu(device, shape)
    N, K = shape
    checker = Checker(random_nf4(shape, dtype=dtype, device=device), dtype)
    for i, M in enumerate(tokens_here(device)):
        bias = normal((N,), dtype, device) if i % 2 else None
        checker.forward(normal((M, K), dtype, device), bias, f"M={M}")
        checker.dx(normal((M, N), dtype, device), f"M={M}")


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("shape", [(128, 256), (136, 320), (192, 4096)])
def test_every_blocksize(shape, blocksize, double_quant, device):
    skip_large_on_cpu(device, shape)
    N, K = shape
    for dtype in HALVES:
        checker = Checker(random_nf4(shape, blocksize, double_quant, dtype, device), dtype)
        for M in (1, 5, 17, 65, 130, 513) if device.type == "cuda" else (1, 5):
            what = f"M={M}, {dtype}"
            checker.forward(normal((M, K), dtype, device), normal((N,), dtype, device), what)
            checker.dx(normal((M, N), dtype, device), what)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", RAGGED)
def test_ragged_shapes(shape, dtype, device):
    N, K = shape
    for blocksize, double_quant in ((64, True), (32, False), (4096, True)):
        checker = Checker(random_nf4(shape, blocksize, double_quant, dtype, device), dtype)
        for M in (1, 2, 5, 17, 33, 65, 130, 300) if device.type == "cuda" else (1, 5, 17):
            what = f"M={M}, blocksize={blocksize}"
            checker.forward(normal((M, K), dtype, device), normal((N,), dtype, device), what)
            checker.dx(normal((M, N), dtype, device), what)


@pytest.mark.parametrize("shape", [(136, 320), (300, 1088), (4096, 64)])
def test_float32(shape, device):
    skip_large_on_cpu(device, shape)
    N, K = shape
    checker = Checker(random_nf4(shape, dtype=torch.float32, device=device), torch.float32)
    for M in (1, 2, 5, 9, 33, 65, 130, 513) if device.type == "cuda" else (1, 5, 33):
        checker.forward(normal((M, K), torch.float32, device), normal((N,), torch.float32, device), f"M={M}")
        checker.dx(normal((M, N), torch.float32, device), f"M={M}")


def transposed(M: int, K: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return normal((K, M), dtype, device).t()


def every_other_column(M: int, K: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return normal((M, 2 * K), dtype, device)[:, ::2]


def wide_rows(M: int, K: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return normal((M, K + 24), dtype, device)[:, 3 : K + 3]


def odd_offset(M: int, K: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return normal((M * K + 1,), dtype, device)[1:].view(M, K)


def one_row_repeated(M: int, K: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return normal((1, K), dtype, device).expand(M, K)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", [transposed, every_other_column, wide_rows, odd_offset, one_row_repeated])
def test_layouts_of_the_activations(layout, dtype, device):
    N, K = 136, 320
    checker = Checker(random_nf4((N, K), dtype=dtype, device=device), dtype)
    for M in (1, 5, 33, 130, 300) if device.type == "cuda" else (1, 5):
        checker.forward(layout(M, K, dtype, device), normal((N,), dtype, device), f"M={M}")
        dy = layout(M, N, dtype, device)
        x = normal((M, K), dtype, device).requires_grad_()
        (dx,) = torch.autograd.grad(nf4_matmul(x, checker.q), x, dy)
        assert_within(dx, dy @ checker.eager, dy.double() @ checker.truth, f"dx, M={M}")


def shifted(t: torch.Tensor | None) -> torch.Tensor | None:
    """The same values one element further: not aligned to more than an element."""
    if t is None:
        return None
    flat = torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)
    return flat[1:].copy_(t.reshape(-1)).view(t.shape)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("which", ["all", "packed", "absmax", "nested_absmax", "bias"])
def test_weights_at_any_address(which, double_quant, device):
    N, K, dtype = 136, 320, torch.bfloat16
    q = random_nf4((N, K), double_quant=double_quant, device=device)
    pieces = [
        shifted(t) if which in ("all", name) else t
        for name, t in zip(("packed", "absmax", "nested_absmax", "nested_code", "nested_offset"), q.tensors())
    ]
    checker = Checker(q.with_tensors(tuple(pieces)), dtype)
    bias = normal((N,), dtype, device)
    if which in ("all", "bias"):
        bias = shifted(bias)
    for M in (1, 5, 33, 130, 300) if device.type == "cuda" else (1, 5):
        checker.forward(normal((M, K), dtype, device), bias, f"M={M}")
        checker.dx(normal((M, N), dtype, device), f"M={M}")


@pytest.mark.parametrize("bias_dtype", FLOATS)
def test_a_bias_of_another_dtype(bias_dtype, device):
    q = random_nf4((136, 320), device=device)
    for M in (1, 33, 200) if device.type == "cuda" else (1, 33):
        x, bias = normal((M, 320), torch.bfloat16, device), normal((136,), bias_dtype, device)
        y = nf4_matmul(x, q, bias)
        eager = torch.nn.functional.linear(x, dense_nf4(q, torch.bfloat16), bias.bfloat16())
        truth = x.double() @ dense_nf4(q, torch.float64).T + bias.bfloat16().double()
        assert_within(y, eager, truth, f"M={M}")


@pytest.mark.parametrize("dtype", FLOATS)
def test_special_activations_reach_their_row_only(dtype, device):
    """NaN and infinity in one token leave the others alone, in tiles that hold several too."""
    q = random_nf4((136, 320), dtype=dtype, device=device)
    for M in (2, 5, 33, 130, 300) if device.type == "cuda" else (2, 5):
        x = normal((M, 320), dtype, device)
        clean = nf4_matmul(x, q)
        x[0, 3], x[-1, 7] = float("nan"), float("inf")
        y = nf4_matmul(x, q)
        assert not y[0].isfinite().any()
        assert not y[-1].isfinite().all()
        assert torch.equal(y[1:-1], clean[1:-1]), f"M={M}"


@pytest.mark.parametrize("dtype", FLOATS)
def test_nothing_to_do(dtype, device):
    bias = normal((64,), dtype, device)
    for M, N, K in ((0, 64, 128), (3, 0, 128), (3, 64, 0), (0, 0, 0)):
        q = random_nf4((N, K), dtype=dtype, device=device)
        y = nf4_matmul(normal((M, K), dtype, device), q, bias if N else None)
        assert y.shape == (M, N)
        assert torch.equal(y, bias.expand(M, N) if N else y)
        dx = dx_of(normal((M, N), dtype, device), q)
        assert dx.shape == (M, K)
        assert not dx.any()


@functools.cache
def repeated_weight(device: torch.device) -> NF4Weight:
    return random_nf4((1000, 1088), device=device)


@pytest.mark.parametrize("M", [1, 4, 5, 16, 33, 64, 65, 128, 200, 513, 2050])
def test_run_to_run_determinism(M, device):
    if device.type == "cpu" and M > 64:
        pytest.skip("covered by fewer tokens on the CPU")
    q = repeated_weight(device)
    x, dy = normal((M, 1088), torch.bfloat16, device), normal((M, 1000), torch.bfloat16, device)
    y, dx = nf4_matmul(x, q), dx_of(dy, q)
    for _ in range(20):
        with poisoned_memory():
            assert torch.equal(nf4_matmul(x, q), y)
            assert torch.equal(dx_of(dy, q), dx)
