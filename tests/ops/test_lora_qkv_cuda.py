"""What the CUDA kernel computes for several LoRA layers on one x in a launch: values, subsets, launches, memory."""

from __future__ import annotations

import itertools

import pytest
import torch
from lora_cuda import CUDA, SCALING, needs_the_kernel, normal

from peftkern import LoRAProjection, quantize_nf4
from peftkern.ops import backends
from peftkern.ops._projection import pack
from peftkern.ops.lora_qkv import fused, reference
from peftkern.ops.lora_qkv.function import lora_qkv_seeded
from peftkern.testing.checks import poisoned_memory
from peftkern.testing.launches import can_count_launches, launches
from peftkern.testing.numerics import assert_within, to_float64

pytestmark = needs_the_kernel

# M, K, N, ranks. Tiles: 128 tokens x 256 outs, 64 deep; 128 features; fused jobs of 256 tokens by up to 16 blocks.
PROBLEMS = [
    (1024, 256, (256, 256, 256), (16, 16, 16)),
    (1300, 328, (264, 72, 72), (16, 16, 16)),
    (2999, 456, (760, 8, 264), (8, 16, 8)),
    (9001, 264, (328, 136), (16, 8)),
    (1100, 520, (72, 264, 328, 8), (16, 16, 16, 16)),
    (1025, 8, (8, 8), (8, 8)),
    (1100, 328, (264, 72, 136), (16, 0, 16)),
    (1100, 328, (264, 72, 136), (0, 0, 24)),
    (1300, 328, (264, 136, 72), (32, 8, 24)),
    (1300, 456, (264, 136, 72), (40, 40, 48)),
    (2049, 456, (264, 136), (64, 64)),
    (8200, 72, (12288, 12296), (16, 16)),  # too many outs to be fused
]


@pytest.fixture(autouse=True)
def counted(monkeypatch):
    """Calls of the fused passes: a test that composed its result would show nothing here."""
    calls = {"fwd": 0, "bwd": 0}

    def count(name, function):
        def call(*args):
            calls[name] += 1
            return function(*args)

        return call

    monkeypatch.setattr(fused, "lora_qkv_fwd", count("fwd", fused.lora_qkv_fwd))
    monkeypatch.setattr(fused, "lora_qkv_bwd", count("bwd", fused.lora_qkv_bwd))
    return calls


def problem(M, K, N, ranks, dtype=torch.bfloat16, adapter_dtype=None, nf4=False, bias=True):
    """x, projections, dys"""
    adapter_dtype = adapter_dtype or dtype
    group = []
    for i, (n, r) in enumerate(zip(N, ranks)):
        weight = normal(n, K, dtype=dtype, std=K**-0.5)
        A = normal(r, K, dtype=adapter_dtype, std=K**-0.5) if r else None
        B = normal(n, r, dtype=adapter_dtype, std=r**-0.5 / SCALING) if r else None
        own_bias = normal(n, dtype=dtype, std=0.1) if bias else None
        group.append(LoRAProjection(quantize_nf4(weight) if nf4 else weight, A, B, SCALING / (i + 1), own_bias))
    return normal(M, K, dtype=dtype), group, [normal(M, n, dtype=dtype) for n in N]


def run(function, x, group, dys, wanted=None):
    """ys, then gradients of x and of every lora_A, lora_B and bias that is `wanted` (by place; all by default)."""
    leaves = [x, *(t for p in group for t in (p.lora_A, p.lora_B, p.bias) if t is not None)]
    wanted = range(len(leaves)) if wanted is None else wanted
    leaves = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(leaves)]
    own = iter(leaves[1:])
    changed = [
        LoRAProjection(
            p.weight,
            None if p.lora_A is None else next(own),
            None if p.lora_B is None else next(own),
            p.scaling,
            None if p.bias is None else next(own),
        )
        for p in group
    ]
    ys = function(leaves[0], changed)
    return [*ys, *torch.autograd.grad(ys, [t for t in leaves if t.requires_grad], dys, allow_unused=True)]


def check(x, group, dys):
    """The error rule; returns what the op gave."""
    with poisoned_memory():
        got = run(lora_qkv_seeded, x, group, dys)
    eager = run(reference.formula, x, group, dys)
    truth = run(reference.formula, *to_float64((x, group, dys)))
    for i, values in enumerate(zip(got, eager, truth)):
        assert_within(*values, f"result {i}")
    return got


@pytest.mark.parametrize(("M", "K", "N", "ranks"), PROBLEMS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_shapes_and_ranks(dtype, M, K, N, ranks, counted):
    check(*problem(M, K, N, ranks, dtype))
    assert counted == {"fwd": 1, "bwd": 1}


@pytest.mark.parametrize("ranks", [(16, 16, 8), (32, 8, 64)], ids=str)
@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.float16], ids=str)
def test_adapters_of_another_dtype(adapter_dtype, ranks, counted):
    got = check(*problem(1300, 328, (264, 72, 136), ranks, adapter_dtype=adapter_dtype))
    assert got[4].dtype == got[5].dtype == adapter_dtype
    assert counted == {"fwd": 1, "bwd": 1}


@pytest.mark.parametrize("ranks", [(16, 16, 8), (16, 0, 8), (0, 32, 64), (16, 8, 64)], ids=str)
@pytest.mark.parametrize("M", [1300, 2999])
def test_nf4_weights(M, ranks, counted):
    x, group, dys = problem(M, 328, (264, 72, 136), ranks, nf4=True)
    dense = [LoRAProjection(p.weight.dequantize().to(x.dtype), p.lora_A, p.lora_B, p.scaling, p.bias) for p in group]
    with poisoned_memory():
        got = run(lora_qkv_seeded, x, group, dys)
    assert counted == {"fwd": 1, "bwd": 1}
    eager, truth = run(reference.formula, x, dense, dys), run(reference.formula, *to_float64((x, dense, dys)))
    want = run(lora_qkv_seeded, x, dense, dys)
    assert all(torch.equal(a, b) for a, b in zip(got[:3], want))  # y, of the same products in the same order
    for i, values in enumerate(zip(got, eager, truth)):
        assert_within(*values, f"result {i}")


def test_strided_operands(counted):
    x, group, dys = problem(1100, 328, (264, 72, 136), (16, 8, 16))
    expected = check(x, group, dys)
    strided = [
        LoRAProjection(p.weight, p.lora_A.t().contiguous().t(), p.lora_B.t().contiguous().t(), p.scaling, p.bias)
        for p in group
    ]
    padded = [torch.nn.functional.pad(dy, (0, 3))[:, : dy.shape[1]] for dy in dys]
    for got, want in zip(run(lora_qkv_seeded, x.t().contiguous().t(), strided, padded), expected):
        assert torch.equal(got, want)
    assert counted == {"fwd": 2, "bwd": 2}


@pytest.mark.parametrize("nf4", [False, True])
@pytest.mark.parametrize(
    "wanted", [(0,), (1,), (2, 5), (0, 4), (0, 1, 2), (0, 7, 8), (1, 4, 7), (2, 5, 8), (3, 6)], ids=str
)
def test_any_subset_of_gradients(wanted, nf4):
    x, group, dys = problem(1300, 328, (264, 72, 136), (16, 16, 8), nf4=nf4)
    some = run(lora_qkv_seeded, x, group, dys, wanted)
    eager = run(reference.formula, x, group, dys)
    truth = run(reference.formula, *to_float64((x, group, dys)))
    for got, i in zip(some[3:], wanted):
        assert_within(got, eager[3 + i], truth[3 + i], f"gradient {i}")


def test_an_infinite_projection_stays_its_own(counted):
    """S of one projection overflows in float16: the others never see it."""
    x, group, _ = problem(1100, 328, (264, 72, 136), (16, 16, 16), torch.float16)
    big = group[1]
    group[1] = LoRAProjection(big.weight, big.lora_A * 3e4, big.lora_B, big.scaling, big.bias)
    ys = lora_qkv_seeded(x * 100, group)
    assert not ys[1].isfinite().all()
    assert ys[0].isfinite().all()
    assert ys[2].isfinite().all()
    assert counted["fwd"] == 1


@pytest.mark.parametrize("ranks", [(16, 16, 16), (32, 32, 64)], ids=str)
@pytest.mark.parametrize("nf4", [False, True])
def test_runs_are_bitwise_equal(nf4, ranks):
    tensors = problem(2999, 1096, (1032, 264, 264), ranks, nf4=nf4)
    first = run(lora_qkv_seeded, *tensors)
    for i in range(200):
        for a, b in zip(first, run(lora_qkv_seeded, *tensors)):
            assert torch.equal(a, b), f"run {i}"


@pytest.mark.parametrize("nf4", [False, True])
def test_launches(nf4):
    """Two a pass; with NF4 weights three a projection."""
    if not can_count_launches():
        pytest.skip("the profiler sees no kernels here")
    x, group, _ = problem(1100, 328, (264, 72, 136), (16, 16, 16), nf4=nf4, bias=False)
    found = launches(lambda: lora_qkv_seeded(x, group))
    assert sum("lora_gemm" in name for name in found) == (3 if nf4 else 1), found
    assert len(found) == (9 if nf4 else 2), found


@pytest.mark.parametrize("nf4", [False, True])
def test_memory_beside_the_results(nf4):
    M, K = 8192, 2048
    x, group, dys = problem(M, K, (2048, 2048, 2048), (16, 16, 16), nf4=nf4, bias=False)
    leaves = [x.requires_grad_()] + [t.requires_grad_() for p in group for t in (p.lora_A, p.lora_B)]

    def extra(call):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results = call()
        return torch.cuda.max_memory_allocated() - before - sum(t.nbytes for t in results), results

    scratch = 2048 * K * 2 if nf4 else 0
    for _ in range(2):
        forward_extra, ys = extra(lambda: lora_qkv_seeded(x, group))
        backward_extra, _ = extra(lambda: torch.autograd.grad(ys, leaves, dys))  # noqa: B023
    assert forward_extra < scratch + (4 << 20)
    assert backward_extra < scratch + (16 << 20)


@pytest.mark.parametrize("nf4", [False, True])
def test_dx_is_added_to_a_sum(nf4, counted):
    """Bitwise, of dense weights: rounded once, then added and rounded again. With NF4 weights for each layer."""
    x, group, dys = problem(1300, 328, (264, 72, 136), (16, 8, 16), nf4=nf4)
    lora_A, lora_B, _, scalings, pieces, layouts = pack(group, x)
    S = normal(1300, 40)
    args = (dys, x, pieces, layouts, lora_A, lora_B, S, None, scalings, 0.0)
    needs = [True] * 3, [True] * 3
    with poisoned_memory():
        dx, *grads = torch.ops.peftkern.lora_qkv_bwd(*args, True, *needs)
        before = normal(*x.shape)
        total = before.clone()
        added = torch.ops.peftkern.lora_qkv_bwd_add(*args, *needs, total)
    assert counted["bwd"] == 2
    if nf4:
        torch.testing.assert_close(total, before + dx, rtol=0.03, atol=0.1)
    else:
        assert torch.equal(total, before + dx)
    for got, want in zip(added, grads):
        assert all(torch.equal(a, b) for a, b in zip(got, want))


def test_what_is_composed(counted):
    x, group, dys = problem(1300, 328, (264, 72, 136), (16, 16, 16))
    mixed = [*group[:2], LoRAProjection(group[2].weight, group[2].lora_A.float(), group[2].lora_B)]
    run(lora_qkv_seeded, x, mixed, dys)
    run(lora_qkv_seeded, x[:1000], group, [dy[:1000] for dy in dys])
    run(lora_qkv_seeded, x, group[:1], dys[:1])
    run(lambda *args: lora_qkv_seeded(*args, dropout_p=0.1, seeds=torch.arange(3, device=CUDA)), x, group, dys)
    assert counted == {"fwd": 0, "bwd": 0}
    assert backends()["lora_group_fwd"]["CUDA"] == "cuda"


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=2)), ids=str)
def test_graphs(needs):
    """Captured with new values in the same tensors."""
    nf4, small = needs
    x, group, dys = problem(1100, 328, (264, 72, 136), (16, 16, 16) if small else (32, 32, 32), nf4=nf4)
    run(lora_qkv_seeded, x, group, dys)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run(lora_qkv_seeded, x, group, dys)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(lora_qkv_seeded, x, group, dys)
    x.normal_()
    for dy in dys:
        dy.normal_()
    graph.replay()
    for got, want in zip(captured, run(lora_qkv_seeded, x, group, dys)):
        assert torch.equal(got, want)
