"""LoRA matmul of few tokens over an NF4 weight as it is stored: the op, and what its launches on a GPU may not do."""

from __future__ import annotations

import itertools

import pytest
import torch

from peftkern import QLoRALinear, lora_matmul, quantize_nf4
from peftkern.ops import backends
from peftkern.ops.lora_matmul import composed, reference
from peftkern.testing.checks import poisoned_memory
from peftkern.testing.launches import can_count_launches, launches
from peftkern.testing.nf4 import dense_nf4, random_nf4
from peftkern.testing.numerics import assert_within

ops = torch.ops.peftkern
HALVES = [torch.bfloat16, torch.float16]
SCALING = 1.7
REPEATS = 200

on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
on_hopper = pytest.mark.skipif(
    not torch.cuda.is_available()
    or torch.cuda.get_device_capability() != (9, 0)
    or backends()["lora_matmul_fwd_nf4"]["CUDA"] != "cuda",
    reason="both kernels are there on sm_90a alone",
)
CUDA = torch.device("cuda")


def adapter(N, K, r, dtype=torch.bfloat16, device=CUDA):
    A = torch.randn(r, K, device=device) * K**-0.5
    return A.to(dtype), (torch.randn(N, r, device=device) * r**-0.5).to(dtype)


def problem(M, N, K, r, dtype=torch.bfloat16, adapter_dtype=None, device=CUDA, bias=True, **nf4):
    """x, weight, lora_A, lora_B, bias"""
    x = (torch.randn(M, K, device=device) * 0.5).to(dtype)
    q = random_nf4((N, K), device=device, dtype=dtype, **nf4)
    A, B = adapter(N, K, r, adapter_dtype or dtype, device)
    return x, q, A, B, torch.randn(N, device=device).to(dtype) if bias else None


def forward(x, q, A, B, bias, settled=False, scaling=SCALING):
    """y, S"""
    sizes = (q.blocksize, q.nested_blocksize, q.shape[0])
    return ops.lora_matmul_fwd_nf4(x, *q.tensors(), A, B, bias, scaling, *sizes, settled)


def check(x, q, A, B, bias):
    """The error rule for y and S; returns them."""
    with poisoned_memory():
        y, S = forward(x, q, A, B, bias)
    wide = [None if t is None else t.double() for t in (x, A, B, bias)]
    assert_within(
        y,
        reference.formula(x, dense_nf4(q, x.dtype), A, B, SCALING, bias),
        reference.formula(wide[0], dense_nf4(q, torch.float64), wide[1], wide[2], SCALING, wide[3]),
        "y",
    )
    assert_within(S, x @ A.to(x.dtype).T, wide[0] @ wide[1].T, "S")
    return y, S


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("double_quant", [True, False])
def test_opcheck(dtype, double_quant, device):
    x, q, A, B, bias = problem(5, 40, 64, 3, dtype, torch.float32, device, double_quant=double_quant)
    sizes = (q.blocksize, q.nested_blocksize, q.shape[0])
    for op in (ops.lora_matmul_fwd_nf4.default, ops.lora_matmul_fwd_nf4_pieces.default):
        torch.library.opcheck(op, (x, *q.tensors(), A, B, bias, SCALING, *sizes, False))
        torch.library.opcheck(op, (x[:0], *q.tensors(), A, B, None, SCALING, *sizes, True))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("adapter_dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("r", [5, 16])
def test_adapters_of_any_dtype(r, adapter_dtype, dtype, device):
    for M in (1, 8, 16, 17, 64):
        check(*problem(M, 136, 320, r, dtype, adapter_dtype, device))


@pytest.mark.parametrize("nf4", [{"double_quant": False}, {"blocksize": 256}, {"blocksize": 32}], ids=str)
def test_weights_of_any_layout(nf4, device):
    for M in (3, 16, 40):
        check(*problem(M, 136, 320, 8, device=device, **nf4))


def test_strides_and_addresses(device):
    def shifted(t):
        return torch.empty(t.numel() + 1, dtype=t.dtype, device=device)[1:].view(t.shape).copy_(t)

    for M in (1, 16, 40):
        x, q, A, B, bias = problem(M, 136, 320, 16, device=device)
        expected = check(x, q, A, B, bias)
        wide = torch.empty(M, 640, dtype=x.dtype, device=device)[:, ::2].copy_(x)
        for got in (
            check(wide, q, A, B, bias),
            check(x, q, A.t().contiguous().t(), B.t().contiguous().t(), bias),
            check(x, q, A, shifted(B), shifted(bias)),
        ):
            assert all(torch.equal(a, b) for a, b in zip(got, expected))
        check(shifted(x), q, shifted(A), B, bias)


def test_composed_and_dispatched_agree(device):
    for M in (1, 16, 40):
        x, q, A, B, bias = problem(M, 136, 320, 16, device=device)
        sizes = (q.blocksize, q.nested_blocksize, q.shape[0])
        y, S = forward(x, q, A, B, bias)
        for other in (composed, reference):
            y2, S2 = other.lora_matmul_fwd_nf4(x, *q.tensors(), A, B, bias, SCALING, *sizes)
            torch.testing.assert_close(y, y2, rtol=0.03, atol=0.03)
            torch.testing.assert_close(S, S2, rtol=0.03, atol=0.03)


def test_bad_arguments_name_the_op():
    if not torch.cuda.is_available():
        pytest.skip("the CUDA op's checks")
    x, q, A, B, _ = problem(3, 64, 64, 4)
    for wrong in ({"A": A[:, :32]}, {"B": B[:, :2]}, {"B": B[:32]}, {"A": A.cpu()}, {"bias": A[0, :32]}):
        with pytest.raises(RuntimeError, match="lora_matmul_fwd_nf4"):
            forward(x, q, **{"A": A, "B": B, "bias": None, **wrong})


def test_the_function_tells_the_op_what_has_settled(device, monkeypatch):
    told = []
    op = ops.lora_matmul_fwd_nf4

    def recorder(*args):
        told.append(args[-1])
        return op(*args)

    monkeypatch.setattr(ops, "lora_matmul_fwd_nf4", recorder)
    layer = QLoRALinear(torch.nn.Linear(64, 48), 4).to(device)
    x = torch.randn(3, 64, device=device)
    with torch.no_grad():
        layer(x), layer(x)
        layer.lora_A.mul_(2)  # an adapter may change at any time
        layer(x)
        layer.base_layer.packed.zero_()
        layer(x), layer(x)
    assert told == [False, True, True, False, True]


def test_scaling_as_a_tensor_is_read_at_run_time(device):
    x, q, A, B, bias = problem(4, 136, 320, 8, device=device)
    scaling = torch.tensor(2.0, device=device, requires_grad=True)
    y = lora_matmul(x, q, A, B, scaling, bias=bias)
    torch.testing.assert_close(y, lora_matmul(x, q, A, B, 2.0, bias=bias), rtol=0.02, atol=0.02)
    y.float().sum().backward()
    expected = (x.float() @ A.float().T @ B.float().T).sum()
    torch.testing.assert_close(scaling.grad, expected, rtol=0.05, atol=0.5)


def test_a_forward_without_dropout_trains(device):
    """Gradients of the packed path are those of the dense one; nothing is saved but x, S and the packed weight."""
    for M in (1, 16, 40):
        x, q, A, B, bias = problem(M, 136, 320, 16, torch.bfloat16, torch.float32, device)
        grads = []
        for weight in (q, dense_nf4(q, torch.bfloat16)):
            leaves = [t.clone().requires_grad_() for t in (x, A, B, bias)]
            y = lora_matmul(leaves[0], weight, *leaves[1:3], SCALING, bias=leaves[3], dropout_p=0.5)
            grads.append(torch.autograd.grad(y, leaves, torch.ones_like(y)))
        for a, b in zip(*grads):
            torch.testing.assert_close(a, b, rtol=0.03, atol=0.03 * b.abs().max().item())


# ---- On a GPU


@on_hopper
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("M", [1, 2, 7, 8, 9, 15, 16, 17, 24, 31, 32, 33, 47, 63, 64])
def test_tokens_and_ranks(M, dtype):
    for r in (1, 3, 8, 15, 16, 17, 31, 64, 100, 128, 130, 256):
        check(*problem(M, 264, 320, r, dtype, torch.float32 if r % 2 else None, bias=r % 3 == 0))


@on_hopper
@pytest.mark.parametrize("M", [1, 8, 13, 16, 20, 32, 50, 64])
def test_shapes(M):
    for N, K in itertools.product((8, 40, 1000, 4096), (64, 192, 4096, 8256)):
        check(*problem(M, N, K, 16))
    for N in (1, 37, 1001):  # up to 32 tokens; above, in pieces
        check(*problem(M, N, 384, 12))


@on_hopper
@pytest.mark.parametrize("M", [1, 16, 32, 64])
def test_one_launch_and_no_copies(M):
    if not can_count_launches():
        pytest.skip("the profiler sees no kernels here")
    tensors = problem(M, 1024, 1024, 16, adapter_dtype=torch.float32)
    names = launches(lambda: forward(*tensors))
    assert len(names) == 1, names
    assert ("small_m" if M <= 16 else "mid_m") in names[0]


@on_hopper
@pytest.mark.parametrize("M", [1, 8, 16, 32, 64])
def test_results_repeat_bitwise(M):
    tensors = problem(M, 4096, 4096, 64)
    expected = forward(*tensors)
    for i in range(REPEATS):
        got = forward(*tensors, settled=i % 2 == 0)
        assert all(torch.equal(a, b) for a, b in zip(got, expected)), f"round {i}"


@on_cuda
@pytest.mark.parametrize("M", [1, 8, 16, 32, 64])
def test_a_graph_replays_with_new_values(M):
    layer = QLoRALinear(torch.nn.Linear(512, 256, device=CUDA, dtype=torch.bfloat16), 16).eval()
    x = torch.randn(M, 512, dtype=torch.bfloat16, device=CUDA)
    with torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            layer(x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        for _ in range(3):
            x.normal_()
            layer.lora_A.normal_(std=0.05)
            layer.lora_B.normal_()
            layer.base_layer.packed.random_(0, 256)
            y.fill_(float("nan"))
            graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(y, layer(x))


@on_cuda
@pytest.mark.parametrize("M", [1, 8, 16, 32, 64])
@pytest.mark.parametrize("last", ["x", "A", "B", "codes"])
def test_right_behind_a_writer(M, last):
    """A launch starts before its predecessors end: it must not read what those still write."""
    variants = [problem(M, 2048, 2048, 16, bias=False, seed=seed) for seed in range(4)]
    expected = []
    for tensors in variants:
        torch.cuda.synchronize()
        expected.append(forward(*tensors))
        torch.cuda.synchronize()
    x, q, A, B, _ = variants[0]
    x, q, A, B = x.clone(), q.clone(), A.clone(), B.clone()
    results = []
    for i in range(REPEATS):
        new_x, new_q, new_A, new_B, _ = variants[i % 4]
        writes = {
            "codes": lambda new_q=new_q: [a.copy_(b) for a, b in zip(q.tensors(), new_q.tensors())][::-1],
            "A": lambda new_A=new_A: A.copy_(new_A),
            "B": lambda new_B=new_B: B.copy_(new_B),
            "x": lambda new_x=new_x: x.copy_(new_x),
        }
        for name in sorted(writes, key=lambda name: name == last):
            writes[name]()
        results.append(forward(x, q, A, B, None))
    torch.cuda.synchronize()
    for i, result in enumerate(results):
        assert all(torch.equal(a, b) for a, b in zip(result, expected[i % 4])), f"round {i}"


@on_cuda
@pytest.mark.parametrize("M", [1, 8, 16, 32, 64])
def test_a_chain_of_settled_layers_that_reuse_each_others_memory(M):
    """Every output is the next input and is freed at once; adapters change on the way, weights now and then."""
    weights = [random_nf4((2048, 2048), device=CUDA, seed=seed) for seed in range(3)]
    adapters = [adapter(2048, 2048, r) for r in (16, 64, 5)]
    start = torch.randn(M, 2048, device=CUDA).to(torch.bfloat16) * 0.01

    def chain(wait: bool) -> list[torch.Tensor]:
        qs = [q.clone() for q in weights]
        As, Bs = ([pair[i].clone() for pair in adapters] for i in range(2))
        results, x = [], start
        for i in range(REPEATS):
            j = i % 3
            if i % 12 == 0:
                x = start
            if i % 7 == 3:
                As[j].mul_(-1)
            if i % 11 == 5:
                qs[j].packed.copy_(weights[i % 2].packed)
            x = lora_matmul(x, qs[j], As[j], Bs[j], 0.1)
            results.append(x.sum(dtype=torch.float64) if i % 5 == 0 else x)
            if wait:
                torch.cuda.synchronize()
        return results

    expected = chain(True)
    for _ in range(5):
        for i, (a, b) in enumerate(zip(chain(False), expected)):
            assert torch.equal(a, b), f"layer {i}"


@on_cuda
@pytest.mark.parametrize("M", [1, 16, 64])
def test_several_streams_at_once(M):
    """Launches of different streams share nothing."""
    streams = [torch.cuda.Stream() for _ in range(4)]
    tensors = [problem(M, 4096, 2048, 64, bias=False, seed=seed) for seed in range(4)]
    expected = [forward(*t) for t in tensors]
    torch.cuda.synchronize()
    for _ in range(20):
        results = []
        for stream, t in zip(streams, tensors):
            with torch.cuda.stream(stream):
                results.append([forward(*t, settled=True) for _ in range(5)])
        torch.cuda.synchronize()
        for got, want in zip(results, expected):
            assert all(torch.equal(a, b) for pair in got for a, b in zip(pair, want))


@on_cuda
@pytest.mark.parametrize("M", [1, 16, 64])
def test_graphs_of_one_capture_stream_replay_at_once(M):
    """What a launch counts in belongs to its graph, not to the stream of its capture."""
    tensors = [problem(M, 2048, 2048, 64, bias=False, seed=seed) for seed in range(4)]
    expected = [forward(*t) for t in tensors]
    capture = torch.cuda.Stream()
    graphs, results = [], []
    for t in tensors:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=capture):
            results.append([forward(*t, settled=True) for _ in range(10)])
        graphs.append(graph)
    streams = [torch.cuda.Stream() for _ in graphs]
    torch.cuda.synchronize()
    for _ in range(20):
        for graph, stream in zip(graphs, streams):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    for got, want in zip(results, expected):
        assert all(torch.equal(a, b) for pair in got for a, b in zip(pair, want))


def more_captures_than_counters(rank: int, M: int) -> None:
    tensors = problem(M, 64, 64, 16, bias=False)
    expected = forward(*tensors)
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(graph):
        for _ in range(1 << 15):
            forward(*tensors)
    del graph
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = forward(*tensors)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # that had none yet
        other = forward(*tensors)
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for result in (got, other) for a, b in zip(result, expected))


@on_hopper
@pytest.mark.parametrize("M", [1, 64])
def test_a_program_of_many_graphs_runs_out_of_counters_and_goes_on(M):
    torch.multiprocessing.spawn(more_captures_than_counters, (M,))


def test_quantized_weights_too(device):
    weight = torch.randn(136, 320, device=device) * 0.02
    x, _, A, B, bias = problem(9, 136, 320, 16, device=device)
    check(x, quantize_nf4(weight.to(torch.bfloat16)), A, B, bias)
