"""The bottleneck's Triton backend, called by name since another may own the op: compiled on a GPU, else interpreted."""

from __future__ import annotations

import itertools

import pytest
import torch

from peftkern.ops._dropout import dropout_mask
from peftkern.ops.bottleneck import function, reference
from peftkern.ops.bottleneck.function import bottleneck_seeded
from peftkern.ops.bottleneck.op import ACTIVATIONS
from peftkern.ops.bottleneck.spec import SPECS
from peftkern.testing.checks import check_case, poisoned_memory
from peftkern.testing.numerics import assert_within

triton_kernels = pytest.importorskip("peftkern.ops.bottleneck.triton_kernels")

SPEC = SPECS[0]


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


def problem(device, dtype, M=45, H=150, b=24, adapter_dtype=None):
    """x, down_weight, down_bias, up_weight, up_bias, residual"""
    adapter = adapter_dtype or dtype
    shapes = ((M, H), (b, H), (b,), (H, b), (H,), (M, H))
    scales = (1.0, H**-0.5, 0.3, b**-0.5, 0.3, 1.0)
    kinds = (dtype, adapter, adapter, adapter, adapter, dtype)
    return [(torch.randn(s, device=device) * scale).to(kind) for s, scale, kind in zip(shapes, scales, kinds)]


@pytest.mark.parametrize("case", [c for c in SPEC.test_cases() if c.name != "many-tiles"], ids=lambda c: c.name)
def test_spec_cases(case, dtype, device):
    check_case(SPEC, case, dtype, device)


@pytest.mark.parametrize(
    ("M", "b", "expected"), [(1, 129, True), (1024, 256, True), (1025, 256, False), (1, 128, False)]
)
def test_few_tokens_of_wide_bottlenecks(M, b, expected):
    assert triton_kernels.few_and_wide(M, b) == expected


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
@pytest.mark.parametrize("b", [64, 65, 130])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_wide_bottlenecks(activation, b, dropout_p, dtype, device):
    tensors = problem(device, dtype, M=70, H=140, b=b)
    dy = torch.randn_like(tensors[0])
    seed = seed_on(device) if dropout_p else None
    options = {"activation": activation, "dropout_p": dropout_p, "scaling": 0.7, "seed": seed}

    def run(function, tensors):
        leaves = [t.detach().requires_grad_() for t in tensors]
        y = function(*leaves[:5], residual=leaves[5], **options)
        return y, *torch.autograd.grad(y, leaves, dy.to(y.dtype))

    with poisoned_memory():
        got = run(bottleneck_seeded, tensors)
    eager, truth = run(reference.formula, tensors), run(reference.formula, [t.double() for t in tensors])
    for what, *values in zip(
        ("y", "dx", "d_down", "d_down_bias", "d_up", "d_up_bias", "d_residual"), got, eager, truth
    ):
        assert_within(*values, what)


def test_the_mask_is_the_one_defined(device):
    """relu of ones, through the identity: what is left of them is the mask."""
    M, b, p = 70, 48, 0.3
    seed = seed_on(device)
    h, identity = (t.to(device, torch.float16) for t in (torch.ones(M, b), torch.eye(b)))
    out = torch.empty_like(h)
    triton_kernels.update(h, identity, 1.0, out, activation="relu", seed=seed, dropout_p=p)
    expected = dropout_mask(seed, M, b, p)
    assert torch.equal(out != 0, expected)
    dh, a, _ = triton_kernels.middle(h.clone(), h, 1.0, "relu", True, seed, p)
    assert torch.equal(dh != 0, expected)
    assert torch.equal(a != 0, expected)


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=5)), ids=str)
def test_any_subset_of_gradients(needs, device):
    x, down, down_bias, up, up_bias, _ = problem(device, torch.float32)
    _, h = triton_kernels.bottleneck_fwd(x, down, down_bias, up, up_bias, None, "silu", 0.5, 0.1, seed_on(device))
    dy = torch.randn_like(x)

    def run(needs):
        x_ = x if needs[1] else None
        return triton_kernels.bottleneck_bwd(dy, x_, down, up, h, seed_on(device), "silu", 0.5, 0.1, True, *needs)

    for got, want, needed in zip(run(needs), run((True,) * 5), needs):
        assert torch.equal(got, want) if needed else got.numel() == 0


def test_the_bias_below_gets_sums_of_what_is_not_rounded(dtype, device):
    x, down, down_bias, up, up_bias, _ = problem(device, dtype, M=100, b=70)
    dy = torch.randn_like(x)
    _, h = triton_kernels.bottleneck_fwd(x, down, down_bias, up, up_bias, None, "relu", 0.5, 0.0, None)
    needs = (False, False, True, False, False)
    _, _, grad, _, _ = triton_kernels.bottleneck_bwd(dy, None, down, up, h, None, "relu", 0.5, 0.0, True, *needs)
    g = (dy @ up).double() * (h > 0) * 0.5
    torch.testing.assert_close(grad.double(), g.sum(0), rtol=0, atol=1e-5 * g.abs().sum(0).max().item())


@pytest.mark.parametrize("most", [0, 1 << 30], ids=["activated-before", "activated-within"])
def test_activations_come_to_the_same(most, dtype, device, monkeypatch):
    monkeypatch.setattr(triton_kernels, "_MOST_OWN_ACTIVATIONS", most)
    x, *rest, residual = problem(device, dtype, M=70, b=65)
    seed = seed_on(device)
    y, _ = triton_kernels.bottleneck_fwd(x, *rest, residual, "gelu", 0.7, 0.2, seed)
    expected, _ = reference.bottleneck_fwd(*(t.double() for t in (x, *rest, residual)), "gelu", 0.7, 0.2, seed)
    torch.testing.assert_close(y.double(), expected, rtol=2e-2 if dtype != torch.float32 else 1e-5, atol=2e-2)
