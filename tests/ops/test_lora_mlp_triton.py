"""The Triton kernels between the projections of a LoRA MLP: compiled on a GPU, else interpreted."""

from __future__ import annotations

import pytest
import torch

from peftkern.ops import backends
from peftkern.ops.lora_mlp import reference
from peftkern.testing.checks import poisoned_memory
from peftkern.testing.numerics import assert_within

triton_kernels = pytest.importorskip("peftkern.ops.lora_mlp.triton_kernels")

SHAPES = [(0, 7), (1, 1), (3, 1365), (1, 4096), (5, 4097), (64, 520), (17, 256)]


@pytest.fixture
def device(device):
    if device.type == "cpu" and torch.cuda.is_available():
        pytest.skip("Triton interprets only where there is no GPU")
    return device


def tensors(shape, dtype, device, count=3):
    return [(2 * torch.randn(shape, device=device)).to(dtype) for _ in range(count)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_errs_no_more_than_eager(activation, dtype, shape, device):
    e, g, dh = tensors(shape, dtype, device)
    wide = [t.double() for t in (dh, e, g)]
    truth = [reference.gated(*wide[1:], activation), *reference.gated_backward_(*wide, activation)]
    eager = [reference.gated(e, g, activation), *reference.gated_backward_(dh.clone(), e, g, activation)]
    inputs = e.clone(), g.clone()
    with poisoned_memory():
        h = triton_kernels.gated(e, g, activation)
        de, dg = triton_kernels.gated_backward_(dh, e, g, activation)
    assert de.data_ptr() == dh.data_ptr()
    assert torch.equal(e, inputs[0])
    assert torch.equal(g, inputs[1])
    for got, want, true, name in zip((h, de, dg), eager, truth, ("h", "de", "dg")):
        assert got.dtype == dtype
        assert_within(got, want, true, name)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_far_values_and_none(activation, device):
    """Where the activation saturates; NaN stays with its element."""
    e = torch.tensor([[-1e4, -100.0, -0.0, 0.0, 100.0, 1e4, float("nan"), 1.0]], device=device)
    g = torch.full_like(e, 2.0)
    h = triton_kernels.gated(e, g, activation)
    de, dg = triton_kernels.gated_backward_(torch.ones_like(e), e, g, activation)
    e, h, de, dg = e[0], h[0], de[0], dg[0]
    torch.testing.assert_close(h[:6], 2 * e[:6].clamp(min=0), atol=0, rtol=0)
    torch.testing.assert_close(dg[:6], e[:6].clamp(min=0), atol=0, rtol=0)
    torch.testing.assert_close(de[[0, 1, 4, 5]], torch.tensor([0.0, 0.0, 2.0, 2.0], device=device), atol=0, rtol=0)
    for t in (h, de, dg):
        assert t[6].isnan()
        assert t[[0, 1, 2, 3, 4, 5, 7]].isfinite().all()


def test_strides(device):
    e, g = tensors((6, 20), torch.float32, device, 2)
    h = triton_kernels.gated(e.t(), g.t(), "silu")
    assert torch.equal(h, triton_kernels.gated(e, g, "silu").t())
    assert torch.equal(h, triton_kernels.gated(e.t(), g.t().contiguous(), "silu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [slice(0, 256), slice(256, 512), slice(512, 700), slice(3, 4)], ids=str)
def test_columns_are_read_where_they_lie(columns, dtype, device):
    e, g, dh = tensors((37, 700), dtype, device)
    h = triton_kernels.gated(e, g, "silu")
    de, dg = triton_kernels.gated_backward_(dh.clone(), e, g, "silu")
    own_dh = dh[:, columns].contiguous()
    with poisoned_memory():
        own_h = triton_kernels.gated(e[:, columns], g[:, columns], "silu")
        own_de, own_dg = triton_kernels.gated_backward_(own_dh, e[:, columns], g[:, columns], "silu")
    assert own_de.data_ptr() == own_dh.data_ptr()
    for got, want in zip((own_h, own_de, own_dg), (h, de, dg)):
        assert got.is_contiguous()
        assert torch.equal(got, want[:, columns])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_they_serve_the_op():
    assert backends()["lora_mlp_fwd"]["CUDA"] == backends()["lora_mlp_bwd"]["CUDA"] == "triton"
