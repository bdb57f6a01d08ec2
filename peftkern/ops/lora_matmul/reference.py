"""LoRA matmul in eager PyTorch, any device and dtype: the oracle, and the backend where nothing compiled is present."""

from __future__ import annotations

import torch
from torch.nn.functional import linear

from peftkern.ops._dropout import dropout_scale, masked
from peftkern.ops._frozen_weight import FrozenWeight, dense_weight, split_weight


def formula(
    x: torch.Tensor,
    weight: FrozenWeight,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: float,
    bias: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
) -> torch.Tensor:
    """The equation as PEFT computes it under autocast: adapters in x's dtype, every step rounded to it.

    Differentiable by plain autograd. Evaluated in float64 it is the truth; in x's dtype its error is the allowance.
    """
    bias = None if bias is None else bias.to(x.dtype)
    base = linear(x, dense_weight(*split_weight(weight), x.dtype).to(x.dtype), bias)
    flat = x.reshape(-1, x.shape[-1])
    dropped = flat if seed is None else masked(flat, seed, dropout_p) * dropout_scale(dropout_p)
    update = linear(linear(dropped, lora_A.to(x.dtype)), lora_B.to(x.dtype)) * scaling
    return base + update.view(base.shape)


def lora_matmul_fwd(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    bias: torch.Tensor | None,
    scaling: float,
    dropout_p: float,
    seed: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y = x weight^T + factor * S lora_B^T + bias and S = mask(x) lora_A^T, with factor = scaling / (1 - p)."""
    with torch.autocast(x.device.type, enabled=False):  # the dtypes are settled by the caller
        S = linear(masked(x, seed, dropout_p), lora_A.to(x.dtype))
        y = linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
        y.addmm_(S, lora_B.to(x.dtype).t(), alpha=low_rank_factor(scaling, dropout_p, seed))
    return y, S


def lora_matmul_fwd_nf4(
    x: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    nested_absmax: torch.Tensor | None,
    nested_code: torch.Tensor | None,
    nested_offset: torch.Tensor | None,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    bias: torch.Tensor | None,
    scaling: float,
    blocksize: int,
    nested_blocksize: int,
    out_features: int,
    settled: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """lora_matmul_fwd without dropout over the dequantized weight."""
    pieces = (packed, absmax, nested_absmax, nested_code, nested_offset)
    weight = dense_weight(pieces, (out_features, x.shape[1], blocksize, nested_blocksize), x.dtype)
    return lora_matmul_fwd(x, weight, lora_A, lora_B, bias, scaling, 0.0, None)


def lora_matmul_bwd(
    dy: torch.Tensor,
    x: torch.Tensor | None,
    weight: torch.Tensor | None,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    S: torch.Tensor | None,
    seed: torch.Tensor | None,
    scaling: float,
    dropout_p: float,
    need_dx: bool,
    need_dA: bool,
    need_dB: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """With D = dy lora_B: dx = dy weight + factor * mask(D lora_A), dA = factor * D^T mask(x), dB = factor * dy^T S."""
    dx, dA, dB = dy.new_empty(0), lora_A.new_empty(0), lora_B.new_empty(0)
    factor = low_rank_factor(scaling, dropout_p, seed)
    with torch.autocast(dy.device.type, enabled=False):
        D = dy @ lora_B.to(dy.dtype) if need_dx or need_dA else None
        if need_dx:
            assert D is not None
            assert weight is not None
            dx = dy @ weight.to(dy.dtype)
            A = lora_A.to(dy.dtype)
            if seed is None:
                dx.addmm_(D, A, alpha=factor)
            else:
                dx.add_(masked(D @ A, seed, dropout_p), alpha=factor)
        if need_dA:
            assert D is not None
            assert x is not None
            dA = _scaled(D.t() @ masked(x, seed, dropout_p), factor, lora_A.dtype)
        if need_dB:
            assert S is not None
            dB = _scaled(dy.t() @ S, factor, lora_B.dtype)
    return dx, dA, dB


def low_rank_factor(scaling: float, dropout_p: float, seed: torch.Tensor | None) -> float:
    return scaling if seed is None else scaling * dropout_scale(dropout_p)


def _scaled(product: torch.Tensor, factor: float, dtype: torch.dtype) -> torch.Tensor:
    return (product.to(torch.promote_types(product.dtype, torch.float32)) * factor).to(dtype)
