"""An NF4 weight that a checkpointed layer decodes again in the backward pass is decoded once there."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from peftkern import LoRAProjection, lora_matmul, lora_mlp, lora_qkv, quantize_nf4
from peftkern.ops import _recompute

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA"))]
M, N, K, R = 80, 96, 64, 4  # more tokens than are multiplied with the packed weight
BYTES = N * K * 4


class Layers(torch.nn.Module):
    """Projections with NF4 bases; `forward` is one checkpoint over all of them."""

    def __init__(self, shapes, device):
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def normal(*shape):
            return (torch.randn(shape, generator=generator) * 0.1).to(device)

        self.weights = [quantize_nf4(normal(n, k)) for n, k in shapes]
        self.lora_A = torch.nn.ParameterList([normal(R, k) for _, k in shapes])
        self.lora_B = torch.nn.ParameterList([normal(n, R) for n, _ in shapes])

    def projection(self, i):
        return LoRAProjection(self.weights[i], self.lora_A[i], self.lora_B[i], 0.5)

    def chain(self, x):
        for i in range(len(self.weights)):
            x = lora_matmul(x, self.weights[i], self.lora_A[i], self.lora_B[i], 0.5)
        return x

    def qkv(self, x):
        return torch.cat(lora_qkv(x, [self.projection(i) for i in range(3)]), dim=-1)

    def mlp(self, x):
        return lora_mlp(x, *(self.projection(i) for i in range(3)))


SHAPES = {"chain": [(N, K), (K, N)], "qkv": [(N, K)] * 3, "mlp": [(N, K), (N, K), (K, N)]}


@pytest.fixture
def decoded(monkeypatch):
    """What is decoded, counted where every backend decodes a whole weight for these ops."""
    calls = []
    empty = torch.empty
    watched = {tuple(shape) for shapes in SHAPES.values() for shape in shapes}

    def count(*args, **kwargs):
        if args and args[0] in watched:
            calls.append(args[0])
        return empty(*args, **kwargs)

    monkeypatch.setattr("peftkern.ops._frozen_weight.torch.empty", count)
    yield calls
    assert not _recompute._kept


def gradients(layers, function, x, wrap):
    x = x.clone().requires_grad_()
    y = wrap(function, x)
    y.backward(torch.ones_like(y))
    result = [y.detach(), x.grad, *(p.grad.clone() for p in layers.parameters())]
    layers.zero_grad()
    return result


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", list(SHAPES))
def test_a_recomputed_forward_decodes_for_its_backward(kind, reentrant, device, decoded):
    layers = Layers(SHAPES[kind], device)
    x = torch.randn(M, K, device=device)
    function, count = getattr(layers, kind), len(SHAPES[kind])
    wanted = gradients(layers, function, x, lambda f, x: f(x))
    assert len(decoded) == 2 * count
    decoded.clear()
    got = gradients(layers, function, x, lambda f, x: checkpoint(f, x, use_reentrant=reentrant))
    assert len(decoded) == 2 * count
    assert all(torch.equal(a, b) for a, b in zip(got, wanted))


@pytest.mark.parametrize(("budget", "extra"), [(0, 2), (BYTES, 1), (2 * BYTES, 0)])
def test_the_budget_is_kept_and_the_first_weight_gives_way(budget, extra, decoded, monkeypatch):
    monkeypatch.setattr(_recompute, "BUDGET_BYTES", budget)
    layers = Layers(SHAPES["chain"], "cpu")
    gradients(layers, layers.chain, torch.randn(M, K), lambda f, x: checkpoint(f, x, use_reentrant=False))
    assert decoded == [(N, K), (K, N)] * 2 + [(K, N), (N, K)][2 - extra :]


def test_what_was_written_since_is_not_taken():
    packed, dense = torch.zeros(8, dtype=torch.uint8), torch.zeros(4, 4)
    for write in (lambda: None, lambda: packed.add_(1)):
        _recompute._kept[_recompute._key(packed, dense.dtype)] = packed, dense
        write()
        taken = _recompute.take(packed.detach(), dense.dtype)
        assert (taken is dense) == (packed[0] == 0)
        assert _recompute.take(packed, dense.dtype) is None
        _recompute._kept.clear()


def test_a_backward_that_breaks_off_leaves_nothing_to_the_next(decoded):
    layers = Layers(SHAPES["chain"], "cpu")

    class Fail(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, dy):
            raise RuntimeError("broken off")

    x = torch.randn(M, K, requires_grad=True)
    with pytest.raises(RuntimeError, match="broken off"):
        checkpoint(lambda x: Fail.apply(layers.chain(x)), x, use_reentrant=True).sum().backward()
    assert _recompute._kept
    wanted = gradients(layers, layers.chain, x.detach(), lambda f, x: f(x))
    assert not _recompute._kept
    got = gradients(layers, layers.chain, x.detach(), lambda f, x: checkpoint(f, x, use_reentrant=True))
    assert all(torch.equal(a, b) for a, b in zip(got, wanted))


def test_without_a_backward_pass_nothing_is_kept(decoded):
    layers = Layers(SHAPES["chain"], "cpu")
    layers.chain(torch.randn(M, K))
    assert not _recompute._kept
