"""LoRA matmul: the public function and its autograd."""

from __future__ import annotations

import torch

from peftkern.ops._autocast import autocast_dtype
from peftkern.ops._dropout import draw_seed, dropout_threshold
from peftkern.ops._frozen_weight import FrozenWeight, Layout, dense_weight, split_weight
from peftkern.ops._projection import check_dtype
from peftkern.ops._rows import as_rows
from peftkern.ops.lora_matmul.op import check
from peftkern.ops.nf4.weight import NF4Weight

_ops = torch.ops.peftkern

FEW_TOKENS = 64  # up to here an NF4 weight is not worth decoding for: generation, with an adapter on


class _LoRAMatmul(torch.autograd.Function):
    """Saves x and the weight as they came (an NF4 weight packed), S and the seed: nothing else of their sizes."""

    @staticmethod
    def forward(ctx, x, lora_A, lora_B, bias, seed, scaling, dropout_p, settled, layout, *pieces):
        if _reads_packed(x, layout, seed):
            out_features, _, *sizes = layout
            y, S = _ops.lora_matmul_fwd_nf4(x, *pieces, lora_A, lora_B, bias, scaling, *sizes, out_features, settled)
        else:
            weight = dense_weight(pieces, layout, x.dtype, forward=True)
            y, S = _ops.lora_matmul_fwd(x, weight, lora_A, lora_B, bias, scaling, dropout_p, seed)
        need_dx, need_dA, need_dB, _ = ctx.needs_input_grad[:4]
        ctx.save_for_backward(
            x if need_dA else None,
            lora_A,
            lora_B,
            S if need_dB else None,
            seed,
            *(pieces if need_dx else ()),
        )
        ctx.scaling, ctx.dropout_p, ctx.layout, ctx.dtype = scaling, dropout_p, layout, x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        need_dx, need_dA, need_dB, need_dbias = ctx.needs_input_grad[:4]
        x, lora_A, lora_B, S, seed, *pieces = ctx.saved_tensors
        dx = dA = dB = dbias = None
        if need_dx or need_dA or need_dB:
            weight = dense_weight(tuple(pieces), ctx.layout, ctx.dtype) if need_dx else None
            grads = _ops.lora_matmul_bwd(
                dy, x, weight, lora_A, lora_B, S, seed, ctx.scaling, ctx.dropout_p, need_dx, need_dA, need_dB
            )
            dx, dA, dB = (g if need else None for g, need in zip(grads, (need_dx, need_dA, need_dB)))
        if need_dbias:
            dbias = dy.sum(0, dtype=torch.promote_types(dy.dtype, torch.float32)).to(ctx.bias_dtype)
        return dx, dA, dB, dbias, *(None,) * (len(ctx.needs_input_grad) - 4)


def _reads_packed(x: torch.Tensor, layout: Layout, seed: torch.Tensor | None) -> bool:
    """Whether an NF4 weight is multiplied as it is stored."""
    return layout is not None and seed is None and x.shape[0] <= FEW_TOKENS


def lora_matmul(
    x: torch.Tensor,
    weight: FrozenWeight,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: float | torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool = False,
) -> torch.Tensor:
    """y = x @ weight.T + scaling * (dropout(x) @ lora_A.T) @ lora_B.T + bias

    Gradients go to x, lora_A, lora_B, bias and, where it is a tensor, scaling; each only where it is required.

    Args:
        x: [*, K] float32, float16 or bfloat16 (float64 too where the reference or C++ runs), any strides. Under
            autocast it is cast to autocast's dtype first, as `torch.nn.functional.linear` does.
        weight: [N, K], frozen: dense in x's dtype (any float dtype under autocast), or an NF4Weight, which is
            dequantized in the forward (for more than 64 tokens) and again in the backward, never kept dense in between
            but where a checkpointed forward runs again right before its backward.
        lora_A, lora_B: [r, K] and [N, r] of any float dtype, r >= 1. They enter in x's dtype or better; their gradients
            come in their own.
        scaling: a number, or a 0-dim tensor, which is then read at run time and gets its gradient.
        bias: [N] of any float dtype.
        dropout_p: share of x's elements that the low-rank term drops when `training`, in steps of 1/32768. No mask is
            stored: see `peftkern/ops/_dropout.py`.

    Returns:
        [*, N] in x's dtype; both terms accumulate in float32.

    Raises:
        ValueError, TypeError: naming the argument that does not fit, before anything is launched.

    Source: Hu et al. 2021, arXiv:2106.09685, eq. 3.
    """
    check(x, weight, lora_A, lora_B, scaling, bias, dropout_p)
    seed = draw_seed(x.device) if training and dropout_threshold(dropout_p) else None
    return lora_matmul_seeded(x, weight, lora_A, lora_B, scaling, bias=bias, dropout_p=dropout_p, seed=seed)


def lora_matmul_seeded(
    x: torch.Tensor,
    weight: FrozenWeight,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: float | torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
) -> torch.Tensor:
    """`lora_matmul` with the dropout's seed given, int64 [1] on x's device, or None for no dropout. Unchecked."""
    check_dtype("lora_matmul", x, weight)
    if isinstance(scaling, torch.Tensor):
        lora_B, scaling = lora_B * scaling, 1.0
    x = x.to(autocast_dtype(x))
    pieces, layout = split_weight(weight)
    x2d = as_rows(x)
    settled = False
    if isinstance(weight, NF4Weight) and _reads_packed(x2d, layout, seed):
        settled = not torch.compiler.is_compiling() and x2d.numel() > 0 and weight.settled.check(pieces)
    y = _LoRAMatmul.apply(x2d, lora_A, lora_B, bias, seed, float(scaling), float(dropout_p), settled, layout, *pieces)
    return y.view(*x.shape[:-1], y.shape[-1])
