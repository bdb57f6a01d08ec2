"""LoRA MLP in blocks of rows: how they are cut, that they change no result, what they hold."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from lora_projections import activations, leaves, projection, seeds_on
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from benchmarks.timing import peak_extra_bytes
from peftkern.ops._projection import pack
from peftkern.ops.lora_mlp import function, reference
from peftkern.ops.lora_mlp.function import lora_mlp_seeded
from peftkern.ops.lora_mlp.spec import SPECS
from peftkern.testing.checks import check_case, poisoned_memory
from peftkern.testing.numerics import assert_within, to_float64

SPEC = SPECS[0]
MIB = 1 << 20


@pytest.fixture(params=["dispatched", "reference"])
def backend(request, monkeypatch):
    """The backend that owns the device, and the reference in its place."""
    if request.param == "reference":
        monkeypatch.setattr(function, "_ops", reference)
    return request.param


@pytest.fixture
def many(monkeypatch):
    """Blocks of 8 to 16 rows."""
    monkeypatch.setattr(reference, "BLOCK_BYTES", 1)
    monkeypatch.setattr(reference, "BLOCK_ROWS", 8)
    monkeypatch.setattr(reference, "ROW_STEP", 4)


@pytest.fixture
def fewest_rows(monkeypatch):
    """Blocks of as few rows as they may have."""
    monkeypatch.setattr(reference, "BLOCK_BYTES", 1)


def problem(device, dtype=torch.float32, M=50, H=40, I=56, r=(5, 3, 4), **more):  # noqa: E741
    """x, and gate, up and down."""
    group = [projection(*shape, rank, device, dtype, **more) for shape, rank in zip(((I, H), (I, H), (H, I)), r)]
    return activations(M, H, device, dtype), group


def sizes(blocks):
    return [rows.stop - rows.start for rows in blocks]


@pytest.mark.parametrize(
    ("M", "I", "itemsize", "most", "expected"),
    [
        (8192, 11008, 2, None, [2048] * 4),
        (8192, 11008, 2, 3, [2688, 2688, 2816]),
        (8200, 11008, 2, None, [2048, 2048, 2048, 2056]),
        (8192, 14336, 2, None, [1536, 1664, 1664, 1664, 1664]),
        (2286, 11008, 2, None, [2286]),
        (2287, 11008, 2, None, [1152, 1135]),
        (4095, 1 << 20, 2, None, [1280, 1408, 1407]),
        (2047, 1 << 20, 4, None, [2047]),
        (0, 11008, 2, None, [0]),
    ],
)
def test_blocks_are_of_nearly_one_size(M, I, itemsize, most, expected):  # noqa: E741
    assert sizes(reference.row_blocks(M, I, itemsize, most)) == expected


def test_blocks_cover_all_rows_and_none_is_small():
    for M in [*range(1024, 20_000, 61), *range(1024, 20_000, 1024)]:
        for I in (1408, 11008, 28672):  # noqa: E741
            blocks = reference.row_blocks(M, I, 2)
            assert [row for rows in blocks for row in (rows.start, rows.stop)][1:-1] == [
                bound for rows in blocks[1:] for bound in (rows.start, rows.start)
            ]
            assert (blocks[0].start, blocks[-1].stop) == (0, M)
            assert all(rows.start % 128 == 0 for rows in blocks)
            assert min(sizes(blocks)) >= 1024
            assert max(sizes(blocks)) - min(sizes(blocks)) < 256
            assert len(blocks) == M // 1024 or max(sizes(blocks)) * I * 2 < reference.BLOCK_BYTES + 256 * I * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_spec_is_kept_in_blocks(dtype, backend, device, many):
    for case in SPEC.test_cases(device.type):
        if not case.sizes.get("dropout_p"):
            check_case(SPEC, case, dtype, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adapter_dtype", [None, torch.float32])
@pytest.mark.parametrize("nf4", [False, True])
def test_blocks_of_a_thousand_rows(nf4, adapter_dtype, dtype, backend, device, fewest_rows):
    """Large enough for the kernels of large products, and ragged."""
    x, group = problem(device, dtype, 3333, 128, 192, (8, 16, 8), nf4=nf4, adapter_dtype=adapter_dtype)
    dy = torch.randn(x.shape, device=device).to(dtype)
    with poisoned_memory():
        y = lora_mlp_seeded(x, *group)
        got = y, *torch.autograd.grad(y, (x, *leaves(*group)), dy)
    if nf4:
        group = [replace(p, weight=p.weight.dequantize(dtype)) for p in group]
    runs = []
    for cast in (lambda t: t, to_float64):
        own_x, own = cast(x), pytree.tree_map(cast, group)
        y = reference.formula(own_x, *own)
        runs.append((y, *torch.autograd.grad(y, (own_x, *leaves(*own)), cast(dy))))
    for a, eager, truth in zip(got, *runs):
        assert_within(a.detach(), eager.detach(), truth.detach())


@pytest.mark.parametrize("nf4", [False, True])
def test_gradcheck_in_float64(nf4, backend, device, many):
    x, group = problem(device, torch.float64, M=18, H=6, I=8, r=(2, 1, 3), nf4=nf4)

    def run(x, *tensors):
        own = iter(tensors)
        return lora_mlp_seeded(x, *(replace(p, lora_A=next(own), lora_B=next(own), bias=next(own)) for p in group))

    assert torch.autograd.gradcheck(run, (x, *leaves(*group)))


@pytest.mark.parametrize("wanted", [{"x"}, {0}, {4}, {2}, {6}, {7}, {8}, {1, 7}, {"x", 6}])
def test_any_subset_of_gradients(wanted, backend, device, many):
    x, group = problem(device, nf4=True)
    names = ["x", *range(9)]

    def run(wanted):
        tensors = [t.detach().requires_grad_(name in wanted) for name, t in zip(names, (x, *leaves(*group)))]
        own = iter(tensors[1:])
        changed = [replace(p, lora_A=next(own), lora_B=next(own), bias=next(own)) for p in group]
        lora_mlp_seeded(tensors[0], *changed).square().sum().backward()
        return {name: t.grad for name, t in zip(names, tensors)}

    full = run(set(names))
    for name, grad in run(wanted).items():
        assert (grad is not None) == (name in wanted)
        if grad is not None:
            torch.testing.assert_close(grad, full[name], rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("nf4", [False, True])
def test_opcheck(nf4, device, many):
    ops = torch.ops.peftkern
    x, group = problem(device, torch.bfloat16, H=33, I=65, r=(3, 0, 5), nf4=nf4)
    detached = pytree.tree_map(lambda t: t.detach() if isinstance(t, torch.Tensor) else t, group)
    lora_A, lora_B, biases, scalings, pieces, layouts = map(list, pack(detached, x.detach()))
    args = (pieces, layouts, lora_A, lora_B)
    rest = (scalings, 0.0)
    torch.library.opcheck(ops.lora_mlp_fwd.default, (x.detach(), *args, biases, *rest, None, "silu"))
    y, e, g, S, S_down = ops.lora_mlp_fwd(x.detach(), *args, biases, *rest, None, "silu")
    yes, no = [True] * 3, [False] * 3
    for pieces_, *needs in [
        (pieces, True, [True, False, True], [True, False, True], yes),
        (pieces, True, no, no, no),
        ([None] * len(pieces), False, no, [False, False, True], no),
    ]:
        args = (torch.randn_like(y), x.detach(), e, g, pieces_, layouts, lora_A, lora_B, S, S_down, None, *rest)
        torch.library.opcheck(ops.lora_mlp_bwd.default, (*args, "silu", *needs))


def run_op(x, group, dropout_p=0.0, seeds=None, **parts):
    """Forward and backward of the shared code, for all gradients."""
    lora_A, lora_B, biases, scalings, pieces, layouts = pack(group, x)
    y, e, g, S, S_down = reference.lora_mlp_fwd(
        x, pieces, layouts, lora_A, lora_B, biases, scalings, dropout_p, seeds, "silu", **parts
    )
    yes = [True] * 3
    args = (y, x, e, g, pieces, layouts, lora_A, lora_B, S, S_down, seeds, scalings, dropout_p, "silu", True)
    return y, *reference.lora_mlp_bwd(*args, yes, yes, yes, **parts)


@pytest.mark.parametrize(("nf4", "backward"), [(False, [16, 16, 18]), (True, [24, 26])])
def test_one_block_with_dropout_and_few_where_weights_are_decoded(nf4, backward, device, many, monkeypatch):
    monkeypatch.setattr(reference, "BLOCK_ROWS", 16)
    monkeypatch.setattr(reference, "DECODED_BLOCKS", 2)
    x, group = problem(device, nf4=nf4)
    rows = []

    def gated(e, g, activation):
        rows.append(len(e))
        return reference.gated(e, g, activation)

    with torch.no_grad():
        run_op(x, group, gated=gated)
        assert rows == [16, 16, 18, *backward]
        rows.clear()
        run_op(x, group, 0.3, seeds_on(device, 3), gated=gated)
        assert rows == [50, 50]


def test_up_to_the_budget_results_are_those_of_one_block(backend, device, monkeypatch):
    x, group = problem(device, torch.bfloat16, M=3072)
    runs = []
    for budget in (reference.BLOCK_BYTES, 3072 * 56 * 2, 1):
        monkeypatch.setattr(reference, "BLOCK_BYTES", budget)
        y = lora_mlp_seeded(x, *group)
        runs.append((y, *torch.autograd.grad(y, (x, *leaves(*group)), torch.ones_like(y))))
    assert all(torch.equal(a, b) for a, b in zip(runs[0], runs[1]))
    assert all(a.dtype == b.dtype and a.shape == b.shape for a, b in zip(runs[0], runs[2]))


@pytest.mark.parametrize("reentrant", [False, True])
def test_how_often_a_weight_is_decoded(reentrant, backend, device, many, monkeypatch):
    """Once in a forward; for each block of a backward, but for what a recomputed forward leaves to the first."""
    x, group = problem(device, nf4=True)
    shapes = [tuple(p.weight.shape) for p in group]
    decoded = []
    empty = torch.empty

    def count(*args, **kwargs):
        decoded.extend(shape for shape in args[:1] if shape in shapes)
        return empty(*args, **kwargs)

    monkeypatch.setattr("peftkern.ops._frozen_weight.torch.empty", count)
    results = []
    for wrap in (lambda f, x: f(x), partial(checkpoint, use_reentrant=reentrant)):
        decoded.clear()
        y = wrap(lambda x: lora_mlp_seeded(x, *group), x)
        assert len(decoded) == 3
        x.grad = None
        y.backward(torch.ones_like(y))
        assert len(decoded) == 3 + 3 * reference.DECODED_BLOCKS
        results.append((y, x.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("nf4", [False, True])
def test_of_the_inner_width_blocks_are_held_beside_what_is_saved(nf4, backend, device, fewest_rows):
    M, H, I = 8192, 64, 512  # noqa: E741
    x, group = problem(device, M=M, H=H, I=I, nf4=nf4, bias=False)
    wide, narrow, blocks = 4 * M * I, 4 * M * H, reference.DECODED_BLOCKS if nf4 else M // reference.BLOCK_ROWS

    def forward():
        return lora_mlp_seeded(x, *group)

    def backward():
        return torch.autograd.grad(y, (x, *leaves(*group)), dy, retain_graph=True)

    y = forward()
    dy = torch.randn_like(y)
    backward()
    assert peak_extra_bytes(forward, device) < 2 * wide + wide / 8 + 2 * narrow
    assert peak_extra_bytes(backward, device) < 2.5 * wide / blocks + 2 * narrow
