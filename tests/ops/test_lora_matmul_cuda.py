"""What LoRA matmul's CUDA kernel computes: values around its tiles, masks, and what it leaves to pieces."""

from __future__ import annotations

import itertools

import pytest
import torch
from lora_cuda import (
    ALL,
    CUDA,
    SCALING,
    backward,
    both,
    check,
    forward,
    needs_the_kernel,
    normal,
    ops,
    problem,
    run,
    seed_for,
)

from peftkern import quantize_nf4
from peftkern.ops._dropout import dropout_mask, dropout_scale
from peftkern.ops.lora_matmul import reference
from peftkern.ops.lora_matmul.function import lora_matmul_seeded
from peftkern.testing.checks import poisoned_memory
from peftkern.testing.numerics import assert_within, to_float64

pytestmark = needs_the_kernel

# M, N, K: tiles are 128 tokens x 256 outs, 64 deep, and 128 features.
SHAPES = [
    (1024, 256, 256),
    (1025, 264, 328),
    (1151, 72, 1000),
    (1536, 1032, 72),
    (2048, 512, 4096),
    (2049, 8, 520),
    (2176, 2056, 8),
    (2999, 760, 456),
    (9001, 264, 328),  # more than two fused projections a block
    (1100, 24576, 264),
    (8200, 24584, 72),  # too many outs to be fused
]
RANKS = [1, 8, 16, 24, 40, 64, 128, 256]


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize(("M", "N", "K"), SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_shapes_around_the_tiles(dtype, M, N, K, dropout_p):
    check(problem(M, N, K, 16, dtype), dropout_p, seed_for(dropout_p))


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("r", RANKS)
@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_ranks(dtype, adapter_dtype, r, dropout_p):
    _, _, dA, dB, _ = check(problem(1300, 328, 456, r, dtype, adapter_dtype), dropout_p, seed_for(dropout_p))
    assert dA.dtype == dB.dtype == adapter_dtype


@pytest.mark.parametrize("bias_dtype", [None, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_bias_of_any_dtype_or_none(bias_dtype):
    *tensors, bias, dy = problem(1100, 264, 328, 16)
    check((*tensors, None if bias_dtype is None else bias.to(bias_dtype), dy), 0.0, None)


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_strided_adapters_activations_and_gradients(dropout_p):
    x, weight, A, B, bias, dy = problem(1100, 264, 328, 24)
    seed = seed_for(dropout_p)
    expected = check((x, weight, A, B, bias, dy), dropout_p, seed)
    padded = torch.nn.functional.pad(dy, (0, 3))[:, :264]
    strided = (x.t().contiguous().t(), weight, A.t().contiguous().t(), B.t().contiguous().t(), bias, padded)
    for got, want in zip(run(lora_matmul_seeded, strided, dropout_p, seed), expected):
        assert torch.equal(got, want)
    summed = (x, weight, A, B, bias, torch.ones((), device=CUDA, dtype=dy.dtype).expand(dy.shape))
    dense = (*summed[:5], summed[5].contiguous())
    pairs = zip(*(run(lora_matmul_seeded, tensors, dropout_p, seed) for tensors in (summed, dense)))
    assert all(torch.equal(got, want) for got, want in pairs)


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("columns", [slice(0, 256), slice(256, 584), slice(64, 592)], ids=str)
def test_columns_of_a_weight_are_read_where_they_lie(columns, add):
    x, weight, A, B, _, dy = problem(1100, 264, 592, 16)
    S = normal(1100, 16)
    results = []
    for own in (weight[:, columns], weight[:, columns].contiguous()):
        args = (dy, x[:, columns], own, A[:, columns], B, S, None, SCALING, 0.0)
        total = torch.ones(own.shape[1], dtype=x.dtype, device=CUDA).repeat(1100, 1)
        with poisoned_memory():
            if add:
                results.append((total, *ops.lora_matmul_bwd_add(*args, True, True, total)))
            else:
                results.append(ops.lora_matmul_bwd(*args, *ALL))
    for got, want in zip(*results):
        assert torch.equal(got, want)
        assert got.isfinite().all()


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_an_nf4_weight(dropout_p):
    x, weight, *rest = problem(1100, 264, 328, 16)
    q = quantize_nf4(weight)
    got = run(lora_matmul_seeded, (x, q, *rest), dropout_p, seed_for(dropout_p))
    want = check((x, q.dequantize().to(x.dtype), *rest), dropout_p, seed_for(dropout_p))
    assert all(torch.equal(a, b) for a, b in zip(got, want))


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3)), ids=str)
def test_any_subset_of_gradients_reads_only_what_it_needs(needs, dropout_p):
    tensors = problem(1300, 328, 456, 40)
    x, weight, *rest = tensors
    need_dx, need_dA, need_dB = needs
    seed = seed_for(dropout_p)
    _, S = forward(tensors, dropout_p, seed)
    full = backward(tensors, S, dropout_p, seed)
    given = (x if need_dA else None, weight if need_dx else None, *rest)
    some = backward(given, S if need_dB else None, dropout_p, seed, needs)
    for got, expected, need in zip(some, full, needs):
        assert torch.equal(got, expected) if need else got.shape == (0,)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3)), ids=str)
@pytest.mark.parametrize("r", [8, 16])
def test_any_subset_of_gradients_of_a_small_rank(r, needs, dropout_p):
    """With dx, dB is summed beside D; without, by tokens: other bits, the same error rule."""
    tensors = problem(2999, 328, 456, r)
    x, weight, *rest = tensors
    need_dx, need_dA, need_dB = needs
    seed = seed_for(dropout_p)
    _, S = forward(tensors, dropout_p, seed)
    full = backward(tensors, S, dropout_p, seed)
    given = (x if need_dA else None, weight if need_dx else None, *rest)
    with poisoned_memory():
        dx, dA, dB = backward(given, S if need_dB else None, dropout_p, seed, needs)
    for got, expected, need in ((dx, full[0], need_dx), (dA, full[1], need_dA), (dB, full[2], need_dB and need_dx)):
        if need:
            assert torch.equal(got, expected)
    for got, need in zip((dx, dA, dB), needs):
        assert need or got.shape == (0,)
    if need_dB:
        eager = run(reference.formula, tensors, dropout_p, seed)[3]
        truth = run(reference.formula, to_float64(tensors), dropout_p, seed)[3]
        assert_within(dB, eager, truth, "dB")


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 0x0123456789ABCDEF])
@pytest.mark.parametrize("r", [64, 256])
def test_every_pass_has_the_mask_of_its_definition(seed, r):
    """Seen through unit matrices, r columns or rows at a time."""
    M, K, p = 1100, 328, 0.37
    seed = seed_for(p, value=seed)
    mask = dropout_mask(seed, M, K, p)
    dtype, factor = torch.bfloat16, dropout_scale(p)
    x, dy = (torch.ones(M, columns, dtype=dtype, device=CUDA) for columns in (K, r))
    eye = torch.eye(max(M, K), dtype=dtype, device=CUDA)
    weight, B = torch.zeros(r, K, dtype=dtype, device=CUDA), eye[:r, :r].contiguous()
    for first in range(0, K, r):
        _, S = ops.lora_matmul_fwd(x, weight, eye[first : first + r, :K].contiguous(), B, None, 1.0, p, seed)
        columns = min(r, K - first)
        assert torch.equal(S[:, :columns] != 0, mask[:, first : first + columns])
    A = torch.zeros(r, K, dtype=dtype, device=CUDA)
    A[0] = 1
    dx, _, _ = ops.lora_matmul_bwd(dy, None, weight, A, B, None, seed, 1.0, p, True, False, False)
    assert torch.equal(dx != 0, mask)
    for first in range(0, M, r):
        dy = torch.zeros(M, r, dtype=dtype, device=CUDA)
        rows = min(r, M - first)
        dy[first : first + rows, :rows] = eye[:rows, :rows]
        _, dA, _ = ops.lora_matmul_bwd(dy, x, None, A.float(), B, None, seed, 1.0, p, False, True, False)
        expected = mask[first : first + rows].float() * factor
        torch.testing.assert_close(dA[:rows], expected, rtol=1e-5, atol=0)


def test_dropped_elements_are_not_read_into_the_sums():
    M, N, K, p = 1100, 264, 328, 0.5
    seed = seed_for(p)
    tensors = problem(M, N, K, 16)
    x, weight, *rest = tensors
    poisoned = (torch.where(dropout_mask(seed, M, K, p), x, torch.nan), weight, *rest)
    assert torch.equal(forward(tensors, p, seed)[1], forward(poisoned, p, seed)[1])
    needs = (False, True, False)
    assert torch.equal(backward(tensors, None, p, seed, needs)[1], backward(poisoned, None, p, seed, needs)[1])


def pieces_problem(kind):
    M, N, K, r, dtype = 1100, 264, 328, 16, torch.bfloat16
    if kind == "few tokens":
        M = 1000
    elif kind == "ragged sides":
        N, K = 261, 325
    elif kind == "rank 20":
        r = 20
    elif kind == "rank 264":
        r = 264
    elif kind in ("float32", "float64"):
        dtype = getattr(torch, kind)
    x, weight, A, B, bias, dy = problem(M, N, K, r, dtype)
    if kind == "transposed weight":
        weight = weight.t().contiguous().t()
    elif kind == "misaligned x":
        x = torch.cat((x.new_zeros(1), x.flatten()))[1:].view(M, K)
    elif kind == "float64 adapters":
        A, B = A.double(), B.double()
    return x, weight, A, B, bias, dy


KINDS = ["few tokens", "ragged sides", "rank 20", "rank 264", "float32", "float64", "transposed weight"]


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("kind", [*KINDS, "misaligned x", "float64 adapters"])
def test_the_rest_is_made_of_pieces(kind, dropout_p):
    tensors, seed = pieces_problem(kind), seed_for(dropout_p)
    if kind == "float64":  # its own truth
        got = run(lora_matmul_seeded, tensors, dropout_p, seed)
        for value, expected in zip(got, run(reference.formula, tensors, dropout_p, seed)):
            torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    else:
        got = check(tensors, dropout_p, seed)
    x, weight, A, B, bias, _ = tensors
    y, _ = ops.lora_matmul_fwd_pieces(x, weight, A, B, bias, SCALING, dropout_p, seed)
    assert torch.equal(got[0], y)


@pytest.mark.parametrize("M", [0, 1, 1023])
def test_hardly_any_tokens(M):
    x, weight, A, B, bias, dy = problem(M, 264, 328, 16)
    y, S, dx, dA, dB = both((x, weight, A, B, bias, dy), 0.0, None)
    assert (y.shape, S.shape, dx.shape) == ((M, 264), (M, 16), (M, 328))
    if M == 0:
        assert torch.equal(dA, torch.zeros_like(A))
        assert torch.equal(dB, torch.zeros_like(B))


def test_mistakes_are_named():
    x, weight, A, B, bias, dy = problem(1100, 264, 328, 16)
    for wrong, message in (
        ((x, weight[:, :320], A, B, bias), "weight must be"),
        ((x, weight, A[:, :320], B, bias), "lora_A must be"),
        ((x, weight, A, B[:, :8], bias), "lora_B must be"),
        ((x, weight, A, B, bias[:8]), "bias must be"),
        ((x, weight, A.cpu(), B, bias), "lora_A is on cpu"),
        ((x, weight, A, B, bias.cpu()), "bias is on cpu"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.lora_matmul_fwd(*wrong, SCALING, 0.0, None)
    with pytest.raises(RuntimeError, match="seed"):
        ops.lora_matmul_fwd(x, weight, A, B, bias, SCALING, 0.1, torch.tensor([1]))
    with pytest.raises(RuntimeError, match="dB needs S"):
        backward((x, weight, A, B, bias, dy), None, 0.0, None)


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_opcheck(dropout_p):
    tensors, seed = problem(1100, 264, 328, 16), seed_for(dropout_p)
    x, weight, A, B, bias, dy = tensors
    _, S = forward(tensors, dropout_p, seed)
    for suffix in ("", "_pieces"):
        fwd, bwd = (getattr(ops, f"lora_matmul_{name}{suffix}").default for name in ("fwd", "bwd"))
        torch.library.opcheck(fwd, (x, weight, A, B, bias, SCALING, dropout_p, seed))
        torch.library.opcheck(bwd, (dy, x, weight, A, B, S, seed, SCALING, dropout_p, *ALL))


def test_a_compiled_step_is_the_eager_one():
    tensors, seed = problem(1100, 264, 328, 16), seed_for(0.1)
    compiled = torch.compile(lora_matmul_seeded, fullgraph=True)
    for a, b in zip(run(compiled, tensors, 0.1, seed), run(lora_matmul_seeded, tensors, 0.1, seed)):
        torch.testing.assert_close(a, b, rtol=0, atol=2**-7 * float(b.abs().max()))
