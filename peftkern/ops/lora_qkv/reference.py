"""LoRA QKV in eager PyTorch, any device and dtype: the oracle, and the backend where nothing compiled is present."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import linear

from peftkern.ops._dropout import dropout_scale, masked
from peftkern.ops._frozen_weight import dense_weight, split_weight
from peftkern.ops._projection import LoRAProjection, unpack_weight
from peftkern.ops.lora_matmul import reference as lora_matmul
from peftkern.ops.lora_qkv.op import empty_grads

Tensors = Sequence[torch.Tensor]
Optionals = Sequence[torch.Tensor | None]


def apply_projection(
    x: torch.Tensor, p: LoRAProjection, dropout_p: float = 0.0, seed: torch.Tensor | None = None
) -> torch.Tensor:
    """One projection as PEFT computes it, every step rounded to x's dtype. Differentiable by plain autograd."""
    if p.lora_A is None or p.lora_B is None:
        weight = dense_weight(*split_weight(p.weight), x.dtype).to(x.dtype)
        return linear(x, weight, None if p.bias is None else p.bias.to(x.dtype))
    return lora_matmul.formula(x, p.weight, p.lora_A, p.lora_B, p.scaling, p.bias, dropout_p, seed)  # type: ignore[arg-type]


def formula(
    x: torch.Tensor, projections: Sequence[LoRAProjection], dropout_p: float = 0.0, seeds: torch.Tensor | None = None
) -> tuple[torch.Tensor, ...]:
    """The equation for each projection. In float64 it is the truth; in x's dtype its error is the allowance."""
    return tuple(apply_projection(x, p, dropout_p, seed_of(seeds, index)) for index, p in enumerate(projections))


def seed_of(seeds: torch.Tensor | None, index: int) -> torch.Tensor | None:
    """The seed of one projection, int64 [1]."""
    return None if seeds is None else seeds[index : index + 1]


def split_columns(t: torch.Tensor, ranks: Sequence[int]) -> list[torch.Tensor]:
    """The columns of each projection as a matrix of its own: torch 2.10 gets products with strided ones of rank 1 wrong
    (bfloat16 on the CPU)."""
    return [part.contiguous() for part in t.split(list(ranks), dim=1)]


def lora_qkv_fwd(
    x: torch.Tensor,
    pieces: Optionals,
    layouts: Sequence[int],
    lora_A: Tensors,
    lora_B: Tensors,
    biases: Optionals,
    scalings: Sequence[float],
    dropout_p: float,
    seeds: torch.Tensor | None,
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """S of all projections in one product without dropout; then each base product and its low-rank term."""
    with torch.autocast(x.device.type, enabled=False):  # the dtypes are settled by the caller
        if seeds is None:
            S = linear(x, _stacked(lora_A, x.dtype))
        else:
            parts = [
                linear(_masked(x, seeds, i, dropout_p) if len(A) else x, A.to(x.dtype)) for i, A in enumerate(lora_A)
            ]
            S = torch.cat(parts, dim=1)
        ys = []
        for i, (B, S_i, bias) in enumerate(zip(lora_B, S.split(_ranks(lora_A), dim=1), biases)):
            bias = None if bias is None else bias.to(x.dtype)
            y = linear(x, unpack_weight(pieces, layouts, i, x.dtype, forward=True).to(x.dtype), bias)
            if B.shape[1]:
                y.addmm_(S_i, B.to(x.dtype).t(), alpha=_factor(scalings[i], dropout_p, seeds))
            ys.append(y)
    return ys, S


def lora_qkv_bwd(
    dys: Tensors,
    x: torch.Tensor | None,
    pieces: Optionals,
    layouts: Sequence[int],
    lora_A: Tensors,
    lora_B: Tensors,
    S: torch.Tensor | None,
    seeds: torch.Tensor | None,
    scalings: Sequence[float],
    dropout_p: float,
    need_dx: bool,
    need_dA: Sequence[bool],
    need_dB: Sequence[bool],
) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    """With D_i = dy_i lora_B_i: dx = sum_i dy_i weight_i + factor_i mask_i(D_i lora_A_i), dA_i = factor_i D_i^T
    mask_i(x), dB_i = factor_i dy_i^T S_i. Without dropout all low-rank terms of dx are one product, as are all dA_i."""
    dtype, ranks = dys[0].dtype, _ranks(lora_A)
    factors = [_factor(scaling, dropout_p, seeds) for scaling in scalings]
    dx = dys[0].new_empty(0)
    dA, dB = empty_grads(lora_A, [False] * len(ranks)), empty_grads(lora_B, [False] * len(ranks))
    with torch.autocast(dys[0].device.type, enabled=False):
        D = torch.cat([dy @ B.to(dtype) for dy, B in zip(dys, lora_B)], dim=1) if need_dx or any(need_dA) else None
        if need_dx:
            assert D is not None
            dx = dys[0] @ unpack_weight(pieces, layouts, 0, dtype).to(dtype)
            for i, dy in enumerate(dys[1:], 1):
                # Not addmm_: for one or two rows BLAS then adds one product at a time, with twice the error.
                dx += dy @ unpack_weight(pieces, layouts, i, dtype).to(dtype)
            if seeds is None:
                dx.addmm_(D, _stacked([_scaled(A, c, A.dtype) for A, c in zip(lora_A, factors)], dtype))
            else:
                for i, (D_i, A) in enumerate(zip(split_columns(D, ranks), lora_A)):
                    if len(A):
                        dx.add_(_masked(D_i @ A.to(dtype), seeds, i, dropout_p), alpha=factors[i])
        if any(need_dA):
            assert D is not None
            assert x is not None
            if seeds is None:
                products = (D.t() @ x).split(ranks)
            else:
                products = tuple(
                    D_i.t() @ _masked(x, seeds, i, dropout_p) if need_dA[i] else D_i
                    for i, D_i in enumerate(split_columns(D, ranks))
                )
            for i, (A, product) in enumerate(zip(lora_A, products)):
                if need_dA[i]:
                    dA[i] = _scaled(product, factors[i], A.dtype)
        if any(need_dB):
            assert S is not None
            for i, (dy, S_i, B) in enumerate(zip(dys, split_columns(S, ranks), lora_B)):
                if need_dB[i]:
                    dB[i] = _scaled(dy.t() @ S_i, factors[i], B.dtype)
    return dx, dA, dB


def lora_qkv_bwd_add(
    dys: Tensors,
    x: torch.Tensor | None,
    pieces: Optionals,
    layouts: Sequence[int],
    lora_A: Tensors,
    lora_B: Tensors,
    S: torch.Tensor | None,
    seeds: torch.Tensor | None,
    scalings: Sequence[float],
    dropout_p: float,
    need_dA: Sequence[bool],
    need_dB: Sequence[bool],
    dx: torch.Tensor,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """dA and dB; dx is added to `dx`."""
    own, dA, dB = lora_qkv_bwd(
        dys, x, pieces, layouts, lora_A, lora_B, S, seeds, scalings, dropout_p, True, need_dA, need_dB
    )
    dx += own
    return dA, dB


def _ranks(lora_A: Tensors) -> list[int]:
    return [A.shape[0] for A in lora_A]


def _stacked(lora_A: Tensors, dtype: torch.dtype) -> torch.Tensor:
    return torch.cat([A.to(dtype) for A in lora_A])


def _masked(t: torch.Tensor, seeds: torch.Tensor, index: int, dropout_p: float) -> torch.Tensor:
    return masked(t, seed_of(seeds, index), dropout_p)


def _factor(scaling: float, dropout_p: float, seeds: torch.Tensor | None) -> float:
    return scaling if seeds is None else scaling * dropout_scale(dropout_p)


def _scaled(product: torch.Tensor, factor: float, dtype: torch.dtype) -> torch.Tensor:
    """factor * product, a tensor of its own, rounded once."""
    return (product.to(torch.promote_types(product.dtype, torch.float32)) * factor).to(dtype)
