"""LoRA matmul ops: schemas, argument checks, fake kernels.

Both ops take x [M, K] and dy [M, N] in any strides, which settle the dtype of the products, and weight [N, K],
lora_A [r, K], lora_B [N, r] and bias [N] of any float dtype. The dropout's `seed` is int64 [1], or None for no dropout.

    lora_matmul_fwd -> y [M, N], S [M, r], both in x's dtype, with S = mask(x) lora_A^T, scaled neither by 1 / (1 - p)
    nor by `scaling`: both go into the float32 factor of the second product.
    lora_matmul_bwd -> dx [M, K] in dy's dtype, dA, dB in lora_A's and lora_B's; an empty tensor for what is not needed.
    It reads x only for dA, weight only for dx, S only for dB: each may be None otherwise.
"""

from __future__ import annotations

import sys

import torch

from peftkern.ops._dropout import check_dropout
from peftkern.ops._frozen_weight import COMPUTE_DTYPES, FrozenWeight, check_frozen, is_sharded
from peftkern.ops._library import define, fake
from peftkern.ops.nf4.weight import NF4Weight

_OP = "lora_matmul"

define(
    "lora_matmul_fwd(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor? bias, float scaling, "
    "float dropout_p, Tensor? seed) -> (Tensor, Tensor)"
)
define(
    "lora_matmul_bwd(Tensor dy, Tensor? x, Tensor? weight, Tensor lora_A, Tensor lora_B, Tensor? S, Tensor? seed, "
    "float scaling, float dropout_p, bool need_dx, bool need_dA, bool need_dB) -> (Tensor, Tensor, Tensor)"
)


@fake("lora_matmul_fwd")
def _(x, weight, lora_A, lora_B, bias, scaling, dropout_p, seed):
    return x.new_empty((x.shape[0], weight.shape[0])), x.new_empty((x.shape[0], lora_A.shape[0]))


@fake("lora_matmul_bwd")
def _(dy, x, weight, lora_A, lora_B, S, seed, scaling, dropout_p, need_dx, need_dA, need_dB):
    dx = dy.new_empty((dy.shape[0], lora_A.shape[1]) if need_dx else (0,))
    return dx, lora_A.new_empty(lora_A.shape if need_dA else (0,)), lora_B.new_empty(lora_B.shape if need_dB else (0,))


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
    check_frozen(_OP, weight)
    N, K = weight.shape
    named = {"x": x, "lora_A": lora_A, "lora_B": lora_B} | ({} if bias is None else {"bias": bias})
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
        if tensor.device != weight.device:
            meta = "meta" in (tensor.device.type, weight.device.type)
            cure = "load its values, or materialize it with to_empty()" if meta else "move one of them"
            raise ValueError(f"{_OP}: {name} is on {tensor.device} but weight is on {weight.device}; {cure}")
    if x.dim() == 0 or x.shape[-1] != K:
        raise ValueError(
            f"{_OP}: x [*, K] and weight [N, K] must share K, got {tuple(x.shape)} and {tuple(weight.shape)}; is "
            "weight transposed?"
        )
    if lora_A.dim() != 2 or lora_A.shape[1] != K:
        raise ValueError(f"{_OP}: lora_A must be [r, K] with K = {K}, got {tuple(lora_A.shape)}; is it transposed?")
    if lora_B.dim() != 2 or lora_B.shape[0] != N:
        raise ValueError(f"{_OP}: lora_B must be [N, r] with N = {N}, got {tuple(lora_B.shape)}; is it transposed?")
    if lora_A.shape[0] != lora_B.shape[1]:
        raise ValueError(
            f"{_OP}: lora_A [r, K] and lora_B [N, r] must share the rank, got {tuple(lora_A.shape)} and "
            f"{tuple(lora_B.shape)}; were they saved by different adapters?"
        )
    if lora_A.shape[0] == 0:
        raise ValueError(
            f"{_OP}: the rank must be at least 1, got lora_A {tuple(lora_A.shape)}; drop the adapter instead"
        )
    if bias is not None and tuple(bias.shape) != (N,):
        raise ValueError(f"{_OP}: bias must have shape [{N}], got {tuple(bias.shape)}")
    if isinstance(scaling, torch.Tensor):
        if scaling.dim() != 0:
            raise ValueError(f"{_OP}: scaling must be a number or a 0-dim tensor, got shape {tuple(scaling.shape)}")
    elif not abs(scaling) <= sys.float_info.max:
        raise ValueError(f"{_OP}: scaling must be finite, got {scaling}; it is lora_alpha / r")
    check_dropout(_OP, dropout_p)


def check_dtype(x: torch.Tensor, weight: FrozenWeight) -> None:
    """Raises ValueError when x and a dense weight differ in dtype and autocast does not bring them together."""
    if isinstance(weight, NF4Weight) or x.dtype == weight.dtype:
        return
    if not torch.is_autocast_enabled(x.device.type):
        raise ValueError(
            f"{_OP}: x is {x.dtype} but weight is {weight.dtype}; cast one of them or run under torch.autocast"
        )
