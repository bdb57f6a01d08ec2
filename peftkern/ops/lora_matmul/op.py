"""LoRA matmul ops: schemas, argument checks, fake kernels.

Both ops take x [M, K] and dy [M, N] in any strides, which settle the dtype of the products, and weight [N, K],
lora_A [r, K], lora_B [N, r] and bias [N] of any float dtype. The dropout's `seed` is int64 [1], or None for no dropout.

    lora_matmul_fwd -> y [M, N], S [M, r], both in x's dtype, with S = mask(x) lora_A^T, scaled neither by 1 / (1 - p)
    nor by `scaling`: both go into the float32 factor of the second product.
    lora_matmul_bwd -> dx [M, K] in dy's dtype, dA, dB in lora_A's and lora_B's; an empty tensor for what is not needed.
    It reads x only for dA, weight only for dx, S only for dB: each may be None otherwise.
    lora_matmul_fwd_nf4 -> y, S without dropout from an NF4 weight as it is stored, for few tokens: its tensors and
    constants as nf4_matmul takes them.
    lora_matmul_bwd_add -> dA, dB; it adds dx, rounded, to `dx` [M, K] of dy's dtype: for several layers of one x.

The CUDA kernel calls the ops that end in `_pieces` for what it does not take: the same ones, filled on CUDA by the
Python backends even where the kernel owns the others.
"""

from __future__ import annotations

import torch

from peftkern.ops._dropout import check_dropout
from peftkern.ops._frozen_weight import FrozenWeight
from peftkern.ops._library import define, fake
from peftkern.ops._projection import check_adapter, check_base

_OP = "lora_matmul"

for _suffix in ("", "_pieces"):
    define(
        f"lora_matmul_fwd{_suffix}(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor? bias, float scaling, "
        "float dropout_p, Tensor? seed) -> (Tensor, Tensor)"
    )
    define(
        f"lora_matmul_bwd{_suffix}(Tensor dy, Tensor? x, Tensor? weight, Tensor lora_A, Tensor lora_B, Tensor? S, "
        "Tensor? seed, float scaling, float dropout_p, bool need_dx, bool need_dA, bool need_dB) "
        "-> (Tensor, Tensor, Tensor)"
    )
    define(
        f"lora_matmul_fwd_nf4{_suffix}(Tensor x, Tensor packed, Tensor absmax, Tensor? nested_absmax, "
        "Tensor? nested_code, Tensor? nested_offset, Tensor lora_A, Tensor lora_B, Tensor? bias, float scaling, "
        "int blocksize, int nested_blocksize, int out_features, bool settled=False) -> (Tensor, Tensor)"
    )
    define(
        f"lora_matmul_bwd_add{_suffix}(Tensor dy, Tensor? x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor? S, "
        "Tensor? seed, float scaling, float dropout_p, bool need_dA, bool need_dB, Tensor(a!) dx) -> (Tensor, Tensor)"
    )


@fake("lora_matmul_fwd")
@fake("lora_matmul_fwd_pieces")
def _(x, weight, lora_A, lora_B, bias, scaling, dropout_p, seed):
    return x.new_empty((x.shape[0], weight.shape[0])), x.new_empty((x.shape[0], lora_A.shape[0]))


@fake("lora_matmul_bwd")
@fake("lora_matmul_bwd_pieces")
def _(dy, x, weight, lora_A, lora_B, S, seed, scaling, dropout_p, need_dx, need_dA, need_dB):
    dx = dy.new_empty((dy.shape[0], lora_A.shape[1]) if need_dx else (0,))
    return dx, lora_A.new_empty(lora_A.shape if need_dA else (0,)), lora_B.new_empty(lora_B.shape if need_dB else (0,))


@fake("lora_matmul_fwd_nf4")
@fake("lora_matmul_fwd_nf4_pieces")
def _(
    x,
    packed,
    absmax,
    nested_absmax,
    nested_code,
    nested_offset,
    lora_A,
    lora_B,
    bias,
    scaling,
    blocksize,
    nested_blocksize,
    out_features,
    settled=False,
):
    return x.new_empty((x.shape[0], out_features)), x.new_empty((x.shape[0], lora_A.shape[0]))


@fake("lora_matmul_bwd_add")
@fake("lora_matmul_bwd_add_pieces")
def _(dy, x, weight, lora_A, lora_B, S, seed, scaling, dropout_p, need_dA, need_dB, dx):
    return lora_A.new_empty(lora_A.shape if need_dA else (0,)), lora_B.new_empty(lora_B.shape if need_dB else (0,))


def check(
    x: torch.Tensor,
    weight: FrozenWeight,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: float | torch.Tensor,
    bias: torch.Tensor | None,
    dropout_p: float,
) -> None:
    """Raises ValueError or TypeError for what `lora_matmul` cannot take; reads no tensor's values."""
    check_base(_OP, x, weight, bias)
    check_adapter(_OP, weight, lora_A, lora_B, scaling)
    check_dropout(_OP, dropout_p)
