"""Bottleneck adapter in eager PyTorch, any device and dtype: the oracle, and the backend where nothing is compiled."""

from __future__ import annotations

import torch
from torch.nn import functional

from peftkern.ops._activations import activate, activation_backward_
from peftkern.ops._dropout import dropout_scale, masked


def formula(
    x: torch.Tensor,
    down_weight: torch.Tensor,
    down_bias: torch.Tensor | None,
    up_weight: torch.Tensor,
    up_bias: torch.Tensor | None,
    activation: str = "gelu",
    dropout_p: float = 0.0,
    scaling: float = 1.0,
    residual: torch.Tensor | None = None,
    seed: torch.Tensor | None = None,
) -> torch.Tensor:
    """The equation as an eager module computes it, every step rounded to x's dtype. Differentiable by plain autograd.

    Evaluated in float64 it is the truth; in x's dtype its error is the allowance.
    """
    h = functional.linear(x.reshape(-1, x.shape[-1]), _to(down_weight, x), _to(down_bias, x))
    a = activate(h, activation)
    if seed is not None:
        a = masked(a, seed, dropout_p) * dropout_scale(dropout_p)
    update = functional.linear(a, _to(up_weight, x), _to(up_bias, x)).view(x.shape)
    return (x if residual is None else residual) + scaling * update


def bottleneck_fwd(
    x: torch.Tensor,
    down_weight: torch.Tensor,
    down_bias: torch.Tensor | None,
    up_weight: torch.Tensor,
    up_bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    activation: str,
    scaling: float,
    dropout_p: float,
    seed: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y = residual + scaling * (drop(act(h)) up_weight^T + up_bias) and h = x down_weight^T + down_bias."""
    with torch.autocast(x.device.type, enabled=False):  # the dtypes are settled by the caller
        h = functional.linear(x, _to(down_weight, x), _to(down_bias, x))
        a = masked(activate(h, activation), seed, dropout_p)
        y = _wide(a @ _to(up_weight, x).t()) * _factor(scaling, dropout_p, seed)
        if up_bias is not None:
            y += up_bias * scaling
        y += x if residual is None else residual
    return y.to(x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)), h


def bottleneck_bwd(
    dy: torch.Tensor,
    x: torch.Tensor | None,
    down_weight: torch.Tensor,
    up_weight: torch.Tensor,
    h: torch.Tensor,
    seed: torch.Tensor | None,
    activation: str,
    scaling: float,
    dropout_p: float,
    residual_is_x: bool,
    need_dx: bool,
    need_down_weight: bool,
    need_down_bias: bool,
    need_up_weight: bool,
    need_up_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """dh = act'(h) * factor * mask(dy up_weight); dx = dh down_weight (+ dy); d_down = dh^T x; d_up = factor dy^T a."""
    wide = torch.promote_types(h.dtype, torch.float32)
    dx, d_down, d_up = h.new_empty(0), down_weight.new_empty(0), up_weight.new_empty(0)
    d_down_bias, d_up_bias = h.new_empty(0, dtype=wide), h.new_empty(0, dtype=wide)
    factor = _factor(scaling, dropout_p, seed)
    with torch.autocast(dy.device.type, enabled=False):
        g = dy.to(h.dtype)
        if need_dx or need_down_weight or need_down_bias:
            da = _wide(masked(g @ _to(up_weight, h), seed, dropout_p)) * factor
            dh_wide = activation_backward_(da, _wide(h), activation)
            dh = dh_wide.to(h.dtype)
            if need_dx:
                dx = dh @ _to(down_weight, h)
                if residual_is_x:
                    dx += dy
            if need_down_weight:
                assert x is not None
                d_down = (dh.t() @ x).to(down_weight.dtype)
            if need_down_bias:
                d_down_bias = dh_wide.sum(0)
        if need_up_weight:
            a = masked(activate(h, activation), seed, dropout_p)
            d_up = (_wide(g.t() @ a) * factor).to(up_weight.dtype)
        if need_up_bias:
            d_up_bias = dy.sum(0, dtype=wide) * scaling
    return dx, d_down, d_down_bias, d_up, d_up_bias


def _to(tensor, like):  # type: ignore[no-untyped-def]
    return None if tensor is None else tensor.to(like.dtype)


def _wide(t: torch.Tensor) -> torch.Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))


def _factor(scaling: float, dropout_p: float, seed: torch.Tensor | None) -> float:
    return scaling if seed is None else scaling * dropout_scale(dropout_p)
