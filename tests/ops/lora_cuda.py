"""LoRA matmuls for the tests of the CUDA kernel, which is compiled for sm_90a alone."""

from __future__ import annotations

import pytest
import torch

from peftkern.ops import backends
from peftkern.ops.lora_matmul import reference
from peftkern.ops.lora_matmul.function import lora_matmul_seeded
from peftkern.testing.checks import poisoned_memory
from peftkern.testing.numerics import assert_within, to_float64

needs_the_kernel = pytest.mark.skipif(
    not torch.cuda.is_available()
    or torch.cuda.get_device_capability() != (9, 0)
    or backends()["lora_matmul_fwd"]["CUDA"] != "cuda",
    reason="the kernel is compiled for sm_90a alone",
)

CUDA = torch.device("cuda")
SCALING = 1.7
ALL = (True, True, True)
ops = torch.ops.peftkern


def normal(*shape, dtype=torch.bfloat16, std=1.0, device=CUDA):
    return (torch.randn(shape, device=device) * std).to(dtype)


def problem(M, N, K, r, dtype=torch.bfloat16, adapter_dtype=None, device=CUDA):
    """x, weight, lora_A, lora_B, bias, dy"""
    adapter_dtype = adapter_dtype or dtype
    return (
        normal(M, K, dtype=dtype, device=device),
        normal(N, K, dtype=dtype, std=K**-0.5, device=device),
        normal(r, K, dtype=adapter_dtype, std=K**-0.5, device=device),
        normal(N, r, dtype=adapter_dtype, std=r**-0.5 / SCALING, device=device),
        normal(N, dtype=dtype, std=0.1, device=device),
        normal(M, N, dtype=dtype, device=device),
    )


def seed_for(dropout_p, device=CUDA, value=-(2**61) - 5):
    return torch.tensor([value], device=device) if dropout_p else None


def run(function, tensors, dropout_p, seed):
    """y, dx, dA, dB, dbias"""
    x, weight, A, B, bias, dy = tensors
    leaves = [None if t is None else t.detach().requires_grad_() for t in (x, A, B, bias)]
    y = function(leaves[0], weight, *leaves[1:3], SCALING, bias=leaves[3], dropout_p=dropout_p, seed=seed)
    return y, *torch.autograd.grad(y, [leaf for leaf in leaves if leaf is not None], dy)


def check(tensors, dropout_p, seed):
    """The error rule; returns what the op gave."""
    with poisoned_memory():
        got = run(lora_matmul_seeded, tensors, dropout_p, seed)
    eager = run(reference.formula, tensors, dropout_p, seed)
    truth = run(reference.formula, to_float64(tensors), dropout_p, seed)
    for what, *values in zip(("y", "dx", "dA", "dB", "dbias"), got, eager, truth):
        assert_within(*values, what)
    return got


def forward(tensors, dropout_p, seed):
    x, weight, A, B, bias, _ = tensors
    return ops.lora_matmul_fwd(x, weight, A, B, bias, SCALING, dropout_p, seed)


def backward(tensors, S, dropout_p, seed, needs=ALL):
    x, weight, A, B, _, dy = tensors
    return ops.lora_matmul_bwd(dy, x, weight, A, B, S, seed, SCALING, dropout_p, *needs)


def both(tensors, dropout_p, seed):
    y, S = forward(tensors, dropout_p, seed)
    return y, S, *backward(tensors, S, dropout_p, seed)
