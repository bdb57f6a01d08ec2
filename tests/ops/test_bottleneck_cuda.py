"""What the bottleneck's CUDA kernels compute: values around their tiles, masks, and what they leave to pieces."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from bottleneck_cuda import (
    ALL,
    CUDA,
    SCALING,
    backward,
    both,
    check,
    forward,
    needs_the_kernels,
    normal,
    ops,
    problem,
    seed_for,
)

from peftkern.ops._dropout import dropout_mask, dropout_scale
from peftkern.ops.bottleneck.op import ACTIVATIONS

pytestmark = needs_the_kernels

# M, H: tiles are up to 32 tokens, a block has up to 8 chunks of 64 features, a cluster 2 to 16 blocks. Gradients are of
# 128 features in steps of 128 tokens. Odd numbers of chunks and of tiles, and many rounds of tiles, let the slots
# change hands. Beyond 8192 features all goes to pieces.
SHAPES = [
    (1, 512),
    (63, 520),
    (64, 1000),
    (65, 4096),
    (200, 4104),
    (1025, 1024),
    (2049, 1032),
    (2300, 4096),
    (2200, 8192),
    (130, 11008),
    (70, 16384),
    (6000, 512),
    (5000, 1536),
    (3900, 8192),
    (8192, 4096),
]
WIDTHS = [8, 16, 24, 40, 64, 72, 128]


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("b", [64, 128])
@pytest.mark.parametrize(("M", "H"), SHAPES, ids=str)
def test_shapes_around_the_tiles(M, H, b, dropout_p):
    check(problem(M, H, b), dropout_p=dropout_p, seed=seed_for(dropout_p))


@pytest.mark.parametrize("b", WIDTHS)
@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_widths_and_dtypes(dtype, adapter_dtype, b):
    _, _, *grads = check(problem(300, 1032, b, dtype, adapter_dtype), dropout_p=0.1, seed=seed_for(0.1))
    assert all(g.dtype == adapter_dtype for g in grads)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("M", [70, 2300])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation, M, dropout_p):
    check(problem(M, 1024, 64), activation=activation, dropout_p=dropout_p, seed=seed_for(dropout_p))


@pytest.mark.parametrize("missing", [(2,), (4,), (2, 4)], ids=str)
def test_without_biases(missing):
    check([None if i in missing else t for i, t in enumerate(problem(300, 1024, 64))])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)  # the wider one is for pieces
@pytest.mark.parametrize("M", [70, 2300])
@pytest.mark.parametrize("H", [1000, 1024, 2048, 4096, 8192])  # clusters of every size
def test_own_residual(H, M, dtype):
    tensors = problem(M, H, 64)
    y, *_ = check(tensors, residual=torch.randn(M, H, device=CUDA).to(dtype))
    assert y.dtype == dtype


def test_strided_operands():
    tensors = problem(300, 1024, 64)
    expected = both(tensors)
    padded = [t if t.dim() == 1 else torch.nn.functional.pad(t, (0, 3))[:, : t.shape[1]] for t in tensors]
    transposed = [t if t.dim() == 1 else t.t().contiguous().t() for t in tensors]
    for strided in (padded, transposed):
        assert all(torch.equal(a, b) for a, b in zip(both(strided), expected))


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=5)), ids=str)
def test_any_subset_of_gradients(needs):
    tensors, seed = problem(2300, 1032, 40), seed_for(0.1)
    _, h = forward(tensors, 0.1, seed)
    full = backward(tensors, h, 0.1, seed)
    for got, want, needed in zip(backward(tensors, h, 0.1, seed, needs), full, needs):
        assert torch.equal(got, want) if needed else got.numel() == 0


def test_a_gradient_that_is_not_added_to_dys():
    tensors = problem(300, 1024, 64)
    _, h = forward(tensors)
    with_dy, without = (backward(tensors, h, residual_is_x=flag)[0].float() for flag in (True, False))
    torch.testing.assert_close(with_dy, without + tensors[5].float(), rtol=1e-2, atol=2e-2)


@pytest.mark.parametrize("M", [65, 1000, 8192])
@pytest.mark.parametrize("b", [8, 40, 64])
def test_the_bias_below_gets_sums_of_what_is_not_rounded(b, M):
    _, _, _, up, _, dy = tensors = problem(M, 1024, b)
    _, h = forward(tensors, activation="relu")
    grad = backward(tensors, h, activation="relu")[2]
    dh = (dy.double() @ up.double()) * SCALING * (h > 0)
    assert grad.dtype == torch.float32
    torch.testing.assert_close(grad.double(), dh.sum(0), rtol=0, atol=1e-5 * dh.abs().sum(0).max().item())


@pytest.mark.parametrize("own_residual", [False, True])
@pytest.mark.parametrize(
    ("M", "H", "b"),
    [(1024, 4096, 64), (8192, 4096, 64), (8192, 8192, 64), (8192, 2048, 64), (16384, 1024, 64)],
    ids=str,
)
def test_hundreds_of_calls_in_a_row(M, H, b, own_residual):
    """Loads come in any order while calls overlap: no slot may be taken for loaded or for free too early."""
    x, down, down_bias, up, up_bias, dy = problem(M, H, b)
    residual = normal(M, H) if own_residual else None

    def run():
        y, h = ops.bottleneck_fwd(x, down, down_bias, up, up_bias, residual, "gelu", 1.0, 0.0, None)
        return y, h, *ops.bottleneck_bwd(dy, x, down, up, h, None, "gelu", 1.0, 0.0, not own_residual, *ALL)

    first = run()
    for _ in range(20):
        results = [run() for _ in range(10)]
        assert all(torch.equal(a, b) for result in results[::9] for a, b in zip(result, first))


@pytest.mark.parametrize("M", [100, 2100])
@pytest.mark.parametrize("b", [40, 64, 128])
def test_the_mask_is_the_one_defined(b, M):
    """relu of ones, through an identity: what is left of them is the mask."""
    H, p, seed = 512, 0.3, seed_for(0.3)
    x = torch.zeros(M, H, device=CUDA, dtype=torch.bfloat16)
    down, up = (torch.zeros(s, device=CUDA, dtype=torch.bfloat16) for s in ((b, H), (H, b)))
    up[:b].fill_diagonal_(1)
    down_bias = torch.ones(b, device=CUDA)
    y, h = ops.bottleneck_fwd(x, down, down_bias, up, None, None, "relu", 1 / dropout_scale(p), p, seed)
    assert torch.equal(h, torch.ones_like(h))
    mask = dropout_mask(seed, M, b, p)
    assert torch.equal(y[:, :b] != 0, mask)
    down[:, :b].fill_diagonal_(1)
    dy = torch.ones_like(x)
    dx, *_ = ops.bottleneck_bwd(dy, x, down, up, h, seed, "relu", 1.0, p, False, *ALL)
    assert torch.equal(dx[:, :b] != 0, mask)


def test_a_nan_stays_in_its_row():
    tensors = problem(300, 1024, 64)
    clean, _ = forward(tensors)
    tensors[0][77, 5] = math.nan
    y, h = forward(tensors)
    rows = torch.arange(300, device=CUDA) != 77
    assert y[77].isnan().all()
    assert h[77].isnan().all()
    assert torch.equal(y[rows], clean[rows])


@pytest.mark.parametrize(("M", "H", "b"), [(100, 1024, 256), (100, 1024, 65), (100, 1028, 64), (100, 256, 16)], ids=str)
def test_pieces_take_the_others(M, H, b):
    check(problem(M, H, b), dropout_p=0.1, seed=seed_for(0.1))


def test_scaling_goes_into_both_terms():
    x, down, _, up, up_bias, _ = problem(100, 512, 8)
    y, _ = ops.bottleneck_fwd(torch.zeros_like(x), down, None, up, up_bias, None, "gelu", SCALING, 0.0, None)
    torch.testing.assert_close(y.float(), (SCALING * up_bias.float()).expand(100, 512), rtol=1e-2, atol=1e-2)
