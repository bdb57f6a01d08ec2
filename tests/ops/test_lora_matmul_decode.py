"""LoRA matmul's passes over an NF4 weight that they decode themselves, on Hopper beside the product."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from lora_cuda import SCALING, problem, seed_for

from peftkern import nf4_matmul, quantize_nf4
from peftkern.testing.checks import poisoned_memory
from peftkern.testing.launches import can_count_launches, launches

ops = torch.ops.peftkern
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA"))]
needs_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
)


def nf4_problem(M, N, K, r, device, dtype=torch.bfloat16, blocksize=64, double_quant=True):
    x, weight, A, B, bias, dy = problem(M, N, K, r, dtype=dtype, device=torch.device(device))
    q = quantize_nf4(weight, blocksize=blocksize, double_quant=double_quant)
    return x, q, A, B, bias, dy


def decoded(q, dtype):
    weight = torch.empty(q.shape, dtype=dtype, device=q.device)
    ops.nf4_dequantize_out(*q.tensors(), q.blocksize, q.nested_blocksize, weight)
    return weight


def passes(tensors, dropout_p, seed):
    """y, S, dx, dA, dB and what both passes leave as the weight."""
    x, q, A, B, bias, dy = tensors
    sizes = q.blocksize, q.nested_blocksize
    with poisoned_memory():
        weights = [torch.full(q.shape, torch.nan, dtype=x.dtype, device=x.device) for _ in range(2)]
        y, S = ops.lora_matmul_fwd_decode(x, *q.tensors(), A, B, bias, SCALING, dropout_p, seed, *sizes, weights[0])
        grads = ops.lora_matmul_bwd_decode(
            dy, x, *q.tensors(), A, B, S, seed, SCALING, dropout_p, True, True, *sizes, weights[1]
        )
    return (y, S, *grads), weights


def check(tensors, dropout_p=0.0):
    """Bit for bit what the passes over the dense weight give."""
    x, q, A, B, bias, dy = tensors
    seed = seed_for(dropout_p, device=x.device)
    got, weights = passes(tensors, dropout_p, seed)
    dense = decoded(q, x.dtype)
    for weight in weights:
        assert torch.equal(weight, dense)
    y, S = ops.lora_matmul_fwd(x, dense, A, B, bias, SCALING, dropout_p, seed)
    want = y, S, *ops.lora_matmul_bwd(dy, x, dense, A, B, S, seed, SCALING, dropout_p, True, True, True)
    for name, a, b in zip(("y", "S", "dx", "dA", "dB"), got, want):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_bits_are_those_of_the_dense_weight(dropout_p, device):
    check(nf4_problem(80, 96, 64, 4, device, dtype=torch.float32), dropout_p)


@needs_hopper
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("r", [8, 16, 32, 64, 128, 256])
@pytest.mark.parametrize(
    ("M", "N", "K"),
    [(1024, 8, 256), (1100, 776, 1280), (1300, 1032, 520), (2999, 264, 2304), (8192, 4096, 4096), (4096, 11008, 512)],
    ids=str,
)
def test_shapes(M, N, K, r, dropout_p):
    check(nf4_problem(M, N, K, r, "cuda"), dropout_p)


@needs_hopper
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("blocksize", [32, 64, 128, 256, 512, 4096])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_blocks(dtype, blocksize, double_quant):
    check(nf4_problem(1500, 1040, 1024, 16, "cuda", dtype, blocksize, double_quant))


@needs_hopper
def test_packed_bytes_at_any_address():
    x, q, *rest = nf4_problem(1100, 264, 512, 16, "cuda")
    memory = torch.empty(q.packed.numel() + 16, dtype=torch.uint8, device="cuda")
    for offset in (4, 6, 7):
        packed = memory[offset : offset + q.packed.numel()].view_as(q.packed)
        packed.copy_(q.packed)
        moved = dataclasses.replace(q, packed=packed)
        check((x, moved, *rest))


@needs_hopper
def test_runs_are_bitwise_equal():
    tensors = nf4_problem(2999, 1032, 1280, 16, "cuda")
    first, _ = passes(tensors, 0.0, None)
    for i in range(200):
        for a, b in zip(first, passes(tensors, 0.0, None)[0]):
            assert torch.equal(a, b), f"run {i}"


@needs_hopper
def test_two_streams_share_the_card():
    """Launches of which neither has all multiprocessors end, and right."""
    tensors = [nf4_problem(2048, 4096, 2048, 16, "cuda") for _ in range(2)]
    want = [passes(t, 0.0, None)[0] for t in tensors]
    streams = [torch.cuda.Stream() for _ in tensors]
    torch.cuda.synchronize()
    got = [[], []]
    for _ in range(20):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                got[i].append(passes(tensors[i], 0.0, None)[0])
    torch.cuda.synchronize()
    for i, runs in enumerate(got):
        for run in runs:
            for a, b in zip(want[i], run):
                assert torch.equal(a, b)


@needs_hopper
def test_two_launches_a_pass():
    if not can_count_launches():
        pytest.skip("the profiler sees no kernels here")
    x, q, A, B, bias, _ = nf4_problem(1100, 264, 512, 16, "cuda")
    sizes, memory = (q.blocksize, q.nested_blocksize), decoded(q, x.dtype)
    args = A, B, bias, SCALING, 0.0, None, *sizes, memory
    found = launches(lambda: ops.lora_matmul_fwd_decode(x, *q.tensors(), *args))
    assert ["lora_prepare" in name for name in found] == [True, False], found


@needs_hopper
@pytest.mark.parametrize("dx", [False, True])
def test_a_matmul_without_an_adapter(dx):
    """The package's GEMM for many tokens, as nf4_matmul uses it."""
    x, q, _, _, bias, dy = nf4_problem(8192, 4096, 2048, 16, "cuda")
    dense = decoded(q, x.dtype)
    if dx:
        got = ops.nf4_matmul_dx(dy, *q.tensors(), q.blocksize, q.nested_blocksize, q.shape[1])
        torch.testing.assert_close(got, dy @ dense, rtol=2e-2, atol=2e-2)
    else:
        torch.testing.assert_close(nf4_matmul(x, q, bias), torch.addmm(bias, x, dense.T), rtol=2e-2, atol=2e-2)


@needs_hopper
def test_a_graph_replays():
    x, q, A, B, bias, dy = nf4_problem(2048, 1032, 1280, 16, "cuda")
    want = [t.clone() for t in passes((x, q, A, B, bias, dy), 0.0, None)[0]]
    sizes = q.blocksize, q.nested_blocksize
    memory = torch.empty(q.shape, dtype=x.dtype, device="cuda")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, S = ops.lora_matmul_fwd_decode(x, *q.tensors(), A, B, bias, SCALING, 0.0, None, *sizes, memory)
        grads = ops.lora_matmul_bwd_decode(dy, x, *q.tensors(), A, B, S, None, SCALING, 0.0, True, True, *sizes, memory)
    for _ in range(3):
        memory.fill_(torch.nan)
        graph.replay()
        for a, b in zip((y, S, *grads), want):
            assert torch.equal(a, b)


@pytest.mark.parametrize("device", DEVICES)
def test_memory_of_another_kind_is_an_error(device):
    x, q, A, B, bias, _ = nf4_problem(80, 96, 64, 4, device, dtype=torch.float32)
    args = x, *q.tensors(), A, B, bias, SCALING, 0.0, None, q.blocksize, q.nested_blocksize
    for wrong in (torch.empty(96, 32, device=device), torch.empty(96, 64, device=device).T.contiguous().T):
        with pytest.raises(RuntimeError):
            ops.lora_matmul_fwd_decode(*args, wrong)
