"""How the NF4 matmul behaves on a GPU: streams, graphs, launches, memory, and no kernel that starts too early."""

from __future__ import annotations

import pytest
import torch

from peftkern import NF4Linear, NF4Weight, nf4_matmul, quantize_nf4
from peftkern.ops import backends
from peftkern.testing.launches import can_count_launches, launches
from peftkern.testing.nf4 import dense_nf4, random_nf4, row_slice
from peftkern.testing.numerics import assert_within

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

CUDA = torch.device("cuda")
DTYPE = torch.bfloat16
REPEATS, VARIANTS = 200, 4
TOKENS = (1, 4, 8, 16, 33, 64, 128, 300, 2050)


def scratch_budget() -> int:
    """The most bytes that a matmul may hold beside its arguments and result."""
    host = pytest.importorskip("peftkern._host")
    if not hasattr(host, "nf4_scratch_bytes"):
        pytest.skip("no bound on scratch memory declared")
    return host.nf4_scratch_bytes()


def normal(*shape: int, device: torch.device = CUDA) -> torch.Tensor:
    return torch.randn(shape, device=device).to(DTYPE)


def dx_of(dy: torch.Tensor, q: NF4Weight) -> torch.Tensor:
    return torch.ops.peftkern.nf4_matmul_dx(dy, *q.tensors(), q.blocksize, q.nested_blocksize, q.shape[1])


def copy_into(target: NF4Weight, source: NF4Weight) -> None:
    """New bytes in place, the scales first: the codes are the last thing written."""
    for a, b in reversed(list(zip(target.tensors(), source.tensors()))):
        if a is not None and b is not None:
            a.copy_(b)


def synchronized(call):  # type: ignore[no-untyped-def]
    torch.cuda.synchronize()
    result = call()
    torch.cuda.synchronize()
    return result


@pytest.mark.parametrize("M", TOKENS)
def test_work_goes_to_the_current_stream(M):
    """Behind a long wait on the same stream; anything that ran elsewhere would read the old values."""
    q, new = random_nf4((256, 512), device=CUDA), random_nf4((256, 512), device=CUDA, seed=1)
    x, dy = torch.zeros(M, 512, dtype=DTYPE, device=CUDA), torch.zeros(M, 256, dtype=DTYPE, device=CUDA)
    new_x, new_dy = normal(M, 512), normal(M, 256)
    expected = synchronized(lambda: (nf4_matmul(new_x, new), dx_of(new_dy, new)))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        copy_into(q, new)
        x.copy_(new_x)
        dy.copy_(new_dy)
        y, dx = nf4_matmul(x, q), dx_of(dy, q)
    stream.synchronize()
    assert torch.equal(y, expected[0])
    assert torch.equal(dx, expected[1])


@pytest.mark.parametrize("M", TOKENS)
@pytest.mark.parametrize("blocksize", [32, 64])
def test_a_graph_replays_with_new_data(M, blocksize):
    q = random_nf4((256, 512), blocksize, device=CUDA)
    layer = NF4Linear.from_weight(q, torch.nn.Parameter(normal(256), requires_grad=False))
    x, dy = normal(M, 512), normal(M, 256)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        layer(x), dx_of(dy, q)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, dx = layer(x), dx_of(dy, q)
    for seed in range(1, 4):
        x.normal_()
        dy.normal_()
        copy_into(q, random_nf4((256, 512), blocksize, device=CUDA, seed=seed))
        y.fill_(float("nan"))
        dx.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, layer(x))
        assert torch.equal(dx, dx_of(dy, q))


@pytest.mark.parametrize("M", [1, 16, 64, 200])
def test_a_graph_orders_writers_and_readers(M):
    """Rewriting weight and x inside the graph, right before the matmul, and one matmul feeding the next."""
    sources = [random_nf4((512, 512), device=CUDA, seed=seed) for seed in range(VARIANTS)]
    source, q, other = sources[0].clone(), sources[0].clone(), sources[1].clone()
    x, new_x = normal(M, 512), normal(M, 512)

    def chain() -> tuple[torch.Tensor, torch.Tensor]:
        copy_into(q, source)
        x.copy_(new_x)
        y = nf4_matmul(x, q)
        return y, nf4_matmul(nf4_matmul(y, other), q)

    chain()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = chain()
    for i in range(REPEATS // 4):
        copy_into(source, sources[i % VARIANTS])
        new_x.normal_()
        graph.replay()
        fresh = sources[i % VARIANTS]
        y = synchronized(lambda: nf4_matmul(new_x, fresh))  # noqa: B023
        middle = synchronized(lambda: nf4_matmul(y, other))  # noqa: B023
        assert torch.equal(results[0], y)
        assert torch.equal(results[1], synchronized(lambda: nf4_matmul(middle, fresh)))  # noqa: B023


@pytest.mark.parametrize("M", [1, 4, 16, 64, 128, 300])
@pytest.mark.parametrize("last", ["x", "codes", "scales"])
def test_a_matmul_right_behind_a_writer_reads_what_it_wrote(M, last):
    """A kernel launched before its predecessor ends must not load what that one writes: x, codes or scales."""
    N = K = 2048
    sources = [random_nf4((N, K), device=CUDA, seed=seed) for seed in range(VARIANTS)]
    inputs = [normal(M, K) for _ in range(VARIANTS)]
    expected = [synchronized(lambda x=x, s=s: nf4_matmul(x, s)) for x, s in zip(inputs, sources)]
    q, x = sources[0].clone(), inputs[0].clone()
    results = []
    for i in range(REPEATS):
        source, new_x = sources[i % VARIANTS], inputs[i % VARIANTS]
        if last == "x":
            copy_into(q, source)
            x.copy_(new_x)
        elif last == "codes":
            x.copy_(new_x)
            copy_into(q, source)
        else:
            x.copy_(new_x)
            q.packed.copy_(source.packed)
            q.nested_offset.copy_(source.nested_offset)
            q.absmax.copy_(source.absmax)
            q.nested_absmax.copy_(source.nested_absmax)
        results.append(nf4_matmul(x, q))
    torch.cuda.synchronize()
    for i, result in enumerate(results):
        assert torch.equal(result, expected[i % VARIANTS]), f"round {i}"


@pytest.mark.parametrize("M", [1, 16, 64, 128])
def test_a_matmul_two_kernels_behind_a_writer_reads_what_it_wrote(M):
    """The matmul in between may let the next one start early; the writer before it is not done then by itself."""
    sources = [random_nf4((2048, 2048), device=CUDA, seed=seed) for seed in range(VARIANTS)]
    small = random_nf4((64, 64), device=CUDA)
    x, short = normal(M, 2048), normal(M, 64)
    expected = [synchronized(lambda s=s: nf4_matmul(x, s)) for s in sources]
    q = sources[0].clone()
    results = []
    for i in range(REPEATS):
        copy_into(q, sources[i % VARIANTS])
        nf4_matmul(short, small)
        results.append(nf4_matmul(x, q))
    torch.cuda.synchronize()
    for i, result in enumerate(results):
        assert torch.equal(result, expected[i % VARIANTS]), f"round {i}"


@pytest.mark.parametrize("M", [1, 16, 64, 300])
@pytest.mark.parametrize("double_quant", [True, False])
def test_a_matmul_right_behind_quantize(M, double_quant):
    dense = [torch.randn(1024, 2048, device=CUDA).mul_(0.02).to(DTYPE) for _ in range(VARIANTS)]
    x = normal(M, 2048)
    expected = [
        synchronized(lambda w=w: nf4_matmul(x, synchronized(lambda: quantize_nf4(w, 64, double_quant)))) for w in dense
    ]
    results = [nf4_matmul(x, quantize_nf4(dense[i % VARIANTS], 64, double_quant)) for i in range(REPEATS)]
    torch.cuda.synchronize()
    for i, result in enumerate(results):
        assert torch.equal(result, expected[i % VARIANTS]), f"round {i}"


@pytest.mark.parametrize("M", [1, 16, 64, 300])
def test_a_chain_of_matmuls_that_reuse_each_others_memory(M):
    """Each input is freed as soon as the next is launched, so outputs land where the kernel before still reads."""
    q = random_nf4((2048, 2048), device=CUDA)
    start = normal(M, 2048)

    def chain(wait: bool) -> torch.Tensor:
        x = start
        for _ in range(REPEATS // 2):
            x = dx_of(nf4_matmul(x, q), q)
            x = (x / x.float().std(1, keepdim=True)).to(DTYPE)
            if wait:
                torch.cuda.synchronize()
        return x

    def bare(wait: bool) -> torch.Tensor:  # nothing between the matmuls; 16 of them, so that nothing overflows
        x = start * 0.01
        for _ in range(16):
            x = nf4_matmul(x, q)
            if wait:
                torch.cuda.synchronize()
        return x

    for function in (chain, bare):
        expected = function(True)
        assert expected.isfinite().any()
        for _ in range(10):
            assert torch.equal(function(False), expected)


@pytest.mark.parametrize("M", [1, 8, 16, 32, 64, 128])
def test_settled_weights_between_rewrites(M):
    """Matmuls that read their weights early, among them some right behind a write to theirs or to another's."""
    sources = [random_nf4((2048, 2048), device=CUDA, seed=seed) for seed in range(VARIANTS)]
    start = normal(M, 2048) * 0.01

    def chain(wait: bool) -> list[torch.Tensor]:
        weights = [source.clone() for source in sources[:3]]
        results = []
        for i in range(REPEATS):
            if i % 16 == 0:
                x = start
            if i % 7 == 3:
                copy_into(weights[i % 3], sources[i // 7 % VARIANTS])
            elif i % 7 == 5:
                copy_into(weights[(i + 1) % 3], sources[i // 7 % VARIANTS])
            x = nf4_matmul(x, weights[i % 3])
            results.append(x)
            if wait:
                torch.cuda.synchronize()
        return results

    expected = chain(True)
    assert len({tuple(y.flatten()[:4].tolist()) for y in expected}) > REPEATS // 3
    for i, (y, want) in enumerate(zip(chain(False), expected)):
        assert torch.equal(y, want), f"matmul {i}"


@pytest.mark.parametrize("M", [1, 16, 32, 64, 128])
def test_a_graph_of_settled_matmuls_reads_the_weights_of_its_replay(M):
    weights = [random_nf4((2048, 2048), device=CUDA, seed=seed) for seed in range(2)]
    sources = [random_nf4((2048, 2048), device=CUDA, seed=seed) for seed in range(2, 2 + VARIANTS)]
    x = normal(M, 2048) * 0.01

    def run() -> torch.Tensor:
        y = x
        for i in range(16):
            y = nf4_matmul(y, weights[i % 2])
        return y

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run()
    for i in range(20):
        x.copy_(normal(M, 2048) * 0.01)
        copy_into(weights[i % 2], sources[i % VARIANTS])
        graph.replay()
        result = y.clone()
        assert torch.equal(result, synchronized(run)), f"replay {i}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("M", "N", "K"), [(8192, 4096, 4096), (8195, 4104, 4096), (16_000, 2056, 1032), (70_001, 1024, 512)]
)
def test_many_tokens(M, N, K, dtype):
    """Several rounds of tiles: the package's GEMM on the dequantized weight, where the GPU has one."""
    q = random_nf4((N, K), device=CUDA)
    x, dy = torch.randn(M, K, device=CUDA).to(dtype), torch.randn(M, N, device=CUDA).to(dtype)
    bias = torch.randn(N, device=CUDA).to(dtype)
    dense, truth = dense_nf4(q, dtype), dense_nf4(q, torch.float64)
    rows = torch.cat([torch.arange(0, 300), torch.arange(M // 2, M // 2 + 300), torch.arange(M - 300, M)]).to(CUDA)
    wanted = x[rows].double() @ truth.T
    for b in (None, bias):
        y = nf4_matmul(x, q, b)
        assert y.isfinite().all()
        added = 0.0 if b is None else b.double()
        assert_within(y[rows], torch.nn.functional.linear(x, dense, b)[rows], wanted + added, "y")
        assert torch.equal(nf4_matmul(x, q, b), y)
    dx = dx_of(dy, q)
    assert dx.isfinite().all()
    assert_within(dx[rows], (dy @ dense)[rows], dy[rows].double() @ truth, "dx")
    assert torch.equal(dx_of(dy, q), dx)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
@pytest.mark.parametrize("M", TOKENS)
def test_the_second_gpu(M):
    """Neither the current device nor its stream may be used for tensors that live elsewhere."""
    other = torch.device("cuda", 1)
    q = random_nf4((256, 512), device=other)
    x, dy, bias = normal(M, 512, device=other), normal(M, 256, device=other), normal(256, device=other)
    with torch.cuda.device(0):
        y, dx = nf4_matmul(x, q, bias), dx_of(dy, q)
        assert torch.cuda.current_device() == 0
    assert y.device == dx.device == other
    dense, truth = dense_nf4(q, DTYPE), dense_nf4(q, torch.float64)
    assert_within(y, torch.nn.functional.linear(x, dense, bias), x.double() @ truth.T + bias.double(), "y")
    assert_within(dx, dy @ dense, dy.double() @ truth, "dx")


@pytest.mark.parametrize("M", [1, 2, 4, 8, 16, 33, 64])
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_launches_one_kernel_for_few_tokens(M, bias):
    if not can_count_launches():
        pytest.skip("the profiler sees no kernels here")
    if backends()["nf4_matmul"]["CUDA"] == "reference":
        pytest.skip("no CUDA kernel was built")
    layer = NF4Linear(512, 256, bias=bias, device=CUDA, dtype=DTYPE).requires_grad_(False)
    x = normal(M, 512)
    layer(x)
    with torch.no_grad():
        found = launches(lambda: layer(x))
    assert len(found) == 1, found


@pytest.mark.parametrize("M", [1, 64, 300, 2048, 8192])
@pytest.mark.parametrize("blocksize", [32, 64])
@pytest.mark.parametrize("dx", [False, True])
def test_scratch_memory_is_bounded(M, blocksize, dx):
    """For a weight half as large again as the budget when dense. The forward keeps to the budget and dX, whose slices
    would have to be summed, to one dense weight; the values of the first, a middle and the last rows are checked."""
    budget, K = scratch_budget(), 8192
    N = -(-budget * 3 // (2 * DTYPE.itemsize * K * 64)) * 64
    q = random_nf4((N, K), blocksize, device=CUDA)
    x = normal(M, N if dx else K)
    run = dx_of if dx else nf4_matmul
    run(x, q)  # handles and workspaces
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    y = run(x, q)
    torch.cuda.synchronize()
    extra = torch.cuda.memory_stats()["requested_bytes.all.peak"] - before - y.nbytes
    flags = 4 * sum(-(-size // 128) for size in (M, N, K)) + 512  # of the package's GEMM: a word a tile, and some more
    bound = max(budget, N * K * DTYPE.itemsize) + flags if dx else budget
    assert extra <= bound, f"{extra} bytes of scratch, bound {bound}"
    for first in (0, N // 128 * 64, N - 64) if not dx else ():
        part = row_slice(q, first, first + 64)
        truth = x.double() @ dense_nf4(part, torch.float64).T
        assert_within(y[:, first : first + 64], x @ dense_nf4(part, DTYPE).T, truth, f"rows from {first}")


def test_thousands_of_calls_hold_no_memory():
    q, x = random_nf4((512, 512), device=CUDA), normal(64, 512)
    nf4_matmul(x, q)
    before = torch.cuda.memory_allocated()
    for _ in range(2000):
        nf4_matmul(x, q)
        dx_of(x, q)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before
