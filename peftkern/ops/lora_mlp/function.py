"""LoRA MLP: the public function and its autograd."""

from __future__ import annotations

import torch

from peftkern.ops._autocast import autocast_dtype
from peftkern.ops._dropout import draw_seeds, dropout_threshold
from peftkern.ops._projection import PIECES, LoRAProjection, check_dtype, pack
from peftkern.ops._rows import as_rows
from peftkern.ops.lora_mlp.op import OP, check

_ops = torch.ops.peftkern
_FIXED = 6  # arguments of the autograd function before its tensors: 3 lora_A, 3 lora_B, 3 biases, the pieces


class _LoRAMLP(torch.autograd.Function):
    """Saves x, e = gate(x) and g = up(x), the S of all three, the seeds, and the weights as they came. Not h."""

    @staticmethod
    def forward(ctx, x, seeds, scalings, dropout_p, layouts, activation, *tensors):
        lora_A, lora_B, biases, pieces = tensors[:3], tensors[3:6], tensors[6:9], tensors[9:]
        y, e, g, S, S_down = _ops.lora_mlp_fwd(
            x, pieces, layouts, lora_A, lora_B, biases, scalings, dropout_p, seeds, activation
        )
        need_dx, needs = ctx.needs_input_grad[0], ctx.needs_input_grad[_FIXED:]
        need_A, need_B, need_bias = needs[:3], needs[3:6], needs[6:9]
        inner = need_dx or any(need_A[:2] + need_B[:2] + need_bias[:2])
        activations = inner or need_A[2]
        ctx.save_for_backward(
            x if any(need_A[:2]) else None,
            e if activations else None,
            g if activations else None,
            S if any(need_B[:2]) else None,
            S_down if need_B[2] else None,
            seeds,
            *lora_A,
            *lora_B,
            *(pieces[: 2 * PIECES] if need_dx else (None,) * (2 * PIECES)),
            *(pieces[2 * PIECES :] if inner else (None,) * PIECES),
        )
        ctx.scalings, ctx.dropout_p, ctx.layouts, ctx.activation = scalings, dropout_p, layouts, activation
        ctx.bias_dtypes = tuple(None if bias is None else bias.dtype for bias in biases)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        need_dx, needs = ctx.needs_input_grad[0], ctx.needs_input_grad[_FIXED:]
        need_dA, need_dB, need_dbias = list(needs[:3]), list(needs[3:6]), list(needs[6:9])
        x, e, g, S, S_down, seeds, *tensors = ctx.saved_tensors
        dx, dA, dB, dbias = _ops.lora_mlp_bwd(
            dy,
            x,
            e,
            g,
            tensors[6:],
            ctx.layouts,
            tensors[:3],
            tensors[3:6],
            S,
            S_down,
            seeds,
            ctx.scalings,
            ctx.dropout_p,
            ctx.activation,
            need_dx,
            need_dA,
            need_dB,
            need_dbias,
        )
        return (
            dx if need_dx else None,
            *(None,) * (_FIXED - 1),
            *(grad if need else None for grad, need in zip(dA, need_dA)),
            *(grad if need else None for grad, need in zip(dB, need_dB)),
            *(grad.to(dtype) if need else None for grad, need, dtype in zip(dbias, need_dbias, ctx.bias_dtypes)),
            *(None,) * (3 * PIECES),
        )


def lora_mlp(
    x: torch.Tensor,
    gate: LoRAProjection,
    up: LoRAProjection,
    down: LoRAProjection,
    *,
    activation: str = "silu",
    dropout_p: float = 0.0,
    training: bool = False,
) -> torch.Tensor:
    """y = down(h) with h = act(gate(x)) * up(x), each a frozen linear layer with its low-rank update

    Of size [*, I], gate(x) and up(x) are saved; the activation and h are computed again in the backward. Without
    dropout nothing else of that size is held: h and the gradients are made in parts. Gradients go to x and to every
    lora_A, lora_B, bias and tensor scaling, each only where it is required.

    Args:
        x: [*, K] float32, float16 or bfloat16 (float64 too where the reference or C++ runs), any strides. Under
            autocast it is cast to autocast's dtype first, as `torch.nn.functional.linear` does.
        gate, up: with weights [I, K]. Ranks and kinds of weight may differ, and a projection without an adapter is its
            frozen layer. Dense weights come in x's dtype (any under autocast).
        down: with a weight [H, I].
        activation: "silu" (SwiGLU), "gelu" (exact, by erf) or "gelu_tanh" (GeGLU).
        dropout_p: share of the elements that the low-rank terms drop when `training`, in steps of 1/32768. Every
            projection has a mask of its own, down's over h, as in PEFT. No mask is stored: see
            `peftkern/ops/_dropout.py`.

    Returns:
        [*, H] in x's dtype.

    Raises:
        ValueError, TypeError: naming the projection and the argument that does not fit, before anything is launched.

    Source: Hu et al. 2021, arXiv:2106.09685, eq. 3; Shazeer 2020, arXiv:2002.05202, eq. 6.
    """
    check(x, gate, up, down, activation, dropout_p)
    seeds = draw_seeds(x.device, 3) if training and dropout_threshold(dropout_p) else None
    return lora_mlp_seeded(x, gate, up, down, activation=activation, dropout_p=dropout_p, seeds=seeds)


def lora_mlp_seeded(
    x: torch.Tensor,
    gate: LoRAProjection,
    up: LoRAProjection,
    down: LoRAProjection,
    *,
    activation: str = "silu",
    dropout_p: float = 0.0,
    seeds: torch.Tensor | None = None,
) -> torch.Tensor:
    """`lora_mlp` with the dropout's seeds given, int64 [3] on x's device, or None for no dropout. Unchecked."""
    projections = (gate, up, down)
    for name, projection in zip(("gate", "up", "down"), projections):
        check_dtype(f"{OP}: {name}", x, projection.weight)
    x = x.to(autocast_dtype(x))
    packed = pack(projections, x)
    tensors = (*packed.lora_A, *packed.lora_B, *packed.biases, *packed.pieces)
    y = _LoRAMLP.apply(as_rows(x), seeds, packed.scalings, float(dropout_p), packed.layouts, activation, *tensors)
    return y.view(*x.shape[:-1], y.shape[-1])
