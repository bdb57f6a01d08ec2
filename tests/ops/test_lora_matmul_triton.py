"""LoRA matmul's Triton backend, called by name since another may own the op: compiled on a GPU, else interpreted."""

from __future__ import annotations

import itertools

import pytest
import torch

from peftkern.ops._dropout import dropout_mask, dropout_numbers, dropout_scale, dropout_threshold
from peftkern.ops.lora_matmul import function, reference
from peftkern.ops.lora_matmul.function import lora_matmul_seeded
from peftkern.ops.lora_matmul.spec import SPECS
from peftkern.testing.checks import check_case, poisoned_memory
from peftkern.testing.numerics import assert_within

triton_kernels = pytest.importorskip("peftkern.ops.lora_matmul.triton_kernels")

SPEC = SPECS[0]
SCALING = 2.0
SEEDS = [0, 1, -1, 2**63 - 1, -(2**63), 0x0123456789ABCDEF]


@pytest.fixture
def device(device):
    if device.type == "cpu" and torch.cuda.is_available():
        pytest.skip("Triton interprets only where there is no GPU")
    return device


@pytest.fixture(params=[torch.float32, torch.float16, torch.bfloat16], ids=["float32", "float16", "bfloat16"])
def dtype(request, device):
    if request.param == torch.bfloat16 and device.type == "cpu":
        pytest.skip("Triton's interpreter multiplies bfloat16 wrongly")
    return request.param


@pytest.fixture(autouse=True)
def _backend(monkeypatch):
    monkeypatch.setattr(function, "_ops", triton_kernels)
    few_tokens = torch.ops.peftkern.lora_matmul_fwd_nf4  # which the Triton backend does not have
    monkeypatch.setattr(triton_kernels, "lora_matmul_fwd_nf4", few_tokens, raising=False)


@pytest.fixture(autouse=True)
def _loops_under_new_numpy(monkeypatch):
    """Triton 3.6's interpreter makes loop bounds of arrays of one element with int(), which numpy 2.4 refuses."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_index_too(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch_index_too)


def seed_on(device, value=-(2**61) - 5):
    return torch.tensor([value], device=device)


def matrix(rows, columns, device, dtype, std=1.0, layout="contiguous"):
    def normal(*shape):
        return (torch.randn(shape, device=device) * std).to(dtype)

    if layout == "transposed":
        return normal(columns, rows).t()
    if layout == "sliced":
        return normal(rows, 2 * columns)[:, 1::2]
    if layout == "padded":
        return normal(rows, columns + 3)[:, :columns]
    if layout == "expanded":
        return normal(1, columns).expand(rows, columns)
    return normal(rows, columns)


def problem(device, dtype, M, N, K, r, adapter_dtype=None, layout="contiguous"):
    """x, weight, lora_A, lora_B, bias, dy"""
    adapter_dtype = adapter_dtype or dtype
    return (
        matrix(M, K, device, dtype, layout=layout),
        matrix(N, K, device, dtype, K**-0.5),
        matrix(r, K, device, adapter_dtype, K**-0.5),
        matrix(N, r, device, adapter_dtype, r**-0.5 / SCALING),
        matrix(1, N, device, dtype, 0.1)[0],
        matrix(M, N, device, dtype, layout=layout),
    )


def run(f, tensors, dropout_p, seed, cast=torch.Tensor.detach):
    """y, dx, dA, dB, dbias of `f`, every tensor passed through `cast` first."""
    x, weight, A, B, bias, dy = (cast(t) for t in tensors)
    leaves = [t.detach().requires_grad_() for t in (x, A, B, bias)]
    y = f(leaves[0], weight, *leaves[1:3], SCALING, bias=leaves[3], dropout_p=dropout_p, seed=seed)
    return y, *torch.autograd.grad(y, leaves, dy)


def check(tensors, dropout_p, seed):
    """The error rule; returns what the backend gave."""
    with poisoned_memory():
        got = run(lora_matmul_seeded, tensors, dropout_p, seed)
    eager = run(reference.formula, tensors, dropout_p, seed)
    truth = run(reference.formula, tensors, dropout_p, seed, torch.Tensor.double)
    for what, *values in zip(("y", "dx", "dA", "dB", "dbias"), got, eager, truth):
        assert_within(*values, what)
    return got


def test_keeps_the_spec(dtype, device):
    for case in SPEC.test_cases(device.type):
        interpreted_for_long = device.type == "cpu" and case.sizes["M"] * max(case.sizes["N"], case.sizes["K"]) > 2**20
        if not (case.slow or interpreted_for_long):
            check_case(SPEC, case, dtype, device)


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("r", [1, 3, 8, 16, 20, 64, 200, 256, 300])
def test_ranks(r, dropout_p, dtype, device):
    M, N, K = 150, 136, 200
    check(problem(device, dtype, M, N, K, r), dropout_p, seed_on(device) if dropout_p else None)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize(
    ("M", "N", "K"), [(2, 200, 300), (64, 128, 128), (65, 129, 131), (400, 40, 24), (33, 7, 1031), (5, 1031, 7)]
)
def test_ragged_shapes(M, N, K, dropout_p, dtype, device):
    check(problem(device, dtype, M, N, K, 12), dropout_p, seed_on(device) if dropout_p else None)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "padded", "expanded"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_strides_of_x_and_dy(layout, dropout_p, dtype, device):
    tensors = problem(device, dtype, 70, 136, 200, 8, layout=layout)
    seed = seed_on(device) if dropout_p else None
    # Rows all alike are too small a sample of eager's error.
    got = check(tensors, dropout_p, seed) if layout != "expanded" else run(lora_matmul_seeded, tensors, dropout_p, seed)
    dense = run(lora_matmul_seeded, [t.contiguous() for t in tensors], dropout_p, seed)
    tolerance = 16 * torch.finfo(dtype).eps
    for a, b in zip(got, dense):  # the GEMM library may add in another order
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance * b.abs().max().item())


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_adapters_of_any_dtype(adapter_dtype, dtype, device):
    for dropout_p, seed in ((0.0, None), (0.2, seed_on(device))):
        _, _, dA, dB, _ = check(problem(device, dtype, 90, 72, 136, 8, adapter_dtype), dropout_p, seed)
        assert dA.dtype == dB.dtype == adapter_dtype


def test_strided_adapters(dtype, device):
    x, weight, A, B, bias, dy = problem(device, dtype, 70, 72, 136, 8)
    strided = x, weight, A.t().contiguous().t(), B.t().contiguous().t(), bias, dy
    check(strided, 0.2, seed_on(device))


@pytest.mark.parametrize("seed", SEEDS)
def test_every_pass_has_the_mask_of_its_definition(seed, dtype, device):
    """Seen by each kernel alone, through unit matrices; columns past one tile and ragged."""
    M, K, p = 67, 141, 0.37
    seed = seed_on(device, seed)
    mask = dropout_mask(seed, M, K, p)
    ones = torch.ones(M, K, dtype=dtype, device=device)
    assert torch.equal(triton_kernels.project(ones, torch.eye(K, dtype=dtype, device=device), seed, p) != 0, mask)
    column, row = (torch.ones(shape, dtype=dtype, device=device) for shape in ((M, 1), (1, K)))
    assert torch.equal(triton_kernels.masked_low_rank(column, row, dropout_scale(p), seed, p) != 0, mask)
    grad = torch.full((M, K), torch.nan, device=device)
    triton_kernels.adapter_grad(torch.eye(M, dtype=dtype, device=device), ones, 1.0, grad, seed, p)
    assert torch.equal(grad != 0, mask)


def dropout_mask_of_rows(seed, row, columns, p):
    """`dropout_mask` of some rows only: [len(row), columns]."""
    return dropout_numbers(row, (columns + 15) // 16, seed)[:, :columns] >= dropout_threshold(p)


def test_the_mask_is_the_same_in_rows_beyond_32_bits(device):
    """The counter's third word. Rows in between share one row of memory."""
    M, p, seed = 2**32 + 70, 0.4, seed_on(device)
    if device.type == "cpu":
        pytest.skip("too many programs to interpret")
    if torch.cuda.get_device_properties(device).total_memory < 40 << 30:
        pytest.skip("S takes 8.6 GB")
    x = torch.ones(1, 8, dtype=torch.float16, device=device).expand(M, 8)
    bits = torch.tensor([[1, 2, 4, 8, 16, 32, 64, 128]], device=device)  # S holds a row's mask in base 2
    S = triton_kernels.project(x, bits.half(), seed, p)
    kept = dropout_mask_of_rows(seed, torch.arange(2**32 - 5, M, device=device), 8, p)
    assert torch.equal(S[2**32 - 5 :, 0].long(), (kept * bits).sum(1))


def test_offsets_beyond_int32(device):
    """The rows after element 2**31 of x and dx are those of a small problem under the same mask."""
    if device.type == "cpu":
        pytest.skip("too many programs to interpret")
    K, N, r, p, seed = 4096, 16, 8, 0.3, seed_on(device)
    M = 2**31 // K + 100
    if torch.cuda.get_device_properties(device).total_memory < 30 << 30:
        pytest.skip("x and dx take 4.3 GB each")
    x = torch.randn(M, K, device=device, dtype=torch.bfloat16)
    _, weight, A, B, bias, _ = problem(device, torch.bfloat16, 1, N, K, r)
    rows = slice(M - 64, M)
    dy = torch.zeros(M, N, device=device, dtype=torch.bfloat16)
    dy[rows] = torch.randn(64, N, device=device)  # so that these rows alone make dA
    _, S = triton_kernels.lora_matmul_fwd(x, weight, A, B, bias, SCALING, p, seed)
    dx, dA, _ = triton_kernels.lora_matmul_bwd(dy, x, weight, A, B, S, seed, SCALING, p, True, True, False)
    mask = dropout_mask_of_rows(seed, torch.arange(M - 64, M, device=device), K, p)
    x, dy, weight, A, B = (t.double() for t in (x[rows], dy[rows], weight, A, B))
    factor, D = SCALING * dropout_scale(p), dy @ B
    for got, exact in (
        (S[rows], mask * x @ A.t()),
        (dx[rows], dy @ weight + factor * mask * (D @ A)),
        (dA, factor * D.t() @ (mask * x)),
    ):
        torch.testing.assert_close(got.double(), exact, rtol=0, atol=0.02 * exact.abs().max().item())


def test_no_tokens(dtype, device):
    for dropout_p, seed in ((0.0, None), (0.2, seed_on(device))):
        x, weight, A, B, bias, dy = problem(device, dtype, 0, 24, 40, 5)
        y, S = triton_kernels.lora_matmul_fwd(x, weight, A, B, bias, SCALING, dropout_p, seed)
        assert (y.shape, S.shape) == ((0, 24), (0, 5))
        dx, dA, dB = triton_kernels.lora_matmul_bwd(dy, x, weight, A, B, S, seed, SCALING, dropout_p, True, True, True)
        assert dx.shape == (0, 40)
        assert torch.equal(dA, torch.zeros_like(A))
        assert torch.equal(dB, torch.zeros_like(B))


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3)))
def test_any_subset_of_gradients_reads_only_what_it_needs(needs, dropout_p, device):
    x, weight, A, B, bias, dy = problem(device, torch.float32, 70, 40, 56, 4)
    seed = seed_on(device) if dropout_p else None
    _, S = triton_kernels.lora_matmul_fwd(x, weight, A, B, bias, SCALING, dropout_p, seed)
    full = triton_kernels.lora_matmul_bwd(dy, x, weight, A, B, S, seed, SCALING, dropout_p, True, True, True)
    need_dx, need_dA, need_dB = needs
    some = triton_kernels.lora_matmul_bwd(
        dy,
        x if need_dA else None,
        weight if need_dx else None,
        A,
        B,
        S if need_dB else None,
        seed,
        SCALING,
        dropout_p,
        *needs,
    )
    for got, expected, need in zip(some, full, needs):
        assert torch.equal(got, expected) if need else got.shape == (0,)


def test_runs_are_bitwise_equal(dtype, device):
    tensors = problem(device, dtype, 300, 130, 257, 16)
    for dropout_p, seed in ((0.0, None), (0.1, seed_on(device))):
        first = run(lora_matmul_seeded, tensors, dropout_p, seed)
        for _ in range(5 if device.type == "cuda" else 1):
            again = run(lora_matmul_seeded, tensors, dropout_p, seed)
            assert all(torch.equal(a, b) for a, b in zip(first, again))


def test_dropped_elements_are_not_read_into_the_sums(device):
    """NaN where x is dropped leaves S and dA finite, as a select does and a product with the mask would not."""
    x, weight, A, B, bias, dy = problem(device, torch.float32, 70, 40, 136, 4)
    p, seed = 0.5, seed_on(device)
    poisoned = torch.where(dropout_mask(seed, 70, 136, p), x, torch.nan)
    _, S = triton_kernels.lora_matmul_fwd(x, weight, A, B, bias, SCALING, p, seed)
    _, S_poisoned = triton_kernels.lora_matmul_fwd(poisoned, weight, A, B, bias, SCALING, p, seed)
    assert torch.equal(S_poisoned, S)
    needs = False, True, False
    _, dA, _ = triton_kernels.lora_matmul_bwd(dy, x, None, A, B, None, seed, SCALING, p, *needs)
    _, dA_poisoned, _ = triton_kernels.lora_matmul_bwd(dy, poisoned, None, A, B, None, seed, SCALING, p, *needs)
    assert torch.equal(dA_poisoned, dA)


def test_float64_goes_to_the_reference(device):
    tensors = problem(device, torch.float64, 20, 24, 40, 5)
    for a, b in zip(
        run(lora_matmul_seeded, tensors, 0.3, seed_on(device)), run(reference.formula, tensors, 0.3, seed_on(device))
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_nothing_of_the_size_of_a_mask_is_allocated(dropout_p, device):
    if device.type == "cpu":
        pytest.skip("the CPU's allocator keeps no statistics")
    M, N, K, r = 4096, 512, 4096, 16
    x, weight, A, B, bias, dy = problem(device, torch.bfloat16, M, N, K, r)
    seed = seed_on(device) if dropout_p else None
    args = seed, SCALING, dropout_p, True, True, True
    torch.cuda.synchronize(device)
    for _ in range(2):  # the first one allocates cuBLAS's workspace
        _, S = triton_kernels.lora_matmul_fwd(x, weight, A, B, bias, SCALING, dropout_p, seed)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        grads = triton_kernels.lora_matmul_bwd(dy, x, weight, A, B, S, *args)
        peak = torch.cuda.max_memory_allocated(device) - before
        results = sum(t.nbytes for t in grads)
        del grads
    assert peak - results < M * K // 2, "half a byte for each element of x"


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_captures_into_a_graph(dropout_p, device):
    if device.type == "cpu":
        pytest.skip("CUDA graphs")
    x, weight, A, B, bias, dy = problem(device, torch.bfloat16, 300, 136, 264, 16)
    seed = seed_on(device) if dropout_p else None

    def step():
        y, S = triton_kernels.lora_matmul_fwd(x, weight, A, B, bias, SCALING, dropout_p, seed)
        return y, *triton_kernels.lora_matmul_bwd(dy, x, weight, A, B, S, seed, SCALING, dropout_p, True, True, True)

    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        step()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    if seed is not None:
        seed.fill_(77)  # read at replay
    graph.replay()
    for a, b in zip(captured, step()):
        assert torch.equal(a, b)
