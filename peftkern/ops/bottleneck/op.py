"""Bottleneck adapter ops: schemas, argument checks, fake kernels.

    bottleneck_fwd -> y [M, H] in the wider of x's and residual's dtypes, and h [M, b], the pre-activation in x's dtype.
    `residual` None stands for x itself.
    bottleneck_bwd -> dx [M, H] in h's dtype, d_down_weight, d_up_weight in their weights' dtypes, d_down_bias [b] and
    d_up_bias [H] in float32 (float64 for float64); an empty tensor for what is not needed. `residual_is_x` adds dy to
    dx. It reads x only for d_down_weight: it may be None otherwise.

x [M, H] and dy [M, H] come in any strides, weights and biases in any float dtype. `activation` is a key of ACTIVATIONS.
The dropout's `seed` is int64 [1], or None for no dropout; it masks the activation [M, b].

The CUDA kernels call `bottleneck_fwd_pieces` and `bottleneck_bwd_pieces` for what they do not take: the same two ops,
filled on CUDA by the Python backends even where the kernels own the others.
"""

from __future__ import annotations

import sys

import torch

from peftkern.ops._dropout import check_dropout
from peftkern.ops._frozen_weight import COMPUTE_DTYPES, is_sharded
from peftkern.ops._library import define, fake

_OP = "bottleneck"
ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu")

for _suffix in ("", "_pieces"):
    define(
        f"bottleneck_fwd{_suffix}(Tensor x, Tensor down_weight, Tensor? down_bias, Tensor up_weight, Tensor? up_bias, "
        "Tensor? residual, str activation, float scaling, float dropout_p, Tensor? seed) -> (Tensor, Tensor)"
    )
    define(
        f"bottleneck_bwd{_suffix}(Tensor dy, Tensor? x, Tensor down_weight, Tensor up_weight, Tensor h, Tensor? seed, "
        "str activation, float scaling, float dropout_p, bool residual_is_x, bool need_dx, bool need_down_weight, "
        "bool need_down_bias, bool need_up_weight, bool need_up_bias) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    )


@fake("bottleneck_fwd")
@fake("bottleneck_fwd_pieces")
def _(x, down_weight, down_bias, up_weight, up_bias, residual, activation, scaling, dropout_p, seed):
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    return x.new_empty(x.shape, dtype=dtype), x.new_empty((x.shape[0], down_weight.shape[0]))


@fake("bottleneck_bwd")
@fake("bottleneck_bwd_pieces")
def _(
    dy,
    x,
    down_weight,
    up_weight,
    h,
    seed,
    activation,
    scaling,
    dropout_p,
    residual_is_x,
    need_dx,
    need_down_weight,
    need_down_bias,
    need_up_weight,
    need_up_bias,
):
    wide = torch.promote_types(h.dtype, torch.float32)
    return (
        h.new_empty(dy.shape if need_dx else (0,)),
        down_weight.new_empty(down_weight.shape if need_down_weight else (0,)),
        h.new_empty((h.shape[1],) if need_down_bias else (0,), dtype=wide),
        up_weight.new_empty(up_weight.shape if need_up_weight else (0,)),
        h.new_empty((dy.shape[1],) if need_up_bias else (0,), dtype=wide),
    )


def check(
    x: torch.Tensor,
    down_weight: torch.Tensor,
    down_bias: torch.Tensor | None,
    up_weight: torch.Tensor,
    up_bias: torch.Tensor | None,
    activation: str,
    dropout_p: float,
    scaling: float | torch.Tensor,
    residual: torch.Tensor | None,
) -> None:
    """Raises ValueError or TypeError for what `bottleneck` cannot take; reads no tensor's values."""
    optional = {"down_bias": down_bias, "up_bias": up_bias, "residual": residual}
    named = {"x": x, "down_weight": down_weight, "up_weight": up_weight}
    named |= {name: tensor for name, tensor in optional.items() if tensor is not None}
    for name, tensor in named.items():
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{_OP}: {name} must be a torch.Tensor, got {type(tensor).__name__}")
        if is_sharded(tensor):
            raise ValueError(
                f"{_OP}: {name} is a sharded DTensor; call the module that FSDP or tensor parallelism wraps, or pass "
                f"{name}.full_tensor()"
            )
        if tensor.dtype not in COMPUTE_DTYPES:
            raise ValueError(f"{_OP}: {name} must be float32, float16 or bfloat16, got {tensor.dtype}; cast it first")
        if tensor.device != x.device:
            meta = "meta" in (tensor.device.type, x.device.type)
            cure = "load its values, or materialize it with to_empty()" if meta else "move one of them"
            raise ValueError(f"{_OP}: {name} is on {tensor.device} but x is on {x.device}; {cure}")
    for name in ("down_weight", "up_weight"):
        shape = tuple(named[name].shape)
        if 0 in shape:
            raise ValueError(
                f"{_OP}: {name} is empty, got shape {shape}; FSDP and ZeRO-3 leave such a shard outside the "
                "forward of the module they wrap: gather it, or call that module"
            )
        if len(shape) != 2:
            raise ValueError(f"{_OP}: {name} must be a matrix, got shape {shape}")
    if x.dim() == 0 or x.shape[-1] != down_weight.shape[1]:
        raise ValueError(
            f"{_OP}: x [*, H] and down_weight [b, H] must share H, got {tuple(x.shape)} and "
            f"{tuple(down_weight.shape)}; is down_weight transposed?"
        )
    b, H = down_weight.shape
    if tuple(up_weight.shape) != (H, b):
        raise ValueError(
            f"{_OP}: up_weight must be [H, b] = [{H}, {b}], got {tuple(up_weight.shape)}; is it transposed?"
        )
    if down_bias is not None and tuple(down_bias.shape) != (b,):
        raise ValueError(f"{_OP}: down_bias must have shape [{b}], got {tuple(down_bias.shape)}")
    if up_bias is not None and tuple(up_bias.shape) != (H,):
        raise ValueError(f"{_OP}: up_bias must have shape [{H}], got {tuple(up_bias.shape)}")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"{_OP}: residual must have x's shape {tuple(x.shape)}, got {tuple(residual.shape)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"{_OP}: activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if isinstance(scaling, torch.Tensor):
        if scaling.dim() != 0:
            raise ValueError(f"{_OP}: scaling must be a number or a 0-dim tensor, got shape {tuple(scaling.shape)}")
    elif not abs(scaling) <= sys.float_info.max:
        raise ValueError(f"{_OP}: scaling must be finite, got {scaling}; 1.0 is the usual adapter")
    check_dropout(_OP, dropout_p)
