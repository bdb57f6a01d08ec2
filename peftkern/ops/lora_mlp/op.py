"""LoRA MLP ops: schemas, argument checks, fake kernels.

Lists of three, gate, up, down (`pieces` and `layouts`: see `peftkern/ops/_projection.py`). x [M, K] and dy [M, H] come
in any strides and settle the dtype of the products; weights [I, K], [I, K] and [H, I] where dense, lora_A, lora_B and
biases have any float dtype, and a rank is 0 where there is no adapter. `seeds` is int64 [3], one mask each (over x, x
and h), or None for no dropout. `activation` is one of ACTIVATIONS.

    lora_mlp_fwd -> y [M, H]; e = gate(x) and g = up(x), both [M, I]; S [M, r_gate + r_up] and S_down [M, r_down], as of
    lora_qkv; all in x's dtype. h = act(e) * g is not returned: the backward makes it again from what it reads anyway.
    lora_mlp_bwd -> dx [M, K] in dy's dtype, dA and dB in lora_A's and lora_B's, dbias in float32 (float64 for float64);
    an empty tensor for what is not needed. Each input may be None where nothing needs it: x serves dA of gate and up,
    S their dB, S_down that of down; the pieces of gate and up serve dx; the pieces of down whatever lies before down;
    e and g that, and dA of down.
"""

from __future__ import annotations

import torch

from peftkern.ops._dropout import check_dropout
from peftkern.ops._library import define, fake
from peftkern.ops._projection import LoRAProjection, check_projection, out_features
from peftkern.ops.lora_qkv.op import empty_grads

OP = "lora_mlp"
ACTIVATIONS = ("silu", "gelu", "gelu_tanh")

define(
    "lora_mlp_fwd(Tensor x, Tensor?[] pieces, int[] layouts, Tensor[] lora_A, Tensor[] lora_B, Tensor?[] biases, "
    "float[] scalings, float dropout_p, Tensor? seeds, str activation) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
define(
    "lora_mlp_bwd(Tensor dy, Tensor? x, Tensor? e, Tensor? g, Tensor?[] pieces, int[] layouts, Tensor[] lora_A, "
    "Tensor[] lora_B, Tensor? S, Tensor? S_down, Tensor? seeds, float[] scalings, float dropout_p, str activation, "
    "bool need_dx, bool[] need_dA, bool[] need_dB, bool[] need_dbias) -> (Tensor, Tensor[], Tensor[], Tensor[])"
)


@fake("lora_mlp_fwd")
def _(x, pieces, layouts, lora_A, lora_B, biases, scalings, dropout_p, seeds, activation):
    M = x.shape[0]
    intermediate, _, hidden = out_features(pieces, layouts)
    gate, up, down = (A.shape[0] for A in lora_A)
    shapes = (M, hidden), (M, intermediate), (M, intermediate), (M, gate + up), (M, down)
    return tuple(x.new_empty(shape) for shape in shapes)


@fake("lora_mlp_bwd")
def _(
    dy,
    x,
    e,
    g,
    pieces,
    layouts,
    lora_A,
    lora_B,
    S,
    S_down,
    seeds,
    scalings,
    dropout_p,
    activation,
    need_dx,
    need_dA,
    need_dB,
    need_dbias,
):
    dx = dy.new_empty((dy.shape[0], lora_A[0].shape[1]) if need_dx else (0,))
    wide = torch.promote_types(dy.dtype, torch.float32)
    dbias = [dy.new_empty((B.shape[0],) if need else (0,), dtype=wide) for B, need in zip(lora_B, need_dbias)]
    return dx, empty_grads(lora_A, need_dA), empty_grads(lora_B, need_dB), dbias


def check(
    x: torch.Tensor,
    gate: LoRAProjection,
    up: LoRAProjection,
    down: LoRAProjection,
    activation: str,
    dropout_p: float,
) -> None:
    """Raises ValueError or TypeError for what `lora_mlp` cannot take; reads no tensor's values."""
    check_projection(f"{OP}: gate", x, gate)
    check_projection(f"{OP}: up", x, up)
    if up.weight.shape != gate.weight.shape:
        raise ValueError(
            f"{OP}: gate.weight and up.weight must have one shape [I, K], got {tuple(gate.weight.shape)} and "
            f"{tuple(up.weight.shape)}; are they of one layer?"
        )
    check_projection(f"{OP}: down", x, down, input_shape=(*x.shape[:-1], gate.weight.shape[0]))
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"{OP}: activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}; compute the MLP with "
            "lora_qkv and lora_matmul for another"
        )
    check_dropout(OP, dropout_p)
