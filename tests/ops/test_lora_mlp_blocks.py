"""LoRA MLP in blocks of rows forward and chunks of columns backward: cuts, unchanged results, what they hold."""

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
    """Blocks of 8 to 16 rows, chunks of 16 to 24 columns."""
    monkeypatch.setattr(reference, "BLOCK_BYTES", 1)
    monkeypatch.setattr(reference, "BLOCK_ROWS", 8)
    monkeypatch.setattr(reference, "ROW_STEP", 4)
    monkeypatch.setattr(reference, "CHUNK_COLUMNS", 16)
    monkeypatch.setattr(reference, "COLUMN_STEP", 8)


@pytest.fixture
def fewest(monkeypatch):
    """Blocks of as few rows as they may have, chunks of 64 columns or more."""
    monkeypatch.setattr(reference, "BLOCK_BYTES", 1)
    monkeypatch.setattr(reference, "CHUNK_COLUMNS", 64)
    monkeypatch.setattr(reference, "COLUMN_STEP", 64)


def problem(device, dtype=torch.float32, M=50, H=40, I=56, r=(5, 3, 4), **more):  # noqa: E741
    """x, and gate, up and down."""
    group = [projection(*shape, rank, device, dtype, **more) for shape, rank in zip(((I, H), (I, H), (H, I)), r)]
    return activations(M, H, device, dtype), group


def sizes(parts):
    return [part.stop - part.start for part in parts]


def assert_cover(parts, size):
    assert [part.start for part in parts] == [0, *(part.stop for part in parts[:-1])]
    assert parts[-1].stop == size


@pytest.mark.parametrize(
    ("M", "I", "itemsize", "expected"),
    [
        (8192, 11008, 2, [2048] * 4),
        (8200, 11008, 2, [2048, 2048, 2048, 2056]),
        (8192, 14336, 2, [1536, 1664, 1664, 1664, 1664]),
        (2286, 11008, 2, [2286]),
        (2287, 11008, 2, [1152, 1135]),
        (4095, 1 << 20, 2, [1280, 1408, 1407]),
        (2047, 1 << 20, 4, [2047]),
        (0, 11008, 2, [0]),
    ],
)
def test_blocks_are_of_nearly_one_size(M, I, itemsize, expected):  # noqa: E741
    assert sizes(reference.row_blocks(M, I, itemsize)) == expected


@pytest.mark.parametrize(
    ("M", "I", "itemsize", "expected"),
    [
        (8192, 11008, 2, [2560, 2816, 2816, 2816]),
        (8192, 14336, 2, [2816, 2816, 2816, 2816, 3072]),
        (2286, 11008, 2, [11008]),
        (2287, 11008, 2, [5376, 5632]),
        (1 << 20, 2047, 4, [2047]),
        (1 << 20, 2100, 2, [1024, 1076]),
        (0, 11008, 2, [11008]),
    ],
)
def test_chunks_are_of_nearly_one_size(M, I, itemsize, expected):  # noqa: E741
    assert sizes(reference.column_chunks(M, I, itemsize)) == expected


def test_blocks_cover_all_rows_and_none_is_small():
    for M in [*range(1024, 20_000, 61), *range(1024, 20_000, 1024)]:
        for I in (1408, 11008, 28672):  # noqa: E741
            blocks = reference.row_blocks(M, I, 2)
            assert_cover(blocks, M)
            assert all(rows.start % 128 == 0 for rows in blocks)
            assert min(sizes(blocks)) >= 1024
            assert max(sizes(blocks)) - min(sizes(blocks)) < 256
            assert len(blocks) == M // 1024 or max(sizes(blocks)) * I * 2 < reference.BLOCK_BYTES + 256 * I * 2


def test_chunks_cover_all_columns_and_none_is_small():
    for I in [*range(1024, 20_000, 61), *range(1024, 20_000, 1024)]:  # noqa: E741
        for M in (1024, 8192, 65536):
            chunks = reference.column_chunks(M, I, 2)
            assert_cover(chunks, I)
            assert all(columns.start % 256 == 0 for columns in chunks)
            assert min(sizes(chunks)) >= 1024
            assert max(sizes(chunks)) - min(sizes(chunks)) < 512
            assert len(chunks) == I // 1024 or max(sizes(chunks)) * M * 2 < reference.BLOCK_BYTES + 512 * M * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_spec_is_kept_in_blocks(dtype, backend, device, many, monkeypatch):
    monkeypatch.setattr(reference, "CHUNK_COLUMNS", 128)  # about as many chunks as large problems have
    for case in SPEC.test_cases(device.type):
        if not case.sizes.get("dropout_p"):
            check_case(SPEC, case, dtype, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adapter_dtype", [None, torch.float32])
@pytest.mark.parametrize("nf4", [False, True])
def test_blocks_of_a_thousand_rows(nf4, adapter_dtype, dtype, backend, device, fewest):
    """Large enough for the kernels of large products, and ragged."""
    x, group = problem(device, dtype, 3333, 128, 200, (8, 16, 8), nf4=nf4, adapter_dtype=adapter_dtype)
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
    x, group = problem(device, torch.float64, M=18, H=6, I=40, r=(2, 1, 3), nf4=nf4)

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


@pytest.mark.parametrize("nf4", [False, True])
def test_rows_forward_columns_backward_and_all_at_once_with_dropout(nf4, device, many):
    x, group = problem(device, nf4=nf4)
    shapes = []

    def gated(e, g, activation):
        shapes.append(tuple(e.shape))
        return reference.gated(e, g, activation)

    with torch.no_grad():
        run_op(x, group, gated=gated)
        forward, backward = shapes[:6], shapes[6:]
        assert forward == [(8, 56)] * 5 + [(10, 56)]
        assert backward == [(50, 16), (50, 16), (50, 24)]
        shapes.clear()
        run_op(x, group, 0.3, seeds_on(device, 3), gated=gated)
        assert shapes == [(50, 56)] * 2


def test_up_to_the_budget_results_are_those_of_one_block(backend, device, monkeypatch):
    x, group = problem(device, torch.bfloat16, M=3072)
    monkeypatch.setattr(reference, "CHUNK_COLUMNS", 16)
    monkeypatch.setattr(reference, "COLUMN_STEP", 8)
    runs = []
    for budget in (reference.BLOCK_BYTES, 3072 * 56 * 2, 1):
        monkeypatch.setattr(reference, "BLOCK_BYTES", budget)
        y = lora_mlp_seeded(x, *group)
        runs.append((y, *torch.autograd.grad(y, (x, *leaves(*group)), torch.ones_like(y))))
    assert all(torch.equal(a, b) for a, b in zip(runs[0], runs[1]))
    assert all(a.dtype == b.dtype and a.shape == b.shape for a, b in zip(runs[0], runs[2]))


@pytest.mark.parametrize("reentrant", [False, True])
def test_each_element_of_a_weight_is_decoded_once_a_pass(reentrant, backend, device, many, monkeypatch):
    """And not in a backward to which a recomputed forward has left the weight."""
    x, group = problem(device, nf4=True)
    elements = sum(p.weight.numel for p in group)
    decoded = []

    def count(op, *args):
        decoded.append(args[-1].numel())
        op(*args)

    for name in ("nf4_dequantize_out", "nf4_dequantize_slice_out"):
        monkeypatch.setattr(torch.ops.peftkern, name, partial(count, getattr(torch.ops.peftkern, name)))
    results = []
    for wrap in (lambda f, x: f(x), partial(checkpoint, use_reentrant=reentrant)):
        decoded.clear()
        y = wrap(lambda x: lora_mlp_seeded(x, *group), x)
        assert sum(decoded) == elements
        x.grad = None
        y.backward(torch.ones_like(y))
        assert sum(decoded) == 2 * elements
        results.append((y, x.grad))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("nf4", [False, True])
def test_of_the_inner_width_parts_are_held_beside_what_is_saved(nf4, backend, device, fewest):
    M, H, I = 8192, 64, 512  # noqa: E741
    x, group = problem(device, M=M, H=H, I=I, nf4=nf4, bias=False)
    wide, narrow = 4 * M * I, 4 * M * H

    def forward():
        return lora_mlp_seeded(x, *group)

    def backward():
        return torch.autograd.grad(y, (x, *leaves(*group)), dy, retain_graph=True)

    y = forward()
    dy = torch.randn_like(y)
    backward()
    assert peak_extra_bytes(forward, device) < 2 * wide + wide / 8 + 2 * narrow
    assert peak_extra_bytes(backward, device) < 2.5 * wide / 8 + 3 * narrow
