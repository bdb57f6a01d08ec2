"""Bottleneck adapter: the public function and its autograd."""

from __future__ import annotations

import torch

from peftkern.ops._autocast import autocast_dtype
from peftkern.ops._dropout import draw_seed, dropout_threshold
from peftkern.ops._rows import as_rows
from peftkern.ops.bottleneck.op import check

_ops = torch.ops.peftkern


class _Bottleneck(torch.autograd.Function):
    """Saves x (shared), the pre-activation [M, b], the weights and the seed."""

    @staticmethod
    def forward(ctx, x, down_weight, down_bias, up_weight, up_bias, residual, seed, activation, scaling, dropout_p):
        y, h = _ops.bottleneck_fwd(
            x, down_weight, down_bias, up_weight, up_bias, residual, activation, scaling, dropout_p, seed
        )
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, down_weight, up_weight, h, seed)
        ctx.activation, ctx.scaling, ctx.dropout_p = activation, scaling, dropout_p
        ctx.residual_dtype = None if residual is None else residual.dtype
        ctx.down_bias_dtype = None if down_bias is None else down_bias.dtype
        ctx.up_bias_dtype = None if up_bias is None else up_bias.dtype
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        needs = ctx.needs_input_grad[:5]
        dx = d_down = d_down_bias = d_up = d_up_bias = d_residual = None
        if any(needs):
            x, down_weight, up_weight, h, seed = ctx.saved_tensors
            grads = _ops.bottleneck_bwd(
                dy,
                x,
                down_weight,
                up_weight,
                h,
                seed,
                ctx.activation,
                ctx.scaling,
                ctx.dropout_p,
                ctx.residual_dtype is None,
                *needs,
            )
            dx, d_down, d_down_bias, d_up, d_up_bias = (g if need else None for g, need in zip(grads, needs))
        if d_down_bias is not None:
            d_down_bias = d_down_bias.to(ctx.down_bias_dtype)
        if d_up_bias is not None:
            d_up_bias = d_up_bias.to(ctx.up_bias_dtype)
        if ctx.needs_input_grad[5]:
            d_residual = dy.to(ctx.residual_dtype)
        return dx, d_down, d_down_bias, d_up, d_up_bias, d_residual, None, None, None, None


def bottleneck(
    x: torch.Tensor,
    down_weight: torch.Tensor,
    down_bias: torch.Tensor | None,
    up_weight: torch.Tensor,
    up_bias: torch.Tensor | None,
    *,
    activation: str = "gelu",
    dropout_p: float = 0.0,
    training: bool = False,
    scaling: float | torch.Tensor = 1.0,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """y = residual + scaling * (dropout(act(x @ down_weight.T + down_bias)) @ up_weight.T + up_bias)

    Gradients go to x, residual, the weights, the biases and, where it is a tensor, scaling; each only where required.

    Args:
        x: [*, H] float32, float16 or bfloat16 (float64 too where the reference or C++ runs), any strides. Under
            autocast the products run in autocast's dtype, and the residual is added in its own.
        down_weight, up_weight: [b, H] and [H, b] of any float dtype. They enter in x's dtype or better; their gradients
            come in their own.
        down_bias, up_bias: [b] and [H] of any float dtype, or None.
        activation: "gelu" (exact, by erf), "gelu_tanh", "relu" or "silu".
        dropout_p: share of the activations dropped when `training`, in steps of 1/32768. No mask is stored: see
            `peftkern/ops/_dropout.py`.
        scaling: a number, or a 0-dim tensor, which is then read at run time and gets its gradient.
        residual: of x's shape, any float dtype and strides; None for x itself.

    Returns:
        [*, H] in the wider of the residual's dtype and the products'; the sum is taken in float32 and rounded once.

    Raises:
        ValueError, TypeError: naming the argument that does not fit, before anything is launched.

    Source: Houlsby et al. 2019, arXiv:1902.00751, section 2.1; scaling and placement beside a layer: He et al. 2021,
        arXiv:2110.04366.
    """
    check(x, down_weight, down_bias, up_weight, up_bias, activation, dropout_p, scaling, residual)
    seed = draw_seed(x.device) if training and dropout_threshold(dropout_p) else None
    return bottleneck_seeded(
        x,
        down_weight,
        down_bias,
        up_weight,
        up_bias,
        activation=activation,
        dropout_p=dropout_p,
        scaling=scaling,
        residual=residual,
        seed=seed,
    )


def bottleneck_seeded(
    x: torch.Tensor,
    down_weight: torch.Tensor,
    down_bias: torch.Tensor | None,
    up_weight: torch.Tensor,
    up_bias: torch.Tensor | None,
    *,
    activation: str = "gelu",
    dropout_p: float = 0.0,
    scaling: float | torch.Tensor = 1.0,
    residual: torch.Tensor | None = None,
    seed: torch.Tensor | None = None,
) -> torch.Tensor:
    """`bottleneck` with the dropout's seed given, int64 [1] on x's device, or None for no dropout. Unchecked."""
    dtype = autocast_dtype(x)
    if residual is None and dtype != x.dtype:
        residual = x  # it is added in its own dtype, not in autocast's
    if isinstance(scaling, torch.Tensor):
        up_weight, scaling, up_bias = up_weight * scaling, 1.0, None if up_bias is None else up_bias * scaling
    x2d = as_rows(x.to(dtype))
    residual = None if residual is None else residual.reshape(x2d.shape)
    y = _Bottleneck.apply(
        x2d,
        down_weight,
        down_bias,
        up_weight,
        up_bias,
        residual,
        seed,
        activation,
        float(scaling),
        float(dropout_p),
    )
    return y.view(x.shape)
