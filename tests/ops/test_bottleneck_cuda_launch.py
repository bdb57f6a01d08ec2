"""How the bottleneck's CUDA kernels behave: repeated, in streams and graphs, in memory, beside other kernels."""

from __future__ import annotations

import pytest
import torch
from bottleneck_cuda import backward, both, forward, needs_the_kernels, problem, seed_for

from peftkern.testing.launches import can_count_launches, launches

pytestmark = needs_the_kernels

RUNS = 200
SHAPES = [(700, 1032, 40), (2300, 4096, 64), (2300, 8192, 64), (700, 512, 8)]


def synchronized(call):
    torch.cuda.synchronize()
    result = call()
    torch.cuda.synchronize()
    return result


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_runs_are_bitwise_equal(shape):
    tensors, seed = problem(*shape), seed_for(0.1)
    first = both(tensors, 0.1, seed)
    for i in range(RUNS):
        for a, b in zip(first, both(tensors, 0.1, seed)):
            assert torch.equal(a, b), f"run {i}"


def test_one_launch_forward_and_two_backward():
    if not can_count_launches():
        pytest.skip("the profiler sees no kernels here")
    tensors, seed = problem(1100, 1024, 64), seed_for(0.1)
    _, h = forward(tensors, 0.1, seed)
    assert ["adapter_kernel" in name for name in launches(lambda: forward(tensors, 0.1, seed))] == [True]
    found = launches(lambda: backward(tensors, h, 0.1, seed))
    assert len(found) == 2, found
    assert "adapter_kernel" in found[0]
    assert "adapter_gradients" in found[1]


def test_nothing_of_the_size_of_x_is_allocated():
    M, H, b = 8192, 4096, 64
    tensors = problem(M, H, b)
    both(tensors)

    def extra(call):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results = call()
        return torch.cuda.max_memory_allocated() - before - sum(t.nbytes for t in results), results

    forward_extra, (_, h) = extra(lambda: forward(tensors))
    backward_extra, _ = extra(lambda: backward(tensors, h))
    assert forward_extra < 2**21
    assert backward_extra < M * H // 2, "half a byte for each element of x"


def test_work_goes_to_the_current_stream():
    """Behind a long wait on the same stream; anything that ran elsewhere would read the old values."""
    tensors, new = problem(1100, 1024, 64), problem(1100, 1024, 64)
    expected = synchronized(lambda: both(new))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        for old, fresh in zip(tensors, new):
            old.copy_(fresh)
        got = both(tensors)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, expected))


@pytest.mark.parametrize("last", range(6))
def test_a_call_right_behind_a_writer_reads_what_it_wrote(last):
    """A kernel launched before its predecessor ends must not load what that one writes, whichever argument it is."""
    sources = [problem(2048, 1024, 64, adapter_dtype=torch.float32) for _ in range(3)]
    expected = [synchronized(lambda s=s: both(s, 0.1, seed_for(0.1))) for s in sources]
    tensors, seed, results = [t.clone() for t in sources[0]], seed_for(0.1), []
    for i in range(RUNS // 4):
        for j in [*(j for j in range(6) if j != last), last]:
            tensors[j].copy_(sources[i % 3][j])
        results.append(both(tensors, 0.1, seed))
    torch.cuda.synchronize()
    for i, got in enumerate(results):
        assert all(torch.equal(a, b) for a, b in zip(got, expected[i % 3])), f"round {i}"


def test_a_chain_of_calls_that_reuse_each_others_memory():
    """Results are freed as soon as the next call is launched, so outputs land where the kernel before still reads."""
    x, *rest = problem(2048, 1024, 64)

    def chain(wait):
        z = x
        for _ in range(RUNS // 4):
            y, h, dx, *grads = both((z, *rest))
            z = (y + dx) * 0.25
            if wait:
                torch.cuda.synchronize()
        return z, h, *grads

    expected = chain(True)
    assert expected[0].isfinite().all()
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(chain(False), expected))


def test_two_streams_at_once():
    """Blocks of two launches share the device: none may wait for one that the other keeps from starting."""
    tensors = [problem(4096, 1024, 64) for _ in range(2)]
    expected = [synchronized(lambda t=t: both(t)) for t in tensors]
    streams = [torch.cuda.Stream() for _ in range(2)]
    results = []
    for _ in range(RUNS // 4):
        for stream, t in zip(streams, tensors):
            with torch.cuda.stream(stream):
                results.append(both(t))
    torch.cuda.synchronize()
    for i, got in enumerate(results):
        assert all(torch.equal(a, b) for a, b in zip(got, expected[i % 2]))


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_graph_replays_with_new_data(adapter_dtype):
    tensors, seed = problem(1100, 1024, 64, adapter_dtype=adapter_dtype), seed_for(0.1)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        both(tensors, 0.1, seed)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both(tensors, 0.1, seed)
    for i in range(1, 4):
        for old, new in zip(tensors, problem(1100, 1024, 64, adapter_dtype=adapter_dtype)):
            old.copy_(new)
        seed.fill_(i)
        for t in captured:
            t.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(captured, both(tensors, 0.1, seed)))
