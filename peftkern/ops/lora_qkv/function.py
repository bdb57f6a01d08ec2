"""LoRA QKV: the public function and its autograd."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from peftkern.ops._autocast import autocast_dtype
from peftkern.ops._dropout import draw_seeds, dropout_threshold
from peftkern.ops._projection import LoRAProjection, check_dtype, pack
from peftkern.ops._rows import as_rows
from peftkern.ops.lora_qkv.op import OP, check

_ops = torch.ops.peftkern
_FIXED = 5  # arguments of the autograd function before its tensors


class _LoRAQKV(torch.autograd.Function):
    """Saves x once and the weights as they came (NF4 ones packed), S [M, R] and the seeds."""

    @staticmethod
    def forward(ctx, x, seeds, scalings, dropout_p, layouts, *tensors):
        n = len(scalings)
        lora_A, lora_B, biases, pieces = tensors[:n], tensors[n : 2 * n], tensors[2 * n : 3 * n], tensors[3 * n :]
        ys, S = _ops.lora_qkv_fwd(x, pieces, layouts, lora_A, lora_B, biases, scalings, dropout_p, seeds)
        needs = ctx.needs_input_grad[_FIXED:]
        ctx.save_for_backward(
            x if any(needs[:n]) else None,
            S if any(needs[n : 2 * n]) else None,
            seeds,
            *lora_A,
            *lora_B,
            *(pieces if ctx.needs_input_grad[0] else ()),
        )
        ctx.scalings, ctx.dropout_p, ctx.layouts = scalings, dropout_p, layouts
        ctx.pieces = len(pieces)
        ctx.bias_dtypes = tuple(None if bias is None else bias.dtype for bias in biases)
        return tuple(ys)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *dys):
        n = len(ctx.scalings)
        need_dx, needs = ctx.needs_input_grad[0], ctx.needs_input_grad[_FIXED:]
        need_dA, need_dB, need_dbias = list(needs[:n]), list(needs[n : 2 * n]), needs[2 * n : 3 * n]
        x, S, seeds, *tensors = ctx.saved_tensors
        dx, dA, dB = None, [None] * n, [None] * n
        if need_dx or any(need_dA) or any(need_dB):
            pieces = tensors[2 * n :] if need_dx else [None] * ctx.pieces
            lora_A, lora_B = tensors[:n], tensors[n : 2 * n]
            dx, dA, dB = _ops.lora_qkv_bwd(
                dys,
                x,
                pieces,
                ctx.layouts,
                lora_A,
                lora_B,
                S,
                seeds,
                ctx.scalings,
                ctx.dropout_p,
                need_dx,
                need_dA,
                need_dB,
            )
        dbias = [
            dy.sum(0, dtype=torch.promote_types(dy.dtype, torch.float32)).to(dtype) if need else None
            for dy, need, dtype in zip(dys, need_dbias, ctx.bias_dtypes)
        ]
        return (
            dx if need_dx else None,
            *(None,) * (_FIXED - 1),
            *(grad if need else None for grad, need in zip(dA, need_dA)),
            *(grad if need else None for grad, need in zip(dB, need_dB)),
            *dbias,
            *(None,) * ctx.pieces,
        )


def lora_qkv(
    x: torch.Tensor, projections: Sequence[LoRAProjection], *, dropout_p: float = 0.0, training: bool = False
) -> tuple[torch.Tensor, ...]:
    """y_i = x @ weight_i.T + scaling_i * (dropout_i(x) @ lora_A_i.T) @ lora_B_i.T + bias_i, for each projection i

    What `lora_matmul` computes, for several linear layers of one x, such as the query, key and value projections of
    attention: x is saved once and its gradient is one sum. Gradients go to x and to every lora_A, lora_B, bias and
    tensor scaling, each only where it is required.

    Args:
        x: [*, K] float32, float16 or bfloat16 (float64 too where the reference or C++ runs), any strides. Under
            autocast it is cast to autocast's dtype first, as `torch.nn.functional.linear` does.
        projections: one or more. They share K and the device; N, the rank and the kind of weight may differ, and a
            projection without an adapter is its frozen layer. Dense weights come in x's dtype (any under autocast).
        dropout_p: share of x's elements that the low-rank terms drop when `training`, in steps of 1/32768. Every
            projection has a mask of its own, as in PEFT. No mask is stored: see `peftkern/ops/_dropout.py`.

    Returns:
        One [*, N_i] per projection in x's dtype; both of its terms accumulate in float32.

    Raises:
        ValueError, TypeError: naming the projection and the argument that does not fit, before anything is launched.

    Source: Hu et al. 2021, arXiv:2106.09685, eq. 3.
    """
    check(x, projections, dropout_p)
    seeds = draw_seeds(x.device, len(projections)) if training and dropout_threshold(dropout_p) else None
    return lora_qkv_seeded(x, projections, dropout_p=dropout_p, seeds=seeds)


def lora_qkv_seeded(
    x: torch.Tensor,
    projections: Sequence[LoRAProjection],
    *,
    dropout_p: float = 0.0,
    seeds: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """`lora_qkv` with the dropout's seeds given, int64 [n] on x's device, or None for no dropout. Unchecked."""
    for index, projection in enumerate(projections):
        check_dtype(f"{OP}: projections[{index}]", x, projection.weight)
    x = x.to(autocast_dtype(x))
    packed = pack(projections, x)
    tensors = (*packed.lora_A, *packed.lora_B, *packed.biases, *packed.pieces)
    ys = _LoRAQKV.apply(as_rows(x), seeds, packed.scalings, float(dropout_p), packed.layouts, *tensors)
    return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in ys)
