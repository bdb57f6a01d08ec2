"""NF4 ops: schemas, argument checks, fake kernels."""

from __future__ import annotations

import torch

from peftkern.ops._library import define, fake
from peftkern.ops.nf4.weight import BLOCKSIZES, FLOAT_DTYPES, NF4Weight

_WEIGHT = "Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? nested_code, Tensor? nested_offset"

define("nf4_quantize(Tensor weight, int blocksize) -> (Tensor, Tensor)")
define("nf4_quantize_absmax(Tensor absmax, Tensor offset, Tensor code, int blocksize) -> (Tensor, Tensor)")
define(f"nf4_dequantize_out({_WEIGHT}, int blocksize, int nested_blocksize, Tensor(a!) out) -> ()")
# Rows from `row` on and columns from `column` on of a matrix [out_features, in_features]; out: how many of each.
define(
    f"nf4_dequantize_slice_out({_WEIGHT}, int blocksize, int nested_blocksize, int out_features, int in_features, "
    "int row, int column, Tensor(a!) out) -> ()"
)
# settled: no kernel that may still be running writes the weight (settled.py). A kernel may then read it early.
define(
    f"nf4_matmul(Tensor x, {_WEIGHT}, Tensor? bias, int blocksize, int nested_blocksize, int out_features, "
    "bool settled=False) -> Tensor"
)
define(f"nf4_matmul_dx(Tensor dy, {_WEIGHT}, int blocksize, int nested_blocksize, int in_features) -> Tensor")


@fake("nf4_quantize")
def _(weight, blocksize):
    numel = weight.numel()
    packed = weight.new_empty(((numel + 1) // 2, 1), dtype=torch.uint8)
    return packed, weight.new_empty(((numel + blocksize - 1) // blocksize,), dtype=torch.float32)


@fake("nf4_quantize_absmax")
def _(absmax, offset, code, blocksize):
    nested = absmax.new_empty(((absmax.numel() + blocksize - 1) // blocksize,), dtype=torch.float32)
    return torch.empty_like(absmax, dtype=torch.uint8), nested


@fake("nf4_dequantize_out")
def _(packed, absmax, nested_absmax, nested_code, nested_offset, blocksize, nested_blocksize, out):
    return None


@fake("nf4_dequantize_slice_out")
def _(
    packed,
    absmax,
    nested_absmax,
    nested_code,
    nested_offset,
    blocksize,
    nested_blocksize,
    out_features,
    in_features,
    row,
    column,
    out,
):
    return None


@fake("nf4_matmul")
def _(
    x,
    packed,
    absmax,
    nested_absmax,
    nested_code,
    nested_offset,
    bias,
    blocksize,
    nested_blocksize,
    out_features,
    settled=False,
):
    return x.new_empty((x.shape[0], out_features))


@fake("nf4_matmul_dx")
def _(dy, packed, absmax, nested_absmax, nested_code, nested_offset, blocksize, nested_blocksize, in_features):
    return dy.new_empty((dy.shape[0], in_features))


def check_quantize(weight: torch.Tensor, blocksize: int) -> None:
    """Raises ValueError or TypeError for what `quantize_nf4` cannot take."""
    if not isinstance(weight, torch.Tensor):
        raise TypeError(f"quantize_nf4: weight must be a torch.Tensor, got {type(weight).__name__}")
    if weight.dtype not in FLOAT_DTYPES:
        raise ValueError(
            f"quantize_nf4: weight must be float32, float16 or bfloat16, got {weight.dtype}; cast it first"
        )
    if blocksize not in BLOCKSIZES:
        raise ValueError(f"quantize_nf4: blocksize must be one of {BLOCKSIZES}, got {blocksize}")


def check_dequantize(q: NF4Weight, dtype: torch.dtype, out: torch.Tensor | None) -> None:
    """Raises ValueError or TypeError for what `dequantize_nf4` cannot take."""
    if not isinstance(q, NF4Weight):
        raise TypeError(f"dequantize_nf4: q must be an NF4Weight, got {type(q).__name__}; make one with quantize_nf4")
    q.check()
    if not dtype.is_floating_point:
        raise ValueError(f"dequantize_nf4: dtype must be a float dtype, got {dtype}")
    if out is None:
        return
    if out.shape != q.shape:
        raise ValueError(f"dequantize_nf4: out must have shape {tuple(q.shape)}, got {tuple(out.shape)}")
    if out.device != q.device:
        raise ValueError(f"dequantize_nf4: out is on {out.device} but the weight is on {q.device}; allocate it there")
    if not out.is_contiguous():
        raise ValueError(f"dequantize_nf4: out must be contiguous, got strides {out.stride()}")


def check_matmul(x: torch.Tensor, q: NF4Weight, bias: torch.Tensor | None) -> None:
    """Raises ValueError or TypeError for what `nf4_matmul` cannot take."""
    if not isinstance(q, NF4Weight):
        raise TypeError(f"nf4_matmul: q must be an NF4Weight, got {type(q).__name__}; make one with quantize_nf4")
    q.check()
    if len(q.shape) != 2:
        raise ValueError(f"nf4_matmul: q must be a matrix [N, K], got shape {tuple(q.shape)}; quantize a 2-D weight")
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"nf4_matmul: x must be a torch.Tensor, got {type(x).__name__}; make a tensor of it")
    if x.dtype not in (*FLOAT_DTYPES, torch.float64):
        raise ValueError(f"nf4_matmul: x must be float32, float16 or bfloat16, got {x.dtype}; cast it first")
    if x.dim() == 0 or x.shape[-1] != q.shape[1]:
        raise ValueError(
            f"nf4_matmul: x [*, K] and q [N, K] must share K, got {tuple(x.shape)} and {tuple(q.shape)}; "
            "is q transposed?"
        )
    if x.device != q.device:
        raise ValueError(f"nf4_matmul: x is on {x.device} but q is on {q.device}; move one of them")
    if bias is not None:
        if tuple(bias.shape) != (q.shape[0],):
            raise ValueError(
                f"nf4_matmul: bias must have shape [{q.shape[0]}], got {tuple(bias.shape)}; give one value per row of q"
            )
        if bias.device != x.device:
            raise ValueError(f"nf4_matmul: bias is on {bias.device} but x is on {x.device}; move one of them")
