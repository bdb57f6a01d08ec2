"""How LoRA matmul's CUDA kernel behaves: repeated, in streams and graphs, in memory, beside the kernels around it."""

from __future__ import annotations

import pytest
import torch
from lora_cuda import backward, both, check, forward, needs_the_kernel, problem, seed_for

from peftkern.testing.launches import can_count_launches, launches

pytestmark = needs_the_kernel

RUNS = 200


def synchronized(call):
    torch.cuda.synchronize()
    result = call()
    torch.cuda.synchronize()
    return result


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize(("M", "N", "K", "r"), [(2999, 1032, 1096, 16), (2999, 1032, 1096, 64), (1536, 2056, 4104, 16)])
def test_runs_are_bitwise_equal(M, N, K, r, dropout_p):
    tensors, seed = problem(M, N, K, r), seed_for(dropout_p)
    first = both(tensors, dropout_p, seed)
    for i in range(RUNS):
        for a, b in zip(first, both(tensors, dropout_p, seed)):
            assert torch.equal(a, b), f"run {i}"


def test_launches_that_share_the_multiprocessors():
    """Blocks wait for others of their launch, which may start late."""
    problems = [problem(1536, 2056, 4104, 16), problem(1100, 520, 2056, 16), problem(2999, 1032, 1096, 16)]
    expected = [synchronized(lambda tensors=tensors: both(tensors, 0.0, None)) for tensors in problems]
    streams = [torch.cuda.Stream() for _ in problems]
    for _ in range(20):
        results = []
        for tensors, stream in zip(problems, streams):
            with torch.cuda.stream(stream):
                results.append(both(tensors, 0.0, None))
        torch.cuda.synchronize()
        for got, want in zip(results, expected):
            assert all(torch.equal(a, b) for a, b in zip(got, want))


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_two_launches_each(dropout_p):
    if not can_count_launches():
        pytest.skip("the profiler sees no kernels here")
    tensors, seed = problem(1100, 264, 328, 16), seed_for(dropout_p)
    _, S = forward(tensors, dropout_p, seed)
    for call in (lambda: forward(tensors, dropout_p, seed), lambda: backward(tensors, S, dropout_p, seed)):
        found = launches(call)
        assert len(found) == 2, found
        assert "lora_prepare" in found[0]
        assert "lora_gemm" in found[1]


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_nothing_of_the_size_of_x_is_allocated(dropout_p):
    M, N, K = 16384, 4096, 4096
    tensors, seed = problem(M, N, K, 16), seed_for(dropout_p)
    both(tensors, dropout_p, seed)

    def extra(call):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results = call()
        peak = torch.cuda.max_memory_allocated() - before
        return peak - sum(t.nbytes for t in results), results

    forward_extra, (_, S) = extra(lambda: forward(tensors, dropout_p, seed))
    backward_extra, _ = extra(lambda: backward(tensors, S, dropout_p, seed))
    assert max(forward_extra, backward_extra) < M * K // 2, "half a byte for each element of x"


def test_thousands_of_calls_hold_no_memory():
    tensors = problem(1024, 256, 256, 16)
    both(tensors, 0.0, None)
    before = torch.cuda.memory_allocated()
    for _ in range(2000):
        both(tensors, 0.0, None)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_work_goes_to_the_current_stream(dropout_p):
    """Behind a long wait on the same stream; anything that ran elsewhere would read the old values."""
    tensors, new = problem(1100, 264, 328, 16), problem(1100, 264, 328, 16)
    seed = seed_for(dropout_p)
    expected = synchronized(lambda: both(new, dropout_p, seed))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        for old, fresh in zip(tensors, new):
            old.copy_(fresh)
        got = both(tensors, dropout_p, seed)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, expected))


@pytest.mark.parametrize("last", range(6))
def test_a_call_right_behind_a_writer_reads_what_it_wrote(last):
    """A kernel launched before its predecessor ends must not load what that one writes, whichever argument it is."""
    sources = [problem(2048, 1024, 1024, 16, adapter_dtype=torch.float32) for _ in range(3)]
    expected = [synchronized(lambda s=s: both(s, 0.1, seed_for(0.1))) for s in sources]
    tensors, seed, results = [t.clone() for t in sources[0]], seed_for(0.1), []
    for i in range(RUNS // 4):
        order = [j for j in range(6) if j != last] + [last]
        for j in order:
            tensors[j].copy_(sources[i % 3][j])
        results.append(both(tensors, 0.1, seed))
    torch.cuda.synchronize()
    for i, got in enumerate(results):
        assert all(torch.equal(a, b) for a, b in zip(got, expected[i % 3])), f"round {i}"


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_a_chain_of_calls_that_reuse_each_others_memory(dropout_p):
    """Results are freed as soon as the next call is launched, so outputs land where the kernel before still reads."""
    x, *rest = problem(2048, 1024, 1024, 16)
    seed = seed_for(dropout_p)

    def chain(wait):
        z = x
        for _ in range(RUNS // 4):
            y, S, dx, dA, dB = both((z, *rest), dropout_p, seed)
            z = (y + dx) * 0.25
            if wait:
                torch.cuda.synchronize()
        return z, S, dA, dB

    expected = chain(True)
    assert expected[0].isfinite().all()
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(chain(False), expected))


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_graph_replays_with_new_data(adapter_dtype, dropout_p):
    tensors, seed = problem(1100, 264, 328, 16, adapter_dtype=adapter_dtype), seed_for(dropout_p)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        both(tensors, dropout_p, seed)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both(tensors, dropout_p, seed)
    for i in range(1, 4):
        for old, new in zip(tensors, problem(1100, 264, 328, 16, adapter_dtype=adapter_dtype)):
            old.copy_(new)
        if seed is not None:
            seed.fill_(i)
        for t in captured:
            t.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(captured, both(tensors, dropout_p, seed)))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_the_second_gpu(dropout_p):
    """Neither the current device nor its stream may be used for tensors that live elsewhere."""
    other = torch.device("cuda", 1)
    with torch.cuda.device(0):
        got = check(problem(1100, 264, 328, 16, device=other), dropout_p, seed_for(dropout_p, other))
        assert torch.cuda.current_device() == 0
    assert all(t.device == other for t in got)
