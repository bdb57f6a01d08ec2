"""LoRA MLP beyond its spec: gradients, memory, dropout's masks, compile, autocast."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from lora_projections import activations, leaves, pointers, projection, saved_by, seeds_on
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from peftkern import lora_mlp, quantize_nf4
from peftkern.ops._activations import activate
from peftkern.ops._projection import PIECES, pack
from peftkern.ops.lora_matmul.function import lora_matmul_seeded
from peftkern.ops.lora_mlp import function, reference
from peftkern.ops.lora_mlp.function import lora_mlp_seeded
from peftkern.ops.lora_mlp.op import ACTIVATIONS
from peftkern.ops.lora_mlp.spec import SPECS
from peftkern.testing.checks import check_case
from peftkern.testing.numerics import assert_within, to_float64

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
SPEC = SPECS[0]
GATE_A, GATE_B, GATE_BIAS, UP_A, UP_B, UP_BIAS, DOWN_A, DOWN_B, DOWN_BIAS = range(9)  # as `leaves` has them


@pytest.fixture(params=["dispatched", "reference"])
def backend(request, monkeypatch):
    """The backend that owns the device, and the reference in its place."""
    if request.param == "reference":
        monkeypatch.setattr(function, "_ops", reference)
    return request.param


def problem(device, dtype=torch.float32, M=6, H=40, I=56, r=(5, 3, 4), **more):  # noqa: E741
    """x, and gate, up and down."""
    shapes = ((I, H), (I, H), (H, I))
    group = [
        projection(*shape, rank, device, dtype, scaling=scaling, **more)
        for shape, rank, scaling in zip(shapes, r, (2.0, 0.5, 1.5))
    ]
    return activations(M, H, device, dtype), group


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_reference_keeps_the_spec_too(dtype, device, monkeypatch):
    monkeypatch.setattr(function, "_ops", reference)
    for case in SPEC.test_cases(device.type):
        check_case(SPEC, case, dtype, device)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("nf4", "dropout_p"), [(False, 0.0), (True, 0.4)])
def test_gradcheck_in_float64(activation, nf4, dropout_p, backend, device):
    x, group = problem(device, torch.float64, M=3, H=6, I=8, r=(2, 1, 3), nf4=nf4)
    seeds = seeds_on(device, 3) if dropout_p else None
    scaling = torch.tensor(0.7, dtype=torch.float64, device=device, requires_grad=True)

    def run(x, scaling, *tensors):
        own = iter(tensors)
        gate, up, down = (replace(p, lora_A=next(own), lora_B=next(own), bias=next(own)) for p in group)
        down = replace(down, scaling=scaling)
        return lora_mlp_seeded(x, gate, up, down, activation=activation, dropout_p=dropout_p, seeds=seeds)

    assert torch.autograd.gradcheck(run, (x, scaling, *leaves(*group)))


@pytest.mark.parametrize(
    "wanted",
    [{"x"}, {GATE_A}, {UP_B}, {GATE_BIAS}, {DOWN_A}, {DOWN_B}, {DOWN_BIAS}, {GATE_B, DOWN_B}, {"x", DOWN_A}, set()],
)
def test_any_subset_of_gradients(wanted, backend, device):
    x, group = problem(device, nf4=True)
    names = ["x", *range(9)]

    def run(wanted):
        tensors = [t.detach().requires_grad_(name in wanted) for name, t in zip(names, (x, *leaves(*group)))]
        own = iter(tensors[1:])
        changed = [replace(p, lora_A=next(own), lora_B=next(own), bias=next(own)) for p in group]
        y = lora_mlp_seeded(tensors[0], *changed, dropout_p=0.3, seeds=seeds_on(device, 3))
        if wanted:
            y.square().sum().backward()
        return y, {name: t.grad for name, t in zip(names, tensors)}

    y, grads = run(wanted)
    full_y, full_grads = run(set(names))
    assert torch.equal(y, full_y)
    assert y.requires_grad == bool(wanted)
    for name, grad in grads.items():
        assert (grad is not None) == (name in wanted)
        if grad is not None:
            torch.testing.assert_close(grad, full_grads[name], rtol=1e-5, atol=1e-4)


def test_double_backward_is_refused(backend, device):
    x, group = problem(device)
    (dx,) = torch.autograd.grad(lora_mlp(x, *group).pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_a_second_backward_gives_the_same(backend, device):
    x, group = problem(device, torch.bfloat16)
    y = lora_mlp_seeded(x, *group, dropout_p=0.3, seeds=seeds_on(device, 3))
    dy = torch.randn_like(y)
    first, second = (torch.autograd.grad(y, (x, *leaves(*group)), dy, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("nf4", [False, True])
def test_each_projection_is_a_lora_matmul_with_its_seed(activation, nf4, device):
    """The masks are lora_matmul's: gate's and up's over x, down's over h."""
    x, group = problem(device, M=33, H=101, I=131, nf4=nf4)
    seeds = seeds_on(device, 3)

    def project(x, index):
        p, seed = group[index], seeds[index : index + 1]
        return lora_matmul_seeded(x, p.weight, p.lora_A, p.lora_B, p.scaling, bias=p.bias, dropout_p=0.5, seed=seed)

    y = lora_mlp_seeded(x, *group, activation=activation, dropout_p=0.5, seeds=seeds)
    expected = project(activate(project(x, 0), activation) * project(x, 1), 2)
    dy = torch.randn_like(y)
    results = [(t, *torch.autograd.grad(t, (x, *leaves(*group)), dy)) for t in (y, expected)]
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=0, atol=float(b.detach().abs().max()) * 1e-5)


@pytest.mark.parametrize("nf4", [False, True])
def test_of_the_inner_width_two_tensors_are_saved(nf4, backend, device):
    M, H, I, r = 64, 96, 160, (4, 2, 3)  # noqa: E741
    x, group = problem(device, M=M, H=H, I=I, r=r, nf4=nf4)
    saved, _ = saved_by(lambda: lora_mlp(x, *group, dropout_p=0.2, training=True))
    shared = pointers(*group)
    own = [t for t in saved if t.data_ptr() not in shared and t.data_ptr() != x.data_ptr()]
    assert sum(t.nbytes for t in own) == M * (2 * I + sum(r)) * 4 + 3 * 8  # gate(x), up(x), the S, the seeds
    assert sum(t.data_ptr() == x.data_ptr() for t in saved) == 1
    with torch.no_grad():
        saved, _ = saved_by(lambda: lora_mlp(x, *group))
    assert not saved


def test_what_no_gradient_needs_is_not_saved(backend, device):
    M, H, I = 64, 96, 160  # noqa: E741
    x, group = problem(device, M=M, H=H, I=I)
    weights = [p.weight.data_ptr() for p in group]

    def saved_for(wanted):
        own = iter(t.detach().requires_grad_(index in wanted) for index, t in enumerate(leaves(*group)))
        changed = [replace(p, lora_A=next(own), lora_B=next(own), bias=next(own)) for p in group]
        saved, _ = saved_by(lambda: lora_mlp(x.detach(), *changed))
        return [t.data_ptr() for t in saved], sum(t.shape == (M, I) for t in saved)

    saved, inner = saved_for({DOWN_B})
    assert inner == 0
    assert not {x.data_ptr(), *weights} & set(saved)
    saved, inner = saved_for({DOWN_A})
    assert inner == 2
    assert not {x.data_ptr(), *weights} & set(saved)
    saved, inner = saved_for({GATE_B})
    assert inner == 2
    assert {x.data_ptr(), *weights} & set(saved) == {weights[2]}
    saved, inner = saved_for({GATE_A})
    assert {x.data_ptr(), *weights} & set(saved) == {x.data_ptr(), weights[2]}


def test_fewer_dimensions_and_more(device):
    x, group = problem(device)
    y = lora_mlp(x, *group)
    torch.testing.assert_close(lora_mlp(x[0], *group), y[0])
    assert torch.equal(lora_mlp(x.view(2, 1, 3, 40), *group), y.view(2, 1, 3, 40))
    assert lora_mlp(x[:0].view(2, 0, 40), *group).shape == (2, 0, 40)


def test_runs_are_bitwise_equal(device):
    x, group = problem(device, torch.bfloat16, M=300, H=130, I=257, r=(16, 16, 16))

    def run():
        y = lora_mlp_seeded(x, *group, dropout_p=0.1, seeds=seeds_on(device, 3))
        return y, *torch.autograd.grad(y.float().square().sum(), (x, *leaves(*group)))

    first = run()
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(run(), first))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("nf4", [False, True])
def test_many_runs_on_a_gpu_are_bitwise_equal(nf4):
    device = torch.device("cuda")
    x, group = problem(device, torch.bfloat16, M=2999, H=1032, I=1096, r=(16, 16, 16), nf4=nf4)

    def run():
        y = lora_mlp_seeded(x, *group, dropout_p=0.1, seeds=seeds_on(device, 3))
        return y, *torch.autograd.grad(y.float().square().sum(), (x, *leaves(*group)))

    first = run()
    for i in range(200):
        assert all(torch.equal(a, b) for a, b in zip(run(), first)), f"run {i}"


def test_dropout_is_off_unless_training_and_each_call_draws_anew(device):
    x, group = problem(device)
    plain = lora_mlp(x, *group)
    state = torch.get_rng_state()
    assert torch.equal(lora_mlp(x, *group, dropout_p=0.5), plain)
    assert torch.equal(lora_mlp(x, *group, dropout_p=0.0, training=True), plain)
    assert torch.equal(torch.get_rng_state(), state), "no dropout, no random numbers"
    torch.manual_seed(1)
    first, second = (lora_mlp(x, *group, dropout_p=0.5, training=True) for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(lora_mlp(x, *group, dropout_p=0.5, training=True), first)


@pytest.mark.parametrize("nf4", [False, True])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_replays_the_masks(use_reentrant, nf4, device):
    x, group = problem(device, nf4=nf4)
    wanted = (x, *leaves(*group))

    def block(x):
        return lora_mlp(x + lora_mlp(x, *group, dropout_p=0.5, training=True), *group, dropout_p=0.5, training=True)

    def grads(run):
        torch.manual_seed(7)
        for leaf in wanted:
            leaf.grad = None
        run(x).square().sum().backward()
        return [leaf.grad for leaf in wanted]

    plain = grads(block)
    again = grads(lambda x: checkpoint(block, x, use_reentrant=use_reentrant))
    assert all(torch.equal(a, b) for a, b in zip(again, plain))


@pytest.mark.parametrize(
    ("nf4", "dtype", "compiler"),
    [(False, torch.bfloat16, "aot_eager"), (True, torch.bfloat16, "aot_eager"), (True, torch.float32, "inductor")],
)
def test_compiles_without_graph_breaks(nf4, dtype, compiler, device):
    x, group = problem(device, dtype, adapter_dtype=torch.float32, nf4=nf4)

    def step(x, group):
        return lora_mlp(x.tanh(), *group, activation="gelu").sigmoid()

    eager, compiled = step(x, group), torch.compile(step, backend=compiler, fullgraph=True)(x, group)
    torch.testing.assert_close(compiled, eager, rtol=0, atol=4 * torch.finfo(dtype).eps)
    dy = torch.randn_like(eager)
    for a, b in zip(*(torch.autograd.grad(y, (x, *leaves(*group)), dy) for y in (compiled, eager))):
        torch.testing.assert_close(a, b, rtol=0, atol=float(b.detach().abs().max()) * 8 * torch.finfo(dtype).eps)


def test_compiled_dropout_has_one_mask_for_forward_and_backward(device):
    x, group = problem(device, torch.float64, bias=False)

    @torch.compile(fullgraph=True)
    def step(x, group):
        return lora_mlp(x, *group, dropout_p=0.5, training=True)

    y = step(x, group)
    dy = torch.randn_like(y)
    dA, dB, d_up = torch.autograd.grad(y, (group[2].lora_A, group[2].lora_B, group[1].lora_B), dy)
    # down's update is linear in A and in B, under one mask in forward and backward.
    torch.testing.assert_close((dA * group[2].lora_A).sum(), (dB * group[2].lora_B).sum())
    assert d_up.any()


def test_scaling_is_not_baked_into_a_compile(device):
    x, group = problem(device)
    compiles = []

    def counting(graph, inputs):
        compiles.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(lambda s: lora_mlp(x, *[replace(p, scaling=s) for p in group]), backend=counting)
    for s in (2.0, 3.0, -0.5, 0.25, 7.0):
        expected = lora_mlp(x, *[replace(p, scaling=s) for p in group])
        torch.testing.assert_close(compiled(s), expected, rtol=1e-5, atol=1e-4)
    assert len(compiles) <= 2, "one graph for the first number, one for every other"


@pytest.mark.parametrize("seeded", [False, True])
@pytest.mark.parametrize("nf4", [False, True])
def test_opcheck(seeded, nf4, device):
    ops = torch.ops.peftkern
    x, group = problem(device, torch.bfloat16, M=7, H=33, I=65, r=(3, 0, 5), adapter_dtype=torch.float32, nf4=nf4)
    x = x.detach()
    detached = pytree.tree_map(lambda t: t.detach() if isinstance(t, torch.Tensor) else t, group)
    lora_A, lora_B, biases, scalings, pieces, layouts = map(list, pack(detached, x))
    biases[1] = None
    p, seeds = (0.3, seeds_on(device, 3)) if seeded else (0.0, None)
    adapters = (lora_A, lora_B)
    rest = (biases, scalings, p, seeds, "silu")
    torch.library.opcheck(ops.lora_mlp_fwd.default, (x, pieces, layouts, *adapters, *rest))
    torch.library.opcheck(ops.lora_mlp_fwd.default, (x[:0], pieces, layouts, *adapters, *rest))
    y, e, g, S, S_down = ops.lora_mlp_fwd(x, pieces, layouts, *adapters, *rest)
    dy = torch.randn_like(y)
    none, down_alone = [None] * len(pieces), [None] * (2 * PIECES) + pieces[2 * PIECES :]
    no = [False] * 3
    for x_, e_, g_, pieces_, S_, S_down_, *needs in [
        (x, e, g, pieces, S, S_down, True, [True, False, True], [True, False, True], [True] * 3),
        (None, e, g, pieces, None, None, True, no, no, no),
        (x, e, g, down_alone, S, None, False, [True, False, False], [True, False, False], no),
        (None, e, g, none, None, None, False, [False, False, True], no, no),
        (None, None, None, none, None, S_down, False, no, [False, False, True], [False, False, True]),
    ]:
        args = (dy, x_, e_, g_, pieces_, layouts, *adapters, S_, S_down_, seeds, scalings, p, "silu", *needs)
        torch.library.opcheck(ops.lora_mlp_bwd.default, args)


@pytest.mark.parametrize("weight_dtype", FLOATS)
def test_autocast_casts_as_linear_does(weight_dtype, device):
    x, group = problem(device, M=33)
    with torch.autocast(device.type, torch.bfloat16):
        y = lora_mlp(x, *[replace(p, weight=p.weight.to(weight_dtype)) for p in group])
        y.float().square().sum().backward()  # within autocast, too
    assert y.dtype == torch.bfloat16
    assert all(t.grad.dtype == torch.float32 for t in (x, *leaves(*group)))
    eager = reference.formula(x.bfloat16(), *[replace(p, weight=p.weight.bfloat16()) for p in group])
    assert_within(y, eager, reference.formula(x.double(), *pytree.tree_map(to_float64, group)))


def test_backward_under_autocast_keeps_the_forwards_dtype(backend, device):
    x, group = problem(device)
    grads = []
    for enabled in (False, True):
        y = lora_mlp_seeded(x, *group, dropout_p=0.3, seeds=seeds_on(device, 3))
        with torch.autocast(device.type, torch.bfloat16, enabled=enabled):
            grads.append(torch.autograd.grad(y, (x, *leaves(*group)), torch.ones_like(y)))
    assert all(torch.equal(a, b) for a, b in zip(*grads))


@pytest.mark.parametrize("dtype", FLOATS)
def test_an_nf4_base_equals_its_dense_weight(dtype, device):
    x, group = problem(device, dtype)
    packed = [replace(p, weight=quantize_nf4(p.weight)) for p in group]
    runs = []
    for base in (packed, [replace(p, weight=p.weight.dequantize(dtype)) for p in packed]):
        y = lora_mlp_seeded(x, *base, dropout_p=0.3, seeds=seeds_on(device, 3))
        runs.append((y, *torch.autograd.grad(y.float().square().sum(), (x, *leaves(*group)))))
    assert all(torch.equal(a, b) for a, b in zip(*runs))


def test_non_finite_values_stay_in_their_rows(backend, device):
    x, group = problem(device)
    clean = lora_mlp(x, *group)
    with torch.no_grad():
        x[2, 3], x[4, 0] = torch.nan, torch.inf
    y = lora_mlp(x, *group)
    assert not y[[2, 4]].isfinite().any()
    assert torch.equal(y[[0, 1, 3, 5]], clean[[0, 1, 3, 5]])


@pytest.mark.parametrize("names", [(), ("gate",), ("down",), ("gate", "up", "down")])
def test_a_projection_may_lack_its_adapter(names, backend, device):
    x, group = problem(device)
    bare = [
        replace(p, lora_A=None, lora_B=None) if name in names else p for name, p in zip(("gate", "up", "down"), group)
    ]
    y, expected = lora_mlp(x, *bare), reference.formula(x, *bare)
    dy = torch.randn_like(y)
    wanted = (x, *leaves(*bare))
    results = [(t, *torch.autograd.grad(t, wanted, dy)) for t in (y, expected)]
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=0, atol=float(b.detach().abs().max()) * 1e-5)
