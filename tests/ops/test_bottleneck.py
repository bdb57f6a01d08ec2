"""The bottleneck adapter beyond its spec: gradients, memory, dropout's replay, compile, autocast, bad input."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from peftkern import bottleneck
from peftkern.ops._dropout import draw_seed
from peftkern.ops.bottleneck import function, reference
from peftkern.ops.bottleneck.function import bottleneck_seeded
from peftkern.ops.bottleneck.op import ACTIVATIONS
from peftkern.ops.bottleneck.spec import SPECS
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


def problem(device, dtype=torch.float32, M=6, H=40, b=7, adapter_dtype=None):
    """x, down_weight, down_bias, up_weight, up_bias, residual: leaves that want gradients."""
    adapter = adapter_dtype or dtype
    shapes = ((M, H), (b, H), (b,), (H, b), (H,), (M, H))
    scales = (1.0, H**-0.5, 0.3, b**-0.5, 0.3, 1.0)
    dtypes = (dtype, adapter, adapter, adapter, adapter, dtype)
    return tuple(
        (torch.randn(shape, device=device) * scale).to(kind).requires_grad_()
        for shape, scale, kind in zip(shapes, scales, dtypes)
    )


def seed_on(device, value=987654321):
    return torch.tensor([value], device=device)


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_reference_keeps_the_spec_too(dtype, device, monkeypatch):
    monkeypatch.setattr(function, "_ops", reference)
    for case in SPEC.test_cases(device.type):
        check_case(SPEC, case, dtype, device)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("own_residual", [False, True])
def test_gradcheck_in_float64(activation, own_residual, backend, device):
    *leaves, residual = problem(device, torch.float64, M=4, H=6, b=3)
    scaling = torch.tensor(0.7, dtype=torch.float64, device=device, requires_grad=True)

    def run(x, down, down_bias, up, up_bias, residual, scaling):
        return bottleneck_seeded(
            x,
            down,
            down_bias,
            up,
            up_bias,
            activation=activation,
            dropout_p=0.4,
            scaling=scaling,
            residual=residual if own_residual else None,
            seed=seed_on(device),
        )

    if own_residual:
        assert torch.autograd.gradcheck(run, (*leaves, residual, scaling))
    else:
        assert torch.autograd.gradcheck(lambda *a: run(*a[:5], None, a[5]), (*leaves, scaling))


@pytest.mark.parametrize("wanted", [{0}, {1}, {2}, {3}, {4}, {5}, {1, 3}, {0, 4}, set()])
def test_any_subset_of_gradients(wanted, backend, device):
    tensors = problem(device)

    def run(names):
        leaves = [t.detach().requires_grad_(i in names) for i, t in enumerate(tensors)]
        y = bottleneck_seeded(*leaves[:5], residual=leaves[5], dropout_p=0.3, seed=seed_on(device))
        if names:
            y.square().sum().backward()
        return y, [t.grad for t in leaves]

    y, grads = run(wanted)
    full_y, full_grads = run(range(6))
    assert y.requires_grad == bool(wanted)
    assert torch.equal(y, full_y)
    for i, (grad, full) in enumerate(zip(grads, full_grads)):
        assert (grad is not None) == (i in wanted)
        if grad is not None:
            assert torch.equal(grad, full)


def test_double_backward_is_refused(backend, device):
    *leaves, _ = problem(device)
    (dx,) = torch.autograd.grad(bottleneck(*leaves).pow(2).sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_only_x_and_the_small_pre_activation_are_saved(backend, device):
    M, b = 64, 8
    *leaves, residual = problem(device, M=M, H=96, b=b)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        bottleneck(*leaves, residual=residual, dropout_p=0.2, training=True)
    shared = {t.data_ptr() for t in leaves}
    assert residual.data_ptr() not in {t.data_ptr() for t in saved}
    assert sum(t.nbytes for t in saved if t.data_ptr() not in shared) == M * b * 4 + 8  # pre-activation and seed


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    m=st.integers(0, 40),
    hidden=st.integers(1, 150),
    b=st.integers(1, 20),
    dtype=st.sampled_from(FLOATS),
    adapter_dtype=st.sampled_from([None, *FLOATS]),
    activation=st.sampled_from(ACTIVATIONS),
    dropout_p=st.sampled_from([0.0, 0.1, 0.9]),
    own_residual=st.booleans(),
    layouts=st.tuples(*[st.sampled_from(["contiguous", "transposed", "sliced", "expanded"])] * 4),
)
def test_ragged_shapes_and_strides(m, hidden, b, dtype, adapter_dtype, activation, dropout_p, own_residual, layouts):
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
        tensors = [
            matrix(m, hidden, 1.0, dtype, layouts[0]),
            matrix(b, hidden, hidden**-0.5, adapter, layouts[1]),
            torch.randn(b).to(adapter),
            matrix(hidden, b, b**-0.5, adapter, layouts[1]),
            torch.randn(hidden).to(adapter),
            matrix(m, hidden, 1.0, dtype, layouts[2]) if own_residual else None,
        ]
        dy = matrix(m, hidden, 1.0, dtype, layouts[3])
        seed = draw_seed(dy.device) if dropout_p else None
        options = {"activation": activation, "dropout_p": dropout_p, "scaling": 0.5, "seed": seed}

        def run(f, cast):
            leaves = [t if t is None else cast(t).detach().requires_grad_() for t in tensors]
            y = f(*leaves[:5], residual=leaves[5], **options)
            y.backward(cast(dy))
            return [y, *(t.grad for t in leaves if t is not None)]

        same = torch.Tensor.detach
        return run(bottleneck_seeded, same), run(reference.formula, same), run(reference.formula, torch.Tensor.double)

    # The error rule compares largest errors: a few elements, or many alike, are too small a sample of them.
    draws = range(max(math.ceil(64 / min(hidden, b)), 16 * ("expanded" in layouts)))
    names = ("y", "dx", "d_down", "d_down_bias", "d_up", "d_up_bias", "d_residual")
    for what, *results in zip(names, *(zip(*kind) for kind in zip(*map(draw, draws)))):
        assert_within(*(torch.stack(values) for values in results), what)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_it_is_the_module_it_stands_for(activation, device):
    x, down, down_bias, up, up_bias, _ = problem(device)
    act = {
        "gelu": torch.nn.GELU(),
        "gelu_tanh": torch.nn.GELU(approximate="tanh"),
        "relu": torch.nn.ReLU(),
        "silu": torch.nn.SiLU(),
    }[activation]
    expected = x + torch.nn.functional.linear(act(torch.nn.functional.linear(x, down, down_bias)), up, up_bias)
    torch.testing.assert_close(bottleneck(x, down, down_bias, up, up_bias, activation=activation), expected)


def test_a_wider_residual_widens_the_sum(device):
    *leaves, _ = problem(device, torch.bfloat16)
    residual = torch.randn(6, 40, device=device, requires_grad=True)
    y = bottleneck(*leaves, residual=residual)
    assert y.dtype == torch.float32
    update = bottleneck(*leaves, residual=torch.zeros_like(residual))
    torch.testing.assert_close(y, residual + update)
    dy = torch.randn_like(y)
    grads = torch.autograd.grad(y, (*leaves, residual), dy)
    assert [g.dtype for g in grads] == [torch.bfloat16] * 5 + [torch.float32]
    assert torch.equal(grads[-1], dy)


def test_non_finite_values_stay_in_their_rows(backend, device):
    x, *rest, _ = problem(device)
    clean = bottleneck(x, *rest)
    with torch.no_grad():
        x[2, 3] = math.nan
    y = bottleneck(x, *rest)
    assert y[2].isnan().all()
    assert torch.equal(y[[0, 1, 3, 4, 5]], clean[[0, 1, 3, 4, 5]])


def test_runs_are_bitwise_equal(device):
    *leaves, _ = problem(device, torch.bfloat16, M=300, H=257, b=24)

    def run():
        y = bottleneck_seeded(*leaves, dropout_p=0.1, seed=seed_on(device))
        return y, *torch.autograd.grad(y.float().square().sum(), leaves)

    first = run()
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(run(), first))


def test_dropout_is_off_unless_training_and_each_call_draws_anew(device):
    *leaves, _ = problem(device)
    plain = bottleneck(*leaves)
    assert torch.equal(bottleneck(*leaves, dropout_p=0.5), plain)
    torch.manual_seed(1)
    first, second = (bottleneck(*leaves, dropout_p=0.5, training=True) for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(bottleneck(*leaves, dropout_p=0.5, training=True), first)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_replays_the_mask(use_reentrant, device):
    x, *rest, _ = leaves = problem(device)

    def block(x):
        return bottleneck(
            bottleneck(x, *rest, dropout_p=0.5, training=True).tanh(), *rest, dropout_p=0.5, training=True
        )

    def grads(run):
        torch.manual_seed(7)
        for leaf in leaves:
            leaf.grad = None
        run(x).square().sum().backward()
        return [leaf.grad for leaf in leaves[:5]]

    plain = grads(block)
    recomputed = grads(lambda x: checkpoint(block, x, use_reentrant=use_reentrant))
    assert all(torch.equal(a, b) for a, b in zip(recomputed, plain))


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("own_residual", [False, True])
def test_compiles_without_graph_breaks(compiler, own_residual, device):
    *leaves, residual = problem(device)

    def step(*leaves):
        return bottleneck(*leaves[:5], residual=leaves[5] if own_residual else None)

    wanted = (*leaves, residual)[: 5 + own_residual]
    eager, compiled = step(*leaves, residual), torch.compile(step, backend=compiler, fullgraph=True)(*leaves, residual)
    torch.testing.assert_close(compiled, eager)
    dy = torch.randn_like(eager)
    torch.testing.assert_close(torch.autograd.grad(compiled, wanted, dy), torch.autograd.grad(eager, wanted, dy))


def test_compiled_dropout_has_one_mask_for_forward_and_backward(device):
    x, down, _, up, _, _ = problem(device, torch.float64)

    @torch.compile(fullgraph=True)
    def step(x, down, up):
        return bottleneck(x, down, None, up, None, activation="relu", dropout_p=0.5, training=True)

    y = step(x, down, up)
    dy = torch.randn_like(y)
    update = (dy * (y - x)).sum()
    dx, d_down, d_up = torch.autograd.grad(y, (x, down, up), dy)
    # With relu and no biases the update is homogeneous in each of x, down and up: under one mask all these agree.
    for value in ((d_down * down).sum(), (d_up * up).sum(), ((dx - dy) * x).sum()):
        torch.testing.assert_close(value, update)


@pytest.mark.parametrize("seeded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(seeded, dtype, device):
    ops = torch.ops.peftkern
    leaves = problem(device, dtype, M=7, H=33, b=3, adapter_dtype=torch.float32)
    x, down, down_bias, up, up_bias, residual = (t.detach() for t in leaves)
    p, seed = (0.3, seed_on(device)) if seeded else (0.0, None)
    for args in [
        (x, down, down_bias, up, up_bias, None, "gelu", 1.0, p, seed),
        (x, down, None, up, None, residual.float(), "silu", 0.5, p, seed),
        (x[:0], down, down_bias, up, up_bias, None, "relu", 1.0, p, seed),
    ]:
        torch.library.opcheck(ops.bottleneck_fwd.default, args)
    _, h = ops.bottleneck_fwd(x, down, down_bias, up, up_bias, None, "gelu", 1.0, p, seed)
    dy = torch.randn(7, 33, device=device).to(dtype)
    for needs in [(True,) * 5, (True, False, False, False, False), (False, True, False, True, False)]:
        x_ = x if needs[1] else None
        torch.library.opcheck(
            ops.bottleneck_bwd.default, (dy, x_, down, up, h, seed, "gelu_tanh", 0.5, p, True, *needs)
        )


@pytest.mark.parametrize("own_residual", [False, True])
def test_autocast_multiplies_low_and_adds_the_residual_as_it_is(own_residual, device):
    x, *rest, residual = problem(device)
    with torch.autocast(device.type, torch.bfloat16):
        y = bottleneck(x, *rest, residual=residual if own_residual else None)
        y.square().sum().backward()
    assert y.dtype == torch.float32
    skip = residual if own_residual else x
    eager = skip + (reference.formula(x.bfloat16(), *rest, residual=torch.zeros_like(x).bfloat16())).float()
    truth = reference.formula(*(t.double() for t in (x, *rest)), residual=skip.double())
    assert_within(y, eager, truth)
    leaves = (x, *rest, residual) if own_residual else (x, *rest)
    assert all(t.grad.dtype == torch.float32 for t in leaves)


def test_backward_under_autocast_keeps_the_forwards_dtype(backend, device):
    *leaves, _ = problem(device)
    grads = []
    for enabled in (False, True):
        y = bottleneck_seeded(*leaves, dropout_p=0.3, seed=seed_on(device))
        with torch.autocast(device.type, torch.bfloat16, enabled=enabled):
            grads.append(torch.autograd.grad(y, leaves, torch.ones_like(y)))
    for a, b in zip(*grads):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": lambda t: t[:, :9]}, r"x \[\*, H\] and down_weight \[b, H\] must share H.*transposed"),
        ({"x": lambda t: t.long()}, "x must be float32.*int64; cast"),
        ({"down_weight": lambda t: t.t()}, "is down_weight transposed"),
        ({"down_weight": lambda t: t[:0]}, "down_weight is empty.*FSDP"),
        ({"down_weight": lambda t: t[0]}, "down_weight must be a matrix"),
        ({"up_weight": lambda t: t.t()}, r"up_weight must be \[H, b\] = \[40, 7\].*transposed"),
        ({"up_weight": lambda t: t.to("meta")}, "up_weight is on meta but x is on cpu.*to_empty"),
        ({"down_bias": lambda t: t[:3]}, r"down_bias must have shape \[7\]"),
        ({"up_bias": lambda t: t[:3]}, r"up_bias must have shape \[40\]"),
        ({"up_bias": 1.0}, "up_bias must be a torch.Tensor, got float"),
        ({"residual": lambda t: t[:2]}, "residual must have x's shape"),
        ({"activation": "tanh"}, "activation must be one of gelu, gelu_tanh, relu, silu, got 'tanh'"),
        ({"scaling": math.nan}, "scaling must be finite"),
        ({"scaling": torch.ones(2)}, "0-dim tensor"),
        ({"dropout_p": 1.0}, r"dropout_p must be in \[0, 1\), got 1.0"),
    ],
)
def test_bad_input_is_named(changes, message):
    names = ("x", "down_weight", "down_bias", "up_weight", "up_bias", "residual")
    args = dict(zip(names, problem(torch.device("cpu"))))
    args |= {name: new(args[name]) if callable(new) else new for name, new in changes.items()}
    with pytest.raises((ValueError, TypeError), match=message) as error:
        bottleneck(**args)
    assert "\n" not in str(error.value)
