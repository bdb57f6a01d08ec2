"""LoRA projections for the tests of lora_qkv and lora_mlp."""

from __future__ import annotations

from typing import Any

import torch

from peftkern import LoRAProjection, quantize_nf4

SCALINGS = (2.0, 0.5, 1.5, 3.0)


def projection(
    N: int,
    K: int,
    r: int,
    device: Any = "cpu",
    dtype: torch.dtype = torch.float32,
    adapter_dtype: torch.dtype | None = None,
    bias: bool = True,
    nf4: bool = False,
    scaling: float | torch.Tensor = 2.0,
) -> LoRAProjection:
    """Its adapter and bias want gradients; no adapter for r = 0."""
    weight = (torch.randn(N, K, device=device) / K**0.5).to(dtype)
    adapter_dtype = adapter_dtype or dtype
    return LoRAProjection(
        quantize_nf4(weight.float() if dtype == torch.float64 else weight) if nf4 else weight,
        (torch.randn(r, K, device=device) / K**0.5).to(adapter_dtype).requires_grad_() if r else None,
        (torch.randn(N, r, device=device) / r**0.5).to(adapter_dtype).requires_grad_() if r else None,
        scaling,
        torch.randn(N, device=device).to(dtype).requires_grad_() if bias else None,
    )


def activations(M: int, K: int, device: Any = "cpu", dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """x [M, K] that wants a gradient."""
    return torch.randn(M, K, device=device).to(dtype).requires_grad_()


def leaves(*projections: LoRAProjection) -> list[torch.Tensor]:
    """All that gets a gradient, in the order of the projections: lora_A, lora_B, bias."""
    return [t for p in projections for t in (p.lora_A, p.lora_B, p.bias) if t is not None and t.requires_grad]


def seeds_on(device: Any, count: int) -> torch.Tensor:
    return torch.arange(1, count + 1, device=device) * 123456789


def saved_by(run: Any) -> tuple[list[torch.Tensor], Any]:
    """(tensors saved for the backward, the output)"""
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        output = run()
    return saved, output


def pointers(*projections: LoRAProjection) -> set[int]:
    """Where the projections' own tensors lie."""
    tensors = torch.utils._pytree.tree_leaves(projections)
    return {t.data_ptr() for t in tensors if isinstance(t, torch.Tensor)}
