"""Bottlenecks for the tests of the CUDA kernels, which are compiled for sm_90a alone."""

from __future__ import annotations

import pytest
import torch

from peftkern.ops import backends
from peftkern.ops.bottleneck import reference
from peftkern.ops.bottleneck.function import bottleneck_seeded
from peftkern.testing.checks import poisoned_memory
from peftkern.testing.numerics import assert_within, to_float64

needs_the_kernels = pytest.mark.skipif(
    not torch.cuda.is_available()
    or torch.cuda.get_device_capability() != (9, 0)
    or backends()["bottleneck_fwd"]["CUDA"] != "cuda",
    reason="the kernels are compiled for sm_90a alone",
)

CUDA = torch.device("cuda")
SCALING = 1.7
ALL = (True,) * 5
RESULTS = ("y", "dx", "d_down", "d_down_bias", "d_up", "d_up_bias", "d_residual")
ops = torch.ops.peftkern


def normal(*shape, dtype=torch.bfloat16, std=1.0, device=CUDA):
    return (torch.randn(shape, device=device) * std).to(dtype)


def problem(M, H, b, dtype=torch.bfloat16, adapter_dtype=None, device=CUDA):
    """x, down_weight, down_bias, up_weight, up_bias, dy"""
    adapter = adapter_dtype or dtype
    return (
        normal(M, H, dtype=dtype, device=device),
        normal(b, H, dtype=adapter, std=H**-0.5, device=device),
        normal(b, dtype=adapter, std=0.3, device=device),
        normal(H, b, dtype=adapter, std=b**-0.5 / SCALING, device=device),
        normal(H, dtype=adapter, std=0.3 / SCALING, device=device),
        normal(M, H, dtype=dtype, device=device),
    )


def seed_for(dropout_p, device=CUDA, value=-(2**61) - 5):
    return torch.tensor([value], device=device) if dropout_p else None


def run(function, tensors, residual=None, **options):
    """y, dx, and the gradients of what is there of the others"""
    *leaves, dy = tensors
    leaves = [None if t is None else t.detach().requires_grad_() for t in (*leaves, residual)]
    y = function(*leaves[:5], residual=leaves[5], scaling=SCALING, **options)
    grads = torch.autograd.grad(y, [leaf for leaf in leaves if leaf is not None], dy.to(y.dtype))
    return y, *grads


def check(tensors, residual=None, **options):
    """The error rule; returns what the op gave."""
    with poisoned_memory():
        got = run(bottleneck_seeded, tensors, residual, **options)
    eager = run(reference.formula, tensors, residual, **options)
    truth = run(reference.formula, to_float64(tensors), to_float64(residual), **options)
    names = [n for n, t in zip(RESULTS, (tensors[0], *tensors[:5], residual)) if t is not None]
    for what, *values in zip(names, got, eager, truth):
        assert_within(*values, what)
    return got


def forward(tensors, dropout_p=0.0, seed=None, residual=None, activation="gelu"):
    x, down, down_bias, up, up_bias, _ = tensors
    return ops.bottleneck_fwd(x, down, down_bias, up, up_bias, residual, activation, SCALING, dropout_p, seed)


def backward(tensors, h, dropout_p=0.0, seed=None, needs=ALL, activation="gelu", residual_is_x=True):
    x, down, _, up, _, dy = tensors
    x = x if needs[1] else None
    return ops.bottleneck_bwd(dy, x, down, up, h, seed, activation, SCALING, dropout_p, residual_is_x, *needs)


def both(tensors, dropout_p=0.0, seed=None):
    y, h = forward(tensors, dropout_p, seed)
    return y, h, *backward(tensors, h, dropout_p, seed)
