"""NF4: bytes and values are bitsandbytes' on every backend; the matmul has right gradients and refuses bad input."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

import peftkern
from peftkern import NF4Weight, dequantize_nf4, nf4_matmul, quantize_nf4
from peftkern.ops._code_tables import dynamic_map, nf4_code
from peftkern.ops.nf4 import reference
from peftkern.ops.nf4.weight import BLOCKSIZES
from peftkern.testing.numerics import assert_within

bnb = pytest.importorskip("bitsandbytes.functional")
triton_kernels = pytest.importorskip("peftkern.ops.nf4.triton_kernels")

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 1), (3, 7), (1, 64), (33, 65), (100, 130), (64, 4096), (5, 4097)]


def from_bitsandbytes(packed: torch.Tensor, state) -> NF4Weight:  # type: ignore[no-untyped-def]
    nested = (state.state2.absmax, state.state2.code, state.offset) if state.nested else (None, None, None)
    return NF4Weight(packed, state.absmax, state.shape, state.dtype, state.blocksize, *nested)


def weights(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    w = torch.randn(shape, device=device).mul_(0.02).to(dtype)
    w.view(-1)[: w.numel() // 5] = 0  # whole blocks of zeros where the tensor is large enough
    return w


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_quantize_gives_bitsandbytes_bytes(blocksize, dtype, device):
    if device.type == "cuda":
        pytest.skip("bitsandbytes' CUDA build divides approximately; its bytes are promised on decode")
    for shape in SHAPES:
        w = weights(shape, dtype, device)
        q = quantize_nf4(w, blocksize, double_quant=False)
        packed, state = bnb.quantize_4bit(w, blocksize=blocksize, quant_type="nf4")
        assert torch.equal(q.packed, packed)
        assert torch.equal(q.absmax, state.absmax)


@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_double_quantization_is_bitsandbytes_or_nearer(blocksize, device):
    """bitsandbytes' CPU build looks 8-bit codes up in a table of 65,536 bins and so misses the nearest code now and
    then; ours is the nearest, and no other code may differ."""
    differing = total = 0
    for shape in [*SHAPES, (512, 1024)]:
        w = weights(shape, torch.float32, device)
        q = quantize_nf4(w, blocksize)
        _, state = bnb.quantize_4bit(w, blocksize=blocksize, quant_type="nf4", compress_statistics=True)
        if device.type == "cpu":
            assert torch.equal(q.nested_offset, state.offset)
            assert torch.equal(q.nested_code, state.state2.code)
        torch.testing.assert_close(q.nested_absmax, state.state2.absmax, rtol=1e-6, atol=1e-30)
        wrong = q.absmax != state.absmax
        absmax = quantize_nf4(w, blocksize, double_quant=False).absmax
        ours = reference.unnest_absmax(*q.tensors()[1:], q.nested_blocksize)
        theirs = reference.unnest_absmax(*from_bitsandbytes(q.packed, state).tensors()[1:], q.nested_blocksize)
        assert ((ours - absmax).abs() <= (theirs - absmax).abs() * (1 + 1e-5) + 1e-9)[wrong].all()
        differing += int(wrong.sum())
        total += wrong.numel()
    assert differing <= max(8, 0.02 * total)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_dequantize_is_bitwise_bitsandbytes(blocksize, double_quant, dtype, device):
    for shape in SHAPES:
        w = weights(shape, dtype, device)
        packed, state = bnb.quantize_4bit(w, blocksize=blocksize, quant_type="nf4", compress_statistics=double_quant)
        with torch.compiler.set_stance("force_eager"):  # some of its fallbacks compile themselves
            theirs = bnb.dequantize_4bit(packed, state).view(shape)
        ours = dequantize_nf4(from_bitsandbytes(packed, state))
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("double_quant", [False, True])
def test_every_backend_dequantizes_the_same_bits(double_quant, dtype, device):
    for shape in [(0, 4), *SHAPES]:
        for blocksize in (32, 64, 4096):
            q = quantize_nf4(weights(shape, dtype, device), blocksize, double_quant)
            outs = [torch.full(shape, float("nan"), dtype=dtype, device=device) for _ in range(3)]
            torch.ops.peftkern.nf4_dequantize_out(*q.tensors(), q.blocksize, q.nested_blocksize, outs[0])
            reference.dequantize_out(*q.tensors(), q.blocksize, q.nested_blocksize, outs[1])
            assert torch.equal(outs[0], outs[1])
            if device.type == "cpu" and dtype == torch.bfloat16:
                continue  # Triton's interpreter truncates to bfloat16
            triton_kernels.dequantize_out(*q.tensors(), q.blocksize, q.nested_blocksize, outs[2])
            assert torch.equal(outs[2], outs[1])


# Of a weight [48, 192]: row, column, rows, columns. Whole rows, aligned columns, and anything.
SLICES = [(0, 0, 48, 192), (0, 0, 20, 192), (16, 0, 32, 192), (5, 0, 3, 192), (0, 64, 48, 64), (7, 128, 41, 64)]
SLICES += [(3, 8, 17, 16), (3, 6, 17, 10), (1, 33, 47, 65), (47, 191, 1, 1), (9, 5, 0, 7), (48, 192, 0, 0)]


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_every_backend_dequantizes_the_bits_of_a_slice(blocksize, double_quant, dtype, device):
    shape = (48, 192)
    q = quantize_nf4(weights(shape, torch.float32, device), blocksize, double_quant)
    whole = dequantize_nf4(q, dtype)
    for row, column, rows, columns in SLICES:
        for op in (
            torch.ops.peftkern.nf4_dequantize_slice_out,
            triton_kernels.dequantize_slice_out,
            reference.dequantize_slice_out,
        ):
            if op is triton_kernels.dequantize_slice_out and device.type == "cpu" and dtype == torch.bfloat16:
                continue  # Triton's interpreter truncates to bfloat16
            out = torch.full((rows, columns), float("nan"), dtype=dtype, device=device)
            op(*q.tensors(), q.blocksize, q.nested_blocksize, *shape, row, column, out)
            assert torch.equal(out, whole[row : row + rows, column : column + columns]), (row, column)


@pytest.mark.parametrize(("row", "column", "rows", "columns"), [(0, 512, 300, 1024), (64, 0, 128, 2048)])
@pytest.mark.parametrize("dtype", FLOATS)
def test_slices_of_many_blocks(dtype, row, column, rows, columns, device):
    """The latter begins with a block of scales, so that it is a weight of its own."""
    q = quantize_nf4(weights((300, 2048), dtype, device))
    out = torch.full((rows, columns), float("nan"), dtype=dtype, device=device)
    torch.ops.peftkern.nf4_dequantize_slice_out(
        *q.tensors(), q.blocksize, q.nested_blocksize, *q.shape, row, column, out
    )
    assert torch.equal(out, dequantize_nf4(q)[row : row + rows, column : column + columns])


def test_a_slice_of_pieces_that_are_not_aligned(device):
    shape = (32, 128)
    q = quantize_nf4(weights(shape, torch.bfloat16, device))
    packed = torch.cat([q.packed.new_zeros((1, 1)), q.packed])[1:]
    out = torch.empty(32 * 64 + 1, dtype=torch.bfloat16, device=device)[1:].view(32, 64)
    for pieces, target in (((packed, *q.tensors()[1:]), out.clone()), (q.tensors(), out)):
        torch.ops.peftkern.nf4_dequantize_slice_out(*pieces, q.blocksize, q.nested_blocksize, *shape, 0, 64, target)
        assert torch.equal(target, dequantize_nf4(q)[:, 64:])


@pytest.mark.parametrize("dtype", FLOATS)
def test_every_backend_quantizes_the_same_bits(dtype, device):
    for shape in [(0, 4), *SHAPES]:
        w = weights(shape, dtype, device)
        packed, absmax = torch.ops.peftkern.nf4_quantize(w, 64)
        expected_packed, expected_absmax = reference.quantize(w, 64)
        assert torch.equal(packed, expected_packed)
        assert torch.equal(absmax, expected_absmax)
        if absmax.numel():
            args = (absmax, absmax.mean(), dynamic_map(True, device), 256)
            for got, expected in zip(torch.ops.peftkern.nf4_quantize_absmax(*args), reference.quantize_absmax(*args)):
                assert torch.equal(got, expected)


def test_quantize_takes_the_lower_code_on_ties_and_pads_with_zero(device):
    code = nf4_code(device)
    ties = (code[:-1] + code[1:]) / 2
    w = torch.cat([torch.ones(1, device=device), ties])[:15].repeat(3)  # odd, one is the absmax
    codes = quantize_nf4(w, 64, double_quant=False).packed.view(-1)
    assert codes[0] == 0xF0  # 1.0 is code 15, the first tie is code 0, even element in the high nibble
    assert codes[-1] & 15 == 7


def test_special_values(device):
    w = torch.zeros(4, 64, device=device)
    w[1] = float("nan")
    w[2, 0] = float("inf")
    w[3] = torch.finfo(torch.float32).tiny / 4
    packed, absmax = torch.ops.peftkern.nf4_quantize(w, 64)
    expected_packed, expected_absmax = reference.quantize(w, 64)
    assert torch.equal(packed, expected_packed)
    assert torch.equal(absmax, expected_absmax) or (absmax.isnan() == expected_absmax.isnan()).all()
    q = quantize_nf4(w, 64, double_quant=False)
    assert (dequantize_nf4(q)[0] == 0).all()


def test_dequantize_into_a_buffer(device):
    q = quantize_nf4(weights((33, 65), torch.float32, device))
    out = torch.empty(33, 65, dtype=torch.bfloat16, device=device)
    assert dequantize_nf4(q, out=out) is out
    assert torch.equal(out, dequantize_nf4(q, torch.bfloat16))
    unaligned = torch.empty(33 * 65 + 1, device=device)[1:].view(33, 65)
    assert torch.equal(dequantize_nf4(q, out=unaligned), dequantize_nf4(q, torch.float32))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    m=st.integers(0, 9),
    n=st.integers(1, 70),
    k=st.integers(1, 150),
    blocksize=st.sampled_from(BLOCKSIZES[:4]),
    dtype=st.sampled_from(FLOATS),
    double_quant=st.booleans(),
    layout=st.sampled_from(["contiguous", "transposed", "sliced", "expanded"]),
)
def test_matmul_over_ragged_shapes_and_strides(m, n, k, blocksize, dtype, double_quant, layout):
    def draw(seed):
        """y, dx and dbias of the op, of eager and of the truth, on fresh values."""
        torch.manual_seed(seed)
        q = quantize_nf4(torch.randn(n, k) * 0.02, blocksize, double_quant)
        if layout == "transposed":
            x = torch.randn(k, m).to(dtype).t()
        elif layout == "sliced":
            x = torch.randn(m, 2 * k).to(dtype)[:, ::2]
        elif layout == "expanded":
            x = torch.randn(1, k).to(dtype).expand(m, k)
        else:
            x = torch.randn(m, k).to(dtype)
        x = x.detach().requires_grad_()
        bias = torch.randn(n).to(dtype).requires_grad_()
        y = nf4_matmul(x, q, bias)
        dy = torch.randn(m, n).to(dtype)
        y.backward(dy)
        dense = q.dequantize(torch.float64)
        eager = q.dequantize(dtype)
        return (
            (y, torch.nn.functional.linear(x, eager, bias), x.double() @ dense.T + bias.double()),
            (x.grad, dy @ eager, dy.double() @ dense),
            (bias.grad, dy.sum(0), dy.double().sum(0)),
        )

    # Largest errors of a few numbers are a matter of luck: of enough draws together they are not.
    independent = n * (1 if layout == "expanded" else m)
    draws = [draw(seed) for seed in range(1 + 200 // (independent + 1))]
    for what, results in zip(("y", "dx", "dbias"), zip(*draws)):
        assert_within(*(torch.stack(values) for values in zip(*results)), what)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("m", [1, 3, 4, 5, 64])
def test_matmul_against_float64(m, dtype, device):
    q = quantize_nf4(torch.randn(96, 160, device=device) * 0.02)
    x = torch.randn(2, m, 160, device=device).to(dtype)
    truth = x.double() @ q.dequantize(torch.float64).T
    assert_within(nf4_matmul(x, q), x @ q.dequantize(dtype).T, truth)


def test_gradcheck_in_float64(device):
    q = quantize_nf4(torch.randn(6, 10, device=device))
    x = torch.randn(3, 10, dtype=torch.float64, device=device, requires_grad=True)
    bias = torch.randn(6, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, bias: nf4_matmul(x, q, bias), (x, bias))
    loss = nf4_matmul(x, q).pow(2).sum()
    (dx,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.parametrize("double_quant", [False, True])
def test_opcheck(double_quant, device):
    ops = torch.ops.peftkern
    q = quantize_nf4(torch.randn(33, 65, device=device), 64, double_quant)
    w = (*q.tensors(),)
    sizes = (q.blocksize, q.nested_blocksize)
    x, dy = torch.randn(3, 65, device=device), torch.randn(3, 33, device=device)
    absmax = torch.rand(300, device=device)
    for op, args in [
        (ops.nf4_quantize, (torch.randn(33, 65, device=device), 64)),
        (ops.nf4_quantize_absmax, (absmax, absmax.mean(), dynamic_map(True, device), 256)),
        (ops.nf4_dequantize_out, (*w, *sizes, torch.empty(33, 65, device=device))),
        (ops.nf4_dequantize_slice_out, (*w, *sizes, 33, 65, 3, 5, torch.empty(30, 7, device=device))),
        (ops.nf4_matmul, (x, *w, torch.randn(33, device=device), *sizes, 33)),
        (ops.nf4_matmul_dx, (dy, *w, *sizes, 65)),
    ]:
        torch.library.opcheck(op.default, args)


def test_compiles_without_graph_breaks(device):
    q = quantize_nf4(torch.randn(32, 64, device=device))
    bias = torch.randn(32, device=device)

    def step(x, bias):
        return nf4_matmul(x.relu(), q, bias).sum() + dequantize_nf4(q).sum()

    x = torch.randn(4, 64, device=device, requires_grad=True)
    eager = torch.autograd.grad(step(x, bias), x)[0]
    compiled = torch.compile(step, fullgraph=True)(x, bias)
    torch.testing.assert_close(compiled, step(x, bias))
    torch.testing.assert_close(torch.autograd.grad(compiled, x)[0], eager)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant, device):
    q = quantize_nf4(torch.randn(32, 64, device=device))
    x = torch.randn(4, 64, device=device, requires_grad=True)
    y = checkpoint(lambda x: nf4_matmul(x, q).tanh(), x, use_reentrant=use_reentrant)
    (plain,) = torch.autograd.grad(nf4_matmul(x, q).tanh().sum(), x)
    y.sum().backward()
    assert torch.equal(x.grad, plain)


def test_autocast_casts_as_linear_does(device):
    q = quantize_nf4(torch.randn(32, 64, device=device))
    x = torch.randn(4, 64, device=device, requires_grad=True)
    with torch.autocast(device.type, torch.bfloat16):
        y = nf4_matmul(x, q)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad.dtype == torch.float32


def test_a_backward_inside_autocast_keeps_its_dtype(device):
    q = quantize_nf4(torch.randn(32, 64, device=device))
    x = torch.randn(4, 64, device=device, requires_grad=True)
    y = nf4_matmul(x, q)
    (outside,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    with torch.autocast(device.type, torch.bfloat16):
        (inside,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(inside, outside)


def test_meta_tensors_give_shapes():
    q = quantize_nf4(torch.randn(32, 64)).to("meta")
    assert nf4_matmul(torch.empty(4, 64, device="meta"), q).shape == (4, 32)


def test_weight_moves_copies_and_is_a_pytree(device):
    q = quantize_nf4(torch.randn(32, 64))
    moved = q.to(device, torch.bfloat16)
    assert moved.device.type == device.type
    assert moved.dequantize().dtype == torch.bfloat16
    assert torch.equal(moved.dequantize(torch.float32).cpu(), q.dequantize())
    leaves, spec = torch.utils._pytree.tree_flatten(q)
    assert torch.equal(torch.utils._pytree.tree_unflatten(leaves, spec).dequantize(), q.dequantize())
    copy = q.clone()
    copy.packed.zero_()
    assert not torch.equal(copy.packed, q.packed)
    assert 0.515 < quantize_nf4(torch.randn(512, 512)).nbytes / 512**2 < 0.521


def test_code_tables_are_the_published_ones():
    host = pytest.importorskip("peftkern._host")
    assert host.nf4_code() == nf4_code().tolist()
    assert torch.equal(nf4_code(), bnb.get_4bit_type("nf4", device="cpu"))
    for signed in (True, False):
        assert host.dynamic_map(signed) == dynamic_map(signed).tolist()
        torch.testing.assert_close(dynamic_map(signed), bnb.create_dynamic_map(signed=signed), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda q, x: quantize_nf4(torch.ones(4, dtype=torch.float64)), "weight must be float32"),
        (lambda q, x: quantize_nf4(torch.ones(4, dtype=torch.int32)), "weight must be float32"),
        (lambda q, x: quantize_nf4(torch.ones(4), 0), "blocksize must be one of"),
        (lambda q, x: quantize_nf4(torch.ones(4), 2**63 - 1), "blocksize must be one of"),
        (lambda q, x: nf4_matmul(x[:, :10], q), "must share K"),
        (lambda q, x: nf4_matmul(x.int(), q), "x must be float32"),
        (lambda q, x: nf4_matmul(x, q, torch.ones(3)), "bias must have shape"),
        (lambda q, x: dequantize_nf4(q, torch.int8), "dtype must be a float dtype"),
        (lambda q, x: dequantize_nf4(q, out=torch.empty(3, 3)), "out must have shape"),
        (lambda q, x: dequantize_nf4(q, out=torch.empty(64, 32).t()), "out must be contiguous"),
        (lambda q, x: dequantize_nf4(q, torch.float16, out=torch.empty(32, 64)), "give one of them"),
        (lambda q, x: dequantize_nf4(q.with_tensors((q.packed[1:], *q.tensors()[1:]))), "packed must hold"),
        (lambda q, x: dequantize_nf4(q.with_tensors((q.packed, q.absmax[1:], *q.tensors()[2:]))), "blocksize right"),
        (lambda q, x: dequantize_nf4(q.with_tensors((q.packed, q.absmax, None, None, None))), "without its nested"),
        (lambda q, x: dequantize_nf4(q.with_tensors((q.packed, q.absmax, q.nested_absmax, None, None))), "together"),
    ],
)
def test_bad_input_is_named(call, message):
    q = quantize_nf4(torch.randn(32, 64))
    with pytest.raises((ValueError, TypeError), match=message):
        call(q, torch.randn(2, 64))


def test_disabling_a_backend_hands_over_to_the_next():
    script = "import peftkern; print({k: v.get('CPU') for k, v in peftkern.backends().items()}['nf4_quantize'])"

    def owner(disabled: str) -> str:
        env = {**os.environ, "PEFTKERN_DISABLE": disabled}
        run = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
        return run.stdout.strip()

    assert owner("cpp,triton") == "reference"
    assert owner("") == peftkern.backends()["nf4_quantize"]["CPU"]
