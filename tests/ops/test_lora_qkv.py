"""LoRA QKV beyond its spec: gradients, memory, dropout's masks, compile, autocast."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from lora_projections import SCALINGS, activations, leaves, pointers, projection, saved_by, seeds_on
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from benchmarks.timing import peak_extra_bytes
from peftkern import LoRAProjection, lora_matmul, lora_qkv, quantize_nf4
from peftkern.ops._projection import pack
from peftkern.ops.lora_matmul.function import lora_matmul_seeded
from peftkern.ops.lora_qkv import function, reference
from peftkern.ops.lora_qkv.function import lora_qkv_seeded
from peftkern.ops.lora_qkv.spec import SPECS
from peftkern.testing.checks import check_case
from peftkern.testing.numerics import assert_within, to_float64

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
SPEC = SPECS[0]


@pytest.fixture(params=["dispatched", "reference"])
def backend(request, monkeypatch):
    """The backend that owns the device, and the reference in its place."""
    if request.param == "reference":
        monkeypatch.setattr(function, "_ops", reference)
    return request.param


def problem(device, dtype=torch.float32, M=6, K=40, N=(24, 16, 8), r=(5, 3, 4), **more):
    """x and grouped-query projections."""
    group = [projection(n, K, rank, device, dtype, scaling=s, **more) for n, rank, s in zip(N, r, SCALINGS)]
    return activations(M, K, device, dtype), group


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_reference_keeps_the_spec_too(dtype, device, monkeypatch):
    monkeypatch.setattr(function, "_ops", reference)
    for case in SPEC.test_cases(device.type):
        check_case(SPEC, case, dtype, device)


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("nf4", [False, True])
def test_gradcheck_in_float64(dropout_p, nf4, backend, device):
    x, group = problem(device, torch.float64, M=4, K=9, N=(6, 4, 3), r=(3, 1, 0), nf4=nf4)
    seeds = seeds_on(device, 3) if dropout_p else None
    scaling = torch.tensor(0.7, dtype=torch.float64, device=device, requires_grad=True)

    def run(x, A0, B0, bias0, A1, B1, bias1, bias2, scaling):
        q, k, v = group
        changed = [
            replace(q, lora_A=A0, lora_B=B0, bias=bias0, scaling=scaling),
            replace(k, lora_A=A1, lora_B=B1, bias=bias1),
            replace(v, bias=bias2),
        ]
        return lora_qkv_seeded(x, changed, dropout_p=dropout_p, seeds=seeds)

    assert torch.autograd.gradcheck(run, (x, *leaves(*group), scaling))


@pytest.mark.parametrize("wanted", [{"x"}, {0}, {1, 4}, {2}, {3, 7}, {"x", 8}, {0, 1, 2, 3, 4, 5, 6, 7, 8}, set()])
def test_any_subset_of_gradients(wanted, backend, device):
    x, group = problem(device, nf4=True)
    names = ["x", *range(9)]  # of the leaves in their order

    def run(wanted):
        tensors = [t.detach().requires_grad_(name in wanted) for name, t in zip(names, (x, *leaves(*group)))]
        own = iter(tensors[1:])
        changed = [replace(p, lora_A=next(own), lora_B=next(own), bias=next(own)) for p in group]
        ys = lora_qkv_seeded(tensors[0], changed, dropout_p=0.3, seeds=seeds_on(device, 3))
        if wanted:
            sum(y.square().sum() for y in ys).backward()
        return ys, {name: t.grad for name, t in zip(names, tensors)}

    ys, grads = run(wanted)
    full_ys, full_grads = run(set(names))
    for index, (y, full_y) in enumerate(zip(ys, full_ys)):
        assert torch.equal(y, full_y)
        assert y.requires_grad == bool(wanted), index
    for name, grad in grads.items():
        assert (grad is not None) == (name in wanted)
        if grad is not None:
            torch.testing.assert_close(grad, full_grads[name], rtol=1e-5, atol=1e-5)


def test_an_output_that_nobody_reads(backend, device):
    x, group = problem(device)
    ys = lora_qkv(x, group)
    got = torch.autograd.grad(ys[1].square().sum(), (x, *leaves(*group)))
    k = group[1]
    y = lora_matmul(x, k.weight, k.lora_A, k.lora_B, k.scaling, bias=k.bias)
    expected = torch.autograd.grad(y.square().sum(), (x, *leaves(k)))
    for a, b in zip((got[0], *got[4:7]), expected):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)
    assert not any(t.any() for t in (*got[1:4], *got[7:]))


def test_double_backward_is_refused(backend, device):
    x, group = problem(device)
    (dx,) = torch.autograd.grad(lora_qkv(x, group)[0].pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_a_second_backward_gives_the_same(backend, device):
    x, group = problem(device, torch.bfloat16)
    ys = lora_qkv_seeded(x, group, dropout_p=0.3, seeds=seeds_on(device, 3))
    dys = [torch.randn_like(y) for y in ys]
    first, second = (torch.autograd.grad(ys, (x, *leaves(*group)), dys, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("nf4", [False, True])
def test_each_projection_is_a_lora_matmul_with_its_seed(dtype, nf4, device):
    """The masks are lora_matmul's: outputs and gradients under one seed are."""
    x, group = problem(device, dtype, M=33, K=101, nf4=nf4)
    seeds = seeds_on(device, 3)
    ys = lora_qkv_seeded(x, group, dropout_p=0.5, seeds=seeds)
    tolerance = {"rtol": 0, "atol": 8 * torch.finfo(dtype).eps}
    for index, (y, p) in enumerate(zip(ys, group)):
        seed = seeds[index : index + 1]
        alone = lora_matmul_seeded(x, p.weight, p.lora_A, p.lora_B, p.scaling, bias=p.bias, dropout_p=0.5, seed=seed)
        torch.testing.assert_close(y, alone, **tolerance)
        dy = torch.randn_like(y) / 4
        for a, b in zip(*(torch.autograd.grad(t, leaves(p), dy, retain_graph=True) for t in (y, alone))):
            torch.testing.assert_close(a, b, rtol=0, atol=float(b.detach().abs().max()) * 4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("nf4", [False, True])
def test_x_is_saved_once_and_nothing_else_of_its_size(nf4, backend, device):
    M, r = 64, (4, 2, 3)
    x, group = problem(device, M=M, K=128, N=(96, 48, 32), r=r, nf4=nf4)
    saved, _ = saved_by(lambda: lora_qkv(x, group, dropout_p=0.2, training=True))
    shared = pointers(*group)
    own = [t for t in saved if t.data_ptr() not in shared and t.data_ptr() != x.data_ptr()]
    assert sum(t.nbytes for t in own) == M * sum(r) * 4 + 3 * 8  # S and the seeds
    assert sum(t.data_ptr() == x.data_ptr() for t in saved) == 1
    saved, _ = saved_by(lambda: lora_qkv(x.detach(), group))  # no dx: no weight
    weights = {t.data_ptr() for p in group for t in pytree.tree_leaves(p.weight)}
    assert not weights & {t.data_ptr() for t in saved}
    with torch.no_grad():
        saved, _ = saved_by(lambda: lora_qkv(x, group))
    assert not saved


def test_one_decoded_weight_is_held_at_a_time(backend, device):
    x, group = problem(device, K=512, N=(512,) * 3, nf4=True)

    def backward():
        return torch.autograd.grad(sum(ys), (x, *leaves(*group)), dy, retain_graph=True)

    ys = lora_qkv(x, group)
    dy = torch.ones_like(ys[0])
    backward()
    for run in (lambda: lora_qkv(x, group), backward):
        assert peak_extra_bytes(run, device) < 1.5 * 512 * 512 * 4


def test_fewer_dimensions_and_more(device):
    x, group = problem(device)
    ys = lora_qkv(x, group)
    for got, y in zip(lora_qkv(x[0], group), ys):
        torch.testing.assert_close(got, y[0])
    for got, y in zip(lora_qkv(x.view(2, 1, 3, 40), group), ys):
        assert torch.equal(got, y.view(2, 1, 3, -1))
    assert [y.shape for y in lora_qkv(x[:0].view(2, 0, 40), tuple(group))] == [(2, 0, 24), (2, 0, 16), (2, 0, 8)]


def test_runs_are_bitwise_equal(device):
    x, group = problem(device, torch.bfloat16, M=300, K=257, N=(130, 64, 64), r=(16, 16, 16))

    def run():
        ys = lora_qkv_seeded(x, group, dropout_p=0.1, seeds=seeds_on(device, 3))
        return *ys, *torch.autograd.grad(sum(y.float().square().sum() for y in ys), (x, *leaves(*group)))

    first = run()
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(run(), first))


def test_dropout_is_off_unless_training_and_masks_differ(device):
    x = activations(6, 40, device)
    p = projection(24, 40, 5, device)
    plain = lora_qkv(x, [p, p])
    state = torch.get_rng_state()
    for got in (lora_qkv(x, [p, p], dropout_p=0.5), lora_qkv(x, [p, p], dropout_p=0.0, training=True)):
        assert all(torch.equal(a, b) for a, b in zip(got, plain))
    assert torch.equal(torch.get_rng_state(), state), "no dropout, no random numbers"
    torch.manual_seed(1)
    first = lora_qkv(x, [p, p], dropout_p=0.5, training=True)
    assert not torch.equal(*first), "each projection has a mask of its own"
    assert not torch.equal(lora_qkv(x, [p, p], dropout_p=0.5, training=True)[0], first[0])
    torch.manual_seed(1)
    assert torch.equal(lora_qkv(x, [p, p], dropout_p=0.5, training=True)[1], first[1])


@pytest.mark.parametrize("nf4", [False, True])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_replays_the_masks(use_reentrant, nf4, device):
    x, group = problem(device, nf4=nf4)

    def block(x):
        q, k, v = lora_qkv(x, group, dropout_p=0.5, training=True)
        return q.tanh().sum(1) + k.tanh().sum(1) * v.sum(1)

    def grads(run):
        torch.manual_seed(7)
        wanted = (x, *leaves(*group))
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
    q, k, v = group

    def step(x, A, B, bias):
        changed = [LoRAProjection(q.weight, A, B, 2.0, bias), k, v]
        return tuple(y.tanh() for y in lora_qkv(x.relu(), changed))

    args = (x, q.lora_A, q.lora_B, q.bias)
    eager, compiled = step(*args), torch.compile(step, backend=compiler, fullgraph=True)(*args)
    for a, b in zip(compiled, eager):
        torch.testing.assert_close(a, b, rtol=0, atol=4 * torch.finfo(dtype).eps)
    dys = [torch.randn_like(y) for y in eager]
    for a, b in zip(*(torch.autograd.grad(ys, (x, *leaves(*group)), dys) for ys in (compiled, eager))):
        torch.testing.assert_close(a, b, rtol=0, atol=float(b.detach().abs().max()) * 8 * torch.finfo(dtype).eps)


def test_projections_are_arguments_of_a_compile(device):
    x, group = problem(device)
    compiled = torch.compile(lambda x, group: lora_qkv(x, group), backend="aot_eager", fullgraph=True)
    for a, b in zip(compiled(x, group), lora_qkv(x, group)):
        torch.testing.assert_close(a, b)


def test_compiled_dropout_has_one_mask_for_forward_and_backward(device):
    x, group = problem(device, torch.float64, bias=False)
    q = group[0]

    @torch.compile(fullgraph=True)
    def step(x, A, B):
        return lora_qkv(x, [replace(q, lora_A=A, lora_B=B), *group[1:]], dropout_p=0.5, training=True)

    y = step(x, q.lora_A, q.lora_B)[0]
    dy = torch.randn_like(y)
    # The update is linear in each of A, B and x: under one mask all these agree.
    update = (dy * (y - x @ q.weight.t())).sum()
    dx, dA, dB = torch.autograd.grad(y, (x, q.lora_A, q.lora_B), dy)
    for value in ((dA * q.lora_A).sum(), (dB * q.lora_B).sum(), ((dx - dy @ q.weight) * x).sum()):
        torch.testing.assert_close(value, update)


def test_scaling_is_not_baked_into_a_compile(device):
    x, group = problem(device)
    compiles = []

    def counting(graph, inputs):
        compiles.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(lambda s: lora_qkv(x, [replace(p, scaling=s) for p in group]), backend=counting)
    for s in (2.0, 3.0, -0.5, 0.25, 7.0):
        for a, b in zip(compiled(s), lora_qkv(x, [replace(p, scaling=s) for p in group])):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert len(compiles) <= 2, "one graph for the first number, one for every other"
    compiles.clear()
    for s in (2.0, 3.0, -0.5):
        scaling = torch.tensor(s, device=device)
        for a, b in zip(compiled(scaling), lora_qkv(x, [replace(p, scaling=scaling) for p in group])):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert len(compiles) == 1


@pytest.mark.parametrize("seeded", [False, True])
@pytest.mark.parametrize("nf4", [False, True])
def test_opcheck(seeded, nf4, device):
    ops = torch.ops.peftkern
    x, group = problem(
        device, torch.bfloat16, M=7, K=65, N=(33, 16, 8), r=(3, 0, 5), adapter_dtype=torch.float32, nf4=nf4
    )
    x = x.detach()
    detached = pytree.tree_map(lambda t: t.detach() if isinstance(t, torch.Tensor) else t, group)
    lora_A, lora_B, biases, scalings, pieces, layouts = map(list, pack(detached, x))
    biases[1] = None
    p, seeds = (0.3, seeds_on(device, 3)) if seeded else (0.0, None)
    adapters = (lora_A, lora_B)
    torch.library.opcheck(ops.lora_qkv_fwd.default, (x, pieces, layouts, *adapters, biases, scalings, p, seeds))
    torch.library.opcheck(ops.lora_qkv_fwd.default, (x[:0], pieces, layouts, *adapters, biases, scalings, p, seeds))
    ys, S = ops.lora_qkv_fwd(x, pieces, layouts, *adapters, biases, scalings, p, seeds)
    dys = [torch.randn_like(y) for y in ys]
    none = [None] * len(pieces)
    for x_, pieces_, S_, *needs in [
        (x, pieces, S, True, [True, False, True], [True, False, True]),
        (None, pieces, None, True, [False] * 3, [False] * 3),
        (x, none, None, False, [False, False, True], [False] * 3),
        (None, none, S, False, [False] * 3, [True, False, False]),
    ]:
        args = (dys, x_, pieces_, layouts, *adapters, S_, seeds, scalings, p, *needs)
        torch.library.opcheck(ops.lora_qkv_bwd.default, args)


@pytest.mark.parametrize("M", [6, 1100])
@pytest.mark.parametrize("seeded", [False, True])
@pytest.mark.parametrize("nf4", [False, True])
@pytest.mark.parametrize("ops", [torch.ops.peftkern, reference], ids=["dispatched", "reference"])
def test_dx_is_added_to_a_sum(ops, nf4, seeded, M, device):
    x, group = problem(device, M=M, N=(48, 32, 16), r=(8, 0, 16), nf4=nf4)
    with torch.no_grad():
        lora_A, lora_B, _, scalings, pieces, layouts = pack(group, x)
        p, seeds = (0.3, seeds_on(device, 3)) if seeded else (0.0, None)
        dys = [torch.randn(M, len(B), device=device) for B in lora_B]
        S = torch.randn(M, 24, device=device)
        args = (dys, x, pieces, layouts, lora_A, lora_B, S, seeds, scalings, p)
        needs = [True, False, False], [True, False, True]
        dx, *grads = ops.lora_qkv_bwd(*args, True, *needs)
        before = torch.randn_like(x)
        total = before.clone()
        added = ops.lora_qkv_bwd_add(*args, *needs, total)
    torch.testing.assert_close(total, before + dx, rtol=1e-5, atol=1e-4)
    for got, want in zip(added, grads):
        assert all(torch.equal(a, b) for a, b in zip(got, want))


def test_opcheck_of_the_sum(device):
    """Schema and shapes: it is for other ops, not for torch.compile."""
    op = torch.ops.peftkern.lora_qkv_bwd_add.default
    x, group = problem(device, torch.bfloat16)
    detached = pytree.tree_map(lambda t: t.detach() if isinstance(t, torch.Tensor) else t, group)
    lora_A, lora_B, _, scalings, pieces, layouts = map(list, pack(detached, x.detach()))
    dys = [torch.randn(6, len(B), dtype=x.dtype, device=device) for B in lora_B]
    S = torch.randn(6, 12, dtype=x.dtype, device=device)
    needs = [True, False, True], [True, True, False]
    args = (dys, x.detach(), pieces, layouts, lora_A, lora_B, S, None, scalings, 0.0, *needs, torch.zeros_like(x))
    torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("weight_dtype", FLOATS)
def test_autocast_casts_as_linear_does(weight_dtype, device):
    x, group = problem(device)
    cast = [replace(p, weight=p.weight.to(weight_dtype)) for p in group]
    with torch.autocast(device.type, torch.bfloat16):
        ys = lora_qkv(x, cast)
        sum(y.float().square().sum() for y in ys).backward()  # within autocast, too
    assert all(t.grad.dtype == torch.float32 for t in (x, *leaves(*group)))
    half = [replace(p, weight=p.weight.bfloat16()) for p in group]
    eager = reference.formula(x.bfloat16(), half)
    truth = reference.formula(x.double(), pytree.tree_map(to_float64, group))
    for y, a, b in zip(ys, eager, truth):
        assert y.dtype == torch.bfloat16
        assert_within(y, a, b)


def test_backward_under_autocast_keeps_the_forwards_dtype(backend, device):
    x, group = problem(device)
    grads = []
    for enabled in (False, True):
        ys = lora_qkv_seeded(x, group, dropout_p=0.3, seeds=seeds_on(device, 3))
        with torch.autocast(device.type, torch.bfloat16, enabled=enabled):
            grads.append(torch.autograd.grad(ys, (x, *leaves(*group)), [torch.ones_like(y) for y in ys]))
    assert all(torch.equal(a, b) for a, b in zip(*grads))


@pytest.mark.parametrize("dtype", FLOATS)
def test_an_nf4_base_equals_its_dense_weight(dtype, device):
    x, group = problem(device, dtype)
    packed = [replace(p, weight=quantize_nf4(p.weight)) for p in group]
    runs = []
    for base in (packed, [replace(p, weight=p.weight.dequantize(dtype)) for p in packed]):
        ys = lora_qkv_seeded(x, base, dropout_p=0.3, seeds=seeds_on(device, 3))
        loss = sum(y.float().square().sum() for y in ys)
        runs.append((*ys, *torch.autograd.grad(loss, (x, *leaves(*group)))))
    assert all(torch.equal(a, b) for a, b in zip(*runs))


def test_a_projection_is_a_pytree_node(device):
    p = projection(24, 40, 5, device, nf4=True)
    tensors, structure = pytree.tree_flatten(p)
    again = pytree.tree_unflatten(tensors, structure)
    assert isinstance(again, LoRAProjection)
    assert again.lora_A is p.lora_A
    assert again.scaling == p.scaling


def test_strides_change_nothing(backend, device):
    """Transposed and sliced weights, adapters and gradients give what contiguous ones give."""
    x, group = problem(device, M=16)

    def strided(t):
        return t.detach().t().contiguous().t() if t.shape[0] % 2 else t.detach().repeat_interleave(2, dim=1)[:, ::2]

    def run(change, expand):
        changed = [
            replace(
                p,
                weight=change(p.weight),
                lora_A=change(p.lora_A).requires_grad_(),
                lora_B=change(p.lora_B).requires_grad_(),
            )
            for p in group
        ]
        ys = lora_qkv_seeded(x, changed, dropout_p=0.3, seeds=seeds_on(device, 3))
        dys = [expand(torch.linspace(0, 1, y.shape[1], device=device).expand(y.shape)) for y in ys]
        return *ys, *torch.autograd.grad(ys, (x, *leaves(*changed)), dys)

    for a, b in zip(run(strided, lambda dy: dy), run(torch.Tensor.detach, torch.Tensor.contiguous)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=float(b.detach().abs().max()) * 1e-5)


def test_non_finite_values_stay_in_their_rows(backend, device):
    x, group = problem(device)
    clean = lora_qkv(x, group)
    with torch.no_grad():
        x[2, 3], x[4, 0] = torch.nan, torch.inf
    for y, expected in zip(lora_qkv(x, group), clean):
        assert not y[[2, 4]].isfinite().any()
        assert torch.equal(y[[0, 1, 3, 5]], expected[[0, 1, 3, 5]])
