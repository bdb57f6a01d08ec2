"""LoRA QKV ops: schemas, argument checks, fake kernels.

n projections of one x, in lists of n (`pieces` and `layouts`: see `peftkern/ops/_projection.py`). x [M, K] and dy_i
[M, N_i] come in any strides and settle the dtype of the products; lora_A_i [r_i, K], lora_B_i [N_i, r_i], bias_i [N_i]
and dense weights [N_i, K] have any float dtype, and r_i is 0 where there is no adapter. `seeds` is int64 [n], one mask
each, or None for no dropout. R is the sum of the ranks.

    lora_qkv_fwd -> y_i [M, N_i], and S [M, R] whose columns are the S_i = mask_i(x) lora_A_i^T side by side, all in x's
    dtype and unscaled, as in lora_matmul.
    lora_qkv_bwd -> dx [M, K] in dy's dtype, the sum over all projections; dA_i and dB_i in lora_A_i's and lora_B_i's;
    an empty tensor for what is not needed. It reads x only for a dA, weights only for dx, S only for a dB: x, S and all
    pieces may be None otherwise.
    lora_qkv_bwd_add -> dA_i and dB_i of the same backward, whose dx is added to `dx`, contiguous and of dy's dtype. For
    other ops: torch.compile takes no op that writes and returns lists.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from peftkern.ops._dropout import check_dropout
from peftkern.ops._library import define, fake
from peftkern.ops._projection import LoRAProjection, check_projection, out_features

OP = "lora_qkv"

define(
    "lora_qkv_fwd(Tensor x, Tensor?[] pieces, int[] layouts, Tensor[] lora_A, Tensor[] lora_B, Tensor?[] biases, "
    "float[] scalings, float dropout_p, Tensor? seeds) -> (Tensor[], Tensor)"
)
define(
    "lora_qkv_bwd(Tensor[] dys, Tensor? x, Tensor?[] pieces, int[] layouts, Tensor[] lora_A, Tensor[] lora_B, "
    "Tensor? S, Tensor? seeds, float[] scalings, float dropout_p, bool need_dx, bool[] need_dA, bool[] need_dB) "
    "-> (Tensor, Tensor[], Tensor[])"
)
define(
    "lora_qkv_bwd_add(Tensor[] dys, Tensor? x, Tensor?[] pieces, int[] layouts, Tensor[] lora_A, Tensor[] lora_B, "
    "Tensor? S, Tensor? seeds, float[] scalings, float dropout_p, bool[] need_dA, bool[] need_dB, Tensor(a!) dx) "
    "-> (Tensor[], Tensor[])"
)
# What the CUDA kernel does in a launch of several projections without dropout: fused.py tells which and calls these.
#     lora_group_fwd -> y_i of the projections from `first` on whose dense `weights` are given. The first call makes S.
#     lora_group_bwd -> dx of the projections from `first` on whose `dys` are given, or dx added to `sum`; dA of all
#     projections where x is given; dB of the former. D [M, R], like S, passes from call to call.
define(
    "lora_group_fwd(Tensor x, Tensor[] weights, Tensor[] lora_A, Tensor[] lora_B, Tensor?[] biases, float[] scalings, "
    "int first, Tensor(a!) S) -> Tensor[]"
)
define(
    "lora_group_bwd(Tensor[] dys, Tensor? x, Tensor[] weights, Tensor[] lora_A, Tensor[] lora_B, Tensor? S, "
    "float[] scalings, int first, Tensor(a!)? D, Tensor(b!)? sum, bool need_dx, bool[] need_dA, bool[] need_dB) "
    "-> (Tensor, Tensor[], Tensor[])"
)


@fake("lora_qkv_fwd")
def _(x, pieces, layouts, lora_A, lora_B, biases, scalings, dropout_p, seeds):
    M = x.shape[0]
    ys = [x.new_empty((M, N)) for N in out_features(pieces, layouts)]
    return ys, x.new_empty((M, sum(A.shape[0] for A in lora_A)))


@fake("lora_qkv_bwd")
def _(dys, x, pieces, layouts, lora_A, lora_B, S, seeds, scalings, dropout_p, need_dx, need_dA, need_dB):
    dx = dys[0].new_empty((dys[0].shape[0], lora_A[0].shape[1]) if need_dx else (0,))
    return dx, empty_grads(lora_A, need_dA), empty_grads(lora_B, need_dB)


@fake("lora_qkv_bwd_add")
def _(dys, x, pieces, layouts, lora_A, lora_B, S, seeds, scalings, dropout_p, need_dA, need_dB, dx):
    return empty_grads(lora_A, need_dA), empty_grads(lora_B, need_dB)


def empty_grads(tensors: Sequence[torch.Tensor], needed: Sequence[bool]) -> list[torch.Tensor]:
    """A tensor like each, or an empty one where it is not needed."""
    return [t.new_empty(t.shape if need else (0,)) for t, need in zip(tensors, needed)]


def check(x: torch.Tensor, projections: Sequence[LoRAProjection], dropout_p: float) -> None:
    """Raises ValueError or TypeError for what `lora_qkv` cannot take; reads no tensor's values."""
    if isinstance(projections, LoRAProjection) or not isinstance(projections, Sequence):
        raise TypeError(
            f"{OP}: projections must be a list or tuple of LoRAProjection, got {type(projections).__name__}"
        )
    if not projections:
        raise ValueError(f"{OP}: projections must hold at least one LoRAProjection, got none")
    for index, projection in enumerate(projections):
        check_projection(f"{OP}: projections[{index}]", x, projection)
    check_dropout(OP, dropout_p)
