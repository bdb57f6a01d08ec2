"""NF4: the public functions and their autograd."""

from __future__ import annotations

import math

import torch

from peftkern.ops._autocast import autocast_dtype
from peftkern.ops._code_tables import dynamic_map
from peftkern.ops.nf4.op import check_dequantize, check_matmul, check_quantize
from peftkern.ops.nf4.weight import NESTED_BLOCKSIZE, NF4Weight

_ops = torch.ops.peftkern


@torch.no_grad()
def quantize_nf4(weight: torch.Tensor, blocksize: int = 64, double_quant: bool = True) -> NF4Weight:
    """Quantizes a weight to NF4 with bitsandbytes' bytes.

    Args:
        weight: float32, float16 or bfloat16, any shape and strides (read in row-major order), any device.
        blocksize: elements per scale, a power of two from 32 to 4096, over the flattened weight.
        double_quant: also quantize the scales, to 8 bits in blocks of 256.

    Returns:
        NF4Weight on the weight's device, 0.52 bytes per element at block 64 with double quantization.

    Raises:
        ValueError, TypeError: another dtype or blocksize.

    Source: Dettmers et al. 2023, arXiv:2305.14314, section 3.
    """
    check_quantize(weight, blocksize)
    packed, absmax = _ops.nf4_quantize(weight.contiguous(), blocksize)
    if not double_quant:
        return NF4Weight(packed, absmax, weight.shape, weight.dtype, blocksize)
    offset = absmax.mean() if absmax.numel() else absmax.new_zeros(())
    code = dynamic_map(signed=True, device=weight.device)
    codes, nested_absmax = _ops.nf4_quantize_absmax(absmax, offset, code, NESTED_BLOCKSIZE)
    return NF4Weight(packed, codes, weight.shape, weight.dtype, blocksize, nested_absmax, code, offset)


@torch.no_grad()
def dequantize_nf4(q: NF4Weight, dtype: torch.dtype | None = None, out: torch.Tensor | None = None) -> torch.Tensor:
    """The dense weight: code * absmax in float32, rounded once to `dtype`.

    Args:
        q: the quantized weight.
        dtype: of the result; default `out`'s, else `q.dtype`.
        out: contiguous buffer of q.shape to write into instead of allocating.

    Returns:
        Tensor of q.shape; bitwise what bitsandbytes' `dequantize_4bit` returns.

    Raises:
        ValueError, TypeError: pieces of q that disagree, or an `out` that does not fit.
    """
    dtype = dtype or (q.dtype if out is None else out.dtype)
    check_dequantize(q, dtype, out)
    if out is not None and out.dtype != dtype:
        raise ValueError(f"dequantize_nf4: out is {out.dtype} but dtype is {dtype}; give one of them")
    result = torch.empty(q.shape, dtype=dtype, device=q.device) if out is None else out
    _ops.nf4_dequantize_out(*q.tensors(), q.blocksize, q.nested_blocksize, result)
    return result


class _NF4Matmul(torch.autograd.Function):
    """y = x @ weight.T + bias with a frozen NF4 weight. Saves nothing but the packed weight."""

    @staticmethod
    def forward(
        ctx, x, bias, packed, absmax, nested_absmax, nested_code, nested_offset, blocksize, nested, outs, settled
    ):
        weight = (packed, absmax, nested_absmax, nested_code, nested_offset)
        ctx.save_for_backward(*weight)
        ctx.blocksize, ctx.nested_blocksize, ctx.in_features = blocksize, nested, x.shape[-1]
        ctx.bias_dtype = None if bias is None else bias.dtype
        return _ops.nf4_matmul(x, *weight, bias, blocksize, nested, outs, settled)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        dx = dbias = None
        if ctx.needs_input_grad[0]:
            dx = _ops.nf4_matmul_dx(
                dy.contiguous(), *ctx.saved_tensors, ctx.blocksize, ctx.nested_blocksize, ctx.in_features
            )
        if ctx.needs_input_grad[1]:
            dbias = dy.sum(0, dtype=torch.promote_types(dy.dtype, torch.float32)).to(ctx.bias_dtype)
        return dx, dbias, *(None,) * 9


def nf4_matmul(x: torch.Tensor, q: NF4Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """y = x @ dequantize(q).T + bias, with gradients to x and bias; q is frozen.

    Args:
        x: [*, K] float32, float16, bfloat16 or float64, any strides. Under autocast it is cast to its dtype first, as
            `torch.nn.functional.linear` does.
        q: [N, K].
        bias: [N] of any float dtype, or None.

    Returns:
        [*, N] in x's dtype.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit, before anything is launched.

    Source: Dettmers et al. 2023, arXiv:2305.14314, eq. 5.
    """
    check_matmul(x, q, bias)
    x = x.to(autocast_dtype(x))
    x2d = x.reshape(math.prod(x.shape[:-1]), q.shape[1]).contiguous()  # not -1: K may be 0
    settled = not torch.compiler.is_compiling() and x2d.numel() > 0 and q.settled.check(q.tensors())
    if torch.is_grad_enabled() and (x2d.requires_grad or (bias is not None and bias.requires_grad)):
        y = _NF4Matmul.apply(x2d, bias, *q.tensors(), q.blocksize, q.nested_blocksize, q.shape[0], settled)
    else:  # a third of the host's time less
        y = _ops.nf4_matmul(x2d, *q.tensors(), bias, q.blocksize, q.nested_blocksize, q.shape[0], settled)
    return y.view(*x.shape[:-1], q.shape[0])
