"""LoRA matmul beyond its spec: gradients, memory, dropout's replay, compile, autocast, bad input."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from peftkern import lora_matmul, quantize_nf4
from peftkern.ops._dropout import draw_seed
from peftkern.ops.lora_matmul import function, reference
from peftkern.ops.lora_matmul.function import lora_matmul_seeded
from peftkern.ops.lora_matmul.spec import SPECS
from peftkern.testing.checks import check_case
from peftkern.testing.numerics import assert_within

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
SPEC = SPECS[0]


@pytest.fixture(params=["dispatched", "reference"])
def backend(request, monkeypatch):
    """The backend that owns the device, and the reference in its place."""
    if request.param == "reference":
        monkeypatch.setattr(function, "_ops", reference)
    return request.param


def problem(device, dtype=torch.float32, M=6, N=24, K=40, r=5, adapter_dtype=None, bias=True):
    """x, weight, lora_A, lora_B, bias: leaves that want gradients, but for the weight."""
    adapter_dtype = adapter_dtype or dtype
    x = torch.randn(M, K, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(N, K, device=device) / K**0.5).to(dtype)
    lora_A = (torch.randn(r, K, device=device) / K**0.5).to(adapter_dtype).requires_grad_()
    lora_B = torch.randn(N, r, device=device).to(adapter_dtype).requires_grad_()
    return x, weight, lora_A, lora_B, torch.randn(N, device=device).to(dtype).requires_grad_() if bias else None


def seed_on(device, value=123456789):
    return torch.tensor([value], device=device)


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_reference_keeps_the_spec_too(dtype, device, monkeypatch):
    monkeypatch.setattr(function, "_ops", reference)
    for case in SPEC.test_cases(device.type):
        check_case(SPEC, case, dtype, device)


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("nf4", [False, True])
def test_gradcheck_in_float64(dropout_p, nf4, backend, device):
    x, weight, A, B, bias = problem(device, torch.float64, M=4, N=6, K=9, r=3)
    frozen = quantize_nf4(weight.float()) if nf4 else weight
    seed = seed_on(device) if dropout_p else None
    scaling = torch.tensor(0.7, dtype=torch.float64, device=device, requires_grad=True)

    def run(x, A, B, bias, scaling):
        return lora_matmul_seeded(x, frozen, A, B, scaling, bias=bias, dropout_p=dropout_p, seed=seed)

    assert torch.autograd.gradcheck(run, (x, A, B, bias, scaling))


@pytest.mark.parametrize("wanted", [{"x"}, {"A"}, {"B"}, {"bias"}, {"A", "B"}, {"x", "B"}, {"x", "bias"}, set()])
def test_any_subset_of_gradients(wanted, backend, device):
    tensors = dict(zip(("x", "weight", "A", "B", "bias"), problem(device)))
    q = quantize_nf4(tensors.pop("weight"))

    def run(names):
        leaves = {name: t.detach().requires_grad_(name in names) for name, t in tensors.items()}
        x, A, B, bias = leaves.values()
        y = lora_matmul_seeded(x, q, A, B, 2.0, bias=bias, dropout_p=0.3, seed=seed_on(device))
        if names:
            y.square().sum().backward()
        return y, {name: t.grad for name, t in leaves.items()}

    y, grads = run(wanted)
    full_y, full_grads = run({"x", "A", "B", "bias"})
    assert y.requires_grad == bool(wanted)
    assert torch.equal(y, full_y)
    for name, grad in grads.items():
        assert (grad is not None) == (name in wanted)
        if grad is not None:
            assert torch.equal(grad, full_grads[name])


def test_double_backward_is_refused(backend, device):
    x, weight, A, B, _ = problem(device)
    (dx,) = torch.autograd.grad(lora_matmul(x, weight, A, B, 2.0).pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def saved_by(run):
    """(tensors saved for the backward, the output)"""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        output = run()
    return saved, output


@pytest.mark.parametrize("nf4", [False, True])
def test_nothing_large_is_saved_but_x_and_the_stored_weight(nf4, backend, device):
    M, N, K, r = 64, 96, 128, 4
    x, weight, A, B, bias = problem(device, M=M, N=N, K=K, r=r)
    frozen = quantize_nf4(weight) if nf4 else weight
    saved, _ = saved_by(lambda: lora_matmul(x, frozen, A, B, 2.0, bias=bias, dropout_p=0.2, training=True))
    shared = {t.data_ptr() for t in (x, A, B, *(frozen.tensors() if nf4 else (weight,))) if t is not None}
    own = [t for t in saved if t.data_ptr() not in shared]
    assert sum(t.nbytes for t in own) == M * r * 4 + 8  # S and the seed
    adapter = {A.data_ptr(), B.data_ptr()}
    for fixed, kept in [
        ({"x"}, {x.data_ptr(), *adapter}),  # no dx: no weight
        ({"A", "B"}, shared - {x.data_ptr()}),  # dx alone: neither x nor S
    ]:
        args = [t.detach() if name in fixed else t for name, t in (("x", x), ("A", A), ("B", B))]
        saved, _ = saved_by(lambda args=args: lora_matmul(args[0], frozen, *args[1:], 2.0))
        pointers = {t.data_ptr() for t in saved}
        assert pointers & shared == kept
        assert len(pointers - shared) == ("x" in fixed), "S"
    with torch.no_grad():
        saved, _ = saved_by(lambda: lora_matmul(x, frozen, A, B, 2.0))
    assert not saved


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    m=st.integers(0, 40),
    n=st.integers(1, 70),
    k=st.integers(1, 150),
    r=st.integers(1, 20),
    dtype=st.sampled_from(FLOATS),
    adapter_dtype=st.sampled_from([None, *FLOATS]),
    dropout_p=st.sampled_from([0.0, 0.1, 0.9]),
    with_bias=st.booleans(),
    layouts=st.tuples(*[st.sampled_from(["contiguous", "transposed", "sliced", "expanded"])] * 4),
)
def test_ragged_shapes_and_strides(m, n, k, r, dtype, adapter_dtype, dropout_p, with_bias, layouts):
    def matrix(rows, columns, std, dtype, layout):
        if layout == "transposed":
            return (torch.randn(columns, rows) * std).to(dtype).t()
        if layout == "sliced":
            return (torch.randn(rows, 2 * columns) * std).to(dtype)[:, 1::2]
        if layout == "expanded":
            return (torch.randn(1, columns) * std).to(dtype).expand(rows, columns)
        return (torch.randn(rows, columns) * std).to(dtype)

    adapter = adapter_dtype or dtype

    def draw(index):
        """y and gradients of the op, of eager and of the truth, on fresh values."""
        torch.manual_seed(index)
        x = matrix(m, k, 1.0, dtype, layouts[0])
        weight = matrix(n, k, k**-0.5, dtype, layouts[1])
        A = matrix(r, k, k**-0.5, adapter, layouts[2])
        B = matrix(n, r, r**-0.5 / 2, adapter, layouts[2])
        dy = matrix(m, n, 1.0, dtype, layouts[3])
        bias = torch.randn(n).to(dtype) if with_bias else None
        seed = draw_seed(x.device) if dropout_p else None

        def run(f, cast):
            leaves = [t if t is None else cast(t).detach().requires_grad_() for t in (x, A, B, bias)]
            a, b, c, d = leaves
            y = f(a, cast(weight), b, c, 2.0, bias=d, dropout_p=dropout_p, seed=seed)
            y.backward(cast(dy))
            return [y, *(t.grad for t in leaves if t is not None)]

        same = torch.Tensor.detach
        return run(lora_matmul_seeded, same), run(reference.formula, same), run(reference.formula, torch.Tensor.double)

    # The error rule compares largest errors: a few elements, or many alike, are too small a sample of them.
    draws = range(max(math.ceil(64 / min(max(m, 1) * min(n, k), r * min(n, k), n)), 16 * ("expanded" in layouts)))
    for what, *results in zip(("y", "dx", "dA", "dB", "dbias"), *(zip(*kind) for kind in zip(*map(draw, draws)))):
        assert_within(*(torch.stack(values) for values in results), what)


def test_fewer_dimensions_and_more(device):
    x, weight, A, B, bias = problem(device)
    y = lora_matmul(x, weight, A, B, 2.0, bias=bias)
    torch.testing.assert_close(lora_matmul(x[0], weight, A, B, 2.0, bias=bias), y[0])
    assert torch.equal(lora_matmul(x.view(2, 1, 3, 40), weight, A, B, 2.0, bias=bias), y.view(2, 1, 3, 24))
    assert lora_matmul(x[:0].view(2, 0, 40), weight, A, B, 2.0).shape == (2, 0, 24)


def test_strides_beyond_int32(device):
    K, far = 16, 2**31 + 8
    storage = torch.empty(far + K, dtype=torch.bfloat16, device=device)  # on the CPU, pages never touched cost nothing
    x = torch.as_strided(storage, (2, K), (far, 1))
    x.copy_(torch.randn(2, K))
    _, weight, A, B, _ = problem(device, torch.bfloat16, K=K)
    for p, seed in ((0.0, None), (0.3, seed_on(device))):
        got = lora_matmul_seeded(x, weight, A, B, 2.0, dropout_p=p, seed=seed)
        assert torch.equal(got, lora_matmul_seeded(x.clone(), weight, A, B, 2.0, dropout_p=p, seed=seed))


def test_non_finite_values_stay_in_their_rows(backend, device):
    x, weight, A, B, bias = problem(device)
    clean = lora_matmul(x, weight, A, B, 2.0, bias=bias)
    with torch.no_grad():
        x[2, 3], x[4, 0] = math.nan, math.inf
    y = lora_matmul(x, weight, A, B, 2.0, bias=bias)
    assert not y[[2, 4]].isfinite().any()
    assert torch.equal(y[[0, 1, 3, 5]], clean[[0, 1, 3, 5]])


def test_zero_adapter_and_zero_scaling_leave_the_base(backend, device):
    x, weight, A, B, bias = problem(device)
    torch.testing.assert_close(lora_matmul(x, weight, A, torch.zeros_like(B), 2.0, bias=bias), linear(x, weight, bias))
    torch.testing.assert_close(lora_matmul(x, weight, A, B, 0.0, bias=bias), linear(x, weight, bias))


def test_runs_are_bitwise_equal(device):
    x, weight, A, B, _ = problem(device, torch.bfloat16, M=300, N=130, K=257, r=16)

    def run():
        y = lora_matmul_seeded(x, weight, A, B, 2.0, dropout_p=0.1, seed=seed_on(device))
        return y, *torch.autograd.grad(y.float().square().sum(), (x, A, B))

    first = run()
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(run(), first))


def test_dropout_is_off_unless_training_and_each_call_draws_anew(device):
    x, weight, A, B, _ = problem(device)
    plain = lora_matmul(x, weight, A, B, 2.0)
    state = torch.get_rng_state()
    assert torch.equal(lora_matmul(x, weight, A, B, 2.0, dropout_p=0.5), plain)
    assert torch.equal(lora_matmul(x, weight, A, B, 2.0, dropout_p=0.0, training=True), plain)
    assert torch.equal(torch.get_rng_state(), state), "no dropout, no random numbers"
    torch.manual_seed(1)
    first, second = (lora_matmul(x, weight, A, B, 2.0, dropout_p=0.5, training=True) for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(lora_matmul(x, weight, A, B, 2.0, dropout_p=0.5, training=True), first)


def test_dropout_keeps_the_expectation(device):
    x, weight, A, B, _ = problem(device, M=2)
    mean = sum(lora_matmul(x, weight, A, B, 1.0, dropout_p=0.3, training=True) for _ in range(4000)) / 4000
    torch.testing.assert_close(mean, lora_matmul(x, weight, A, B, 1.0), atol=0.15, rtol=0)


@pytest.mark.parametrize("nf4", [False, True])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_replays_the_mask(use_reentrant, nf4, device):
    x, weight, A, B, bias = problem(device)
    frozen = quantize_nf4(weight) if nf4 else weight

    def block(x):
        h = lora_matmul(x, frozen, A, B, 2.0, bias=bias, dropout_p=0.5, training=True).tanh()
        return lora_matmul(h[:, :5] @ A, frozen, A, B, 2.0, dropout_p=0.5, training=True)

    def grads(run):
        torch.manual_seed(7)
        for leaf in (x, A, B, bias):
            leaf.grad = None
        run(x).square().sum().backward()
        return [leaf.grad for leaf in (x, A, B, bias)]

    plain = grads(block)
    torch.testing.assert_close(
        grads(lambda x: checkpoint(block, x, use_reentrant=use_reentrant)), plain, rtol=0, atol=0
    )


def test_scaling_may_be_a_tensor_with_a_gradient(device):
    x, weight, A, B, bias = problem(device)
    scaling = torch.tensor(1.5, device=device, requires_grad=True)
    y = lora_matmul(x, weight, A, B, scaling, bias=bias)
    torch.testing.assert_close(y, lora_matmul(x, weight, A, B, 1.5, bias=bias))
    dy = torch.randn_like(y)
    (d_scaling,) = torch.autograd.grad(y, scaling, dy)
    torch.testing.assert_close(d_scaling, ((x @ A.t() @ B.t()) * dy).sum(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("nf4", "dtype", "compiler"),
    [
        (False, torch.float32, "aot_eager"),
        (False, torch.bfloat16, "aot_eager"),
        (True, torch.bfloat16, "aot_eager"),
        (True, torch.float32, "inductor"),
    ],
)
def test_compiles_without_graph_breaks(nf4, dtype, compiler, device):
    x, weight, A, B, bias = problem(device, dtype, adapter_dtype=torch.float32)
    frozen = quantize_nf4(weight) if nf4 else weight

    def step(x, A, B, bias):
        return lora_matmul(x.relu(), frozen, A, B, 2.0, bias=bias).tanh()

    eager, compiled = step(x, A, B, bias), torch.compile(step, backend=compiler, fullgraph=True)(x, A, B, bias)
    tolerance = {"rtol": 0, "atol": 2 * torch.finfo(dtype).eps}
    torch.testing.assert_close(compiled, eager, **tolerance)
    dy = torch.randn_like(eager)
    for a, b in zip(*(torch.autograd.grad(y, (x, A, B, bias), dy) for y in (compiled, eager))):
        torch.testing.assert_close(a, b, rtol=0, atol=float(b.abs().max()) * 4 * torch.finfo(dtype).eps)


def test_compiled_dropout_has_one_mask_for_forward_and_backward(device):
    x, weight, A, B, _ = problem(device, torch.float64)

    @torch.compile(fullgraph=True)
    def step(x, A, B):
        return lora_matmul(x, weight, A, B, 2.0, dropout_p=0.5, training=True)

    outputs = []
    for _ in range(2):
        y = step(x, A, B)
        dy = torch.randn_like(y)
        # The update is linear in each of A, B and x: under one mask all these agree.
        update = (dy * (y - linear(x, weight))).sum()
        dx, dA, dB = torch.autograd.grad(y, (x, A, B), dy)
        for value in ((dA * A).sum(), (dB * B).sum(), ((dx - dy @ weight) * x).sum()):
            torch.testing.assert_close(value, update)
        outputs.append(y)
    assert not torch.equal(*outputs)


def test_compiled_checkpointing_replays_the_mask(device):
    x, weight, A, B, _ = problem(device, torch.float64)

    def block(x):
        return torch.exp(0.01 * lora_matmul(x, weight, A, B, 2.0, dropout_p=0.5, training=True))

    step = torch.compile(lambda x: checkpoint(block, x, use_reentrant=False), backend="aot_eager", fullgraph=True)
    y = step(x)
    dy = torch.randn_like(y)
    (dA,) = torch.autograd.grad(y, A, dy)
    update = 100 * y.log() - linear(x, weight)  # as the forward computed it
    torch.testing.assert_close((dA * A).sum(), (0.01 * dy * y * update).sum())


def test_scaling_is_not_baked_into_a_compile(device):
    x, weight, A, B, _ = problem(device)
    compiled = torch.compile(lambda s: lora_matmul(x, weight, A, B, s), fullgraph=True)
    for s in (2.0, 3.0, -0.5):
        expected = lora_matmul(x, weight, A, B, s)
        torch.testing.assert_close(compiled(s), expected)
        torch.testing.assert_close(compiled(torch.tensor(s, device=device)), expected)


@pytest.mark.parametrize("seeded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(seeded, dtype, device):
    ops = torch.ops.peftkern
    leaves = problem(device, dtype, M=7, N=33, K=65, r=3, adapter_dtype=torch.float32)
    x, weight, A, B, bias = (t.detach() for t in leaves)
    p, seed = (0.3, seed_on(device)) if seeded else (0.0, None)
    torch.library.opcheck(ops.lora_matmul_fwd.default, (x, weight, A, B, bias, 2.0, p, seed))
    torch.library.opcheck(ops.lora_matmul_fwd.default, (x[:0], weight, A, B, None, 2.0, p, seed))
    _, S = ops.lora_matmul_fwd(x, weight, A, B, None, 2.0, p, seed)
    dy = torch.randn(7, 33, device=device).to(dtype)
    torch.library.opcheck(ops.lora_matmul_bwd.default, (dy, x, weight, A, B, S, seed, 2.0, p, True, True, True))
    for needs, given_ in [
        ((True, False, False), (None, weight, None)),
        ((False, True, False), (x, None, None)),
        ((False, False, True), (None, None, S)),
    ]:
        x_, w_, S_ = given_
        torch.library.opcheck(ops.lora_matmul_bwd.default, (dy, x_, w_, A, B, S_, seed, 2.0, p, *needs))


@pytest.mark.parametrize("weight_dtype", FLOATS)
def test_autocast_casts_as_linear_does(weight_dtype, device):
    x, weight, A, B, bias = problem(device)
    with torch.autocast(device.type, torch.bfloat16):
        y = lora_matmul(x, weight.to(weight_dtype), A, B, 2.0, bias=bias)
        y.float().square().sum().backward()  # within autocast, too
    assert y.dtype == torch.bfloat16
    assert all(t.grad.dtype == torch.float32 for t in (x, A, B, bias))
    eager = reference.formula(x.bfloat16(), weight.bfloat16(), A, B, 2.0, bias)
    assert_within(y, eager, reference.formula(*(t.double() for t in (x, weight, A, B)), 2.0, bias.double()))


def test_backward_under_autocast_keeps_the_forwards_dtype(backend, device):
    x, weight, A, B, bias = problem(device)
    grads = []
    for enabled in (False, True):
        y = lora_matmul_seeded(x, weight, A, B, 2.0, bias=bias, dropout_p=0.3, seed=seed_on(device))
        with torch.autocast(device.type, torch.bfloat16, enabled=enabled):
            grads.append(torch.autograd.grad(y, (x, A, B, bias), torch.ones_like(y)))
    for a, b in zip(*grads):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", FLOATS)
def test_an_nf4_base_equals_its_dense_weight(dtype, device):
    x, weight, A, B, bias = problem(device, dtype, M=function.FEW_TOKENS + 1)
    q = quantize_nf4(weight)
    for p, seed in ((0.0, None), (0.3, seed_on(device))):
        runs = []
        for base in (q, q.dequantize(dtype)):
            y = lora_matmul_seeded(x, base, A, B, 2.0, bias=bias, dropout_p=p, seed=seed)
            runs.append((y, *torch.autograd.grad(y.float().square().sum(), (x, A, B, bias))))
        assert all(torch.equal(a, b) for a, b in zip(*runs))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("M", [1, 2, 6, function.FEW_TOKENS])
def test_few_tokens_read_an_nf4_base_as_it_is_stored(M, dtype, device, monkeypatch):
    x, weight, A, B, bias = problem(device, dtype, M=M, K=128)
    q = quantize_nf4(weight)

    def run(dtype, base):
        args = [t.detach().to(dtype).requires_grad_() for t in (x, A, B, bias)]
        if base is q:
            y = lora_matmul_seeded(args[0], q, args[1], args[2], 2.0, bias=args[3])
        else:
            y = reference.formula(args[0], base, args[1], args[2], 2.0, args[3])
        return y, lambda: torch.autograd.grad(y, args, torch.ones_like(y))

    with monkeypatch.context() as patch:
        patch.setattr(function, "dense_weight", None)  # not called
        y, backward = run(dtype, q)
    eager, eager_backward = run(dtype, q.dequantize(dtype))
    truth, truth_backward = run(torch.float64, q.dequantize(torch.float64))
    assert_within(y, eager, truth, "y")
    for name, *grads in zip(("dx", "dA", "dB", "dbias"), backward(), eager_backward(), truth_backward()):
        assert_within(*grads, name)
