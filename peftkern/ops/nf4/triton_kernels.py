"""NF4 in Triton: the backend for GPUs when no CUDA binary is present."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from peftkern.ops._code_tables import nf4_code

BLOCK_BYTES = 512  # packed bytes per program: 1024 weights


@triton.jit
def _nf4_dequantize_kernel(
    packed_ptr,
    absmax_ptr,
    nested_absmax_ptr,
    nested_code_ptr,
    nested_offset_ptr,
    code_ptr,
    out_ptr,
    numel,
    blocksize,
    nested_blocksize,
    NESTED: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
):
    byte = tl.program_id(0).to(tl.int64) * BLOCK_BYTES + tl.arange(0, BLOCK_BYTES)
    in_bytes = byte * 2 < numel
    block = byte * 2 // blocksize  # blocksize is even, so both nibbles of a byte share a block
    if NESTED:
        scale = tl.load(nested_code_ptr + tl.load(absmax_ptr + block, mask=in_bytes, other=0).to(tl.int32))
        scale *= tl.load(nested_absmax_ptr + block // nested_blocksize, mask=in_bytes, other=0.0)
        scale += tl.load(nested_offset_ptr)
    else:
        scale = tl.load(absmax_ptr + block, mask=in_bytes, other=0.0)
    pair = tl.load(packed_ptr + byte, mask=in_bytes, other=0).to(tl.int32)
    high = tl.load(code_ptr + (pair >> 4)) * scale
    low = tl.load(code_ptr + (pair & 15)) * scale
    index = tl.program_id(0).to(tl.int64) * (2 * BLOCK_BYTES) + tl.arange(0, 2 * BLOCK_BYTES)
    tl.store(out_ptr + index, tl.interleave(high, low).to(out_ptr.dtype.element_ty), mask=index < numel)


def dequantize_out(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    nested_absmax: torch.Tensor | None,
    nested_code: torch.Tensor | None,
    nested_offset: torch.Tensor | None,
    blocksize: int,
    nested_blocksize: int,
    out: torch.Tensor,
) -> None:
    """Writes code * absmax into `out`, bitwise as the reference does: products and sums are not fused."""
    numel = out.numel()
    if numel == 0:
        return
    _nf4_dequantize_kernel[(triton.cdiv(numel, 2 * BLOCK_BYTES),)](
        packed,
        absmax,
        nested_absmax,
        nested_code,
        nested_offset,
        nf4_code(out.device),
        out,
        numel,
        blocksize,
        nested_blocksize,
        NESTED=nested_absmax is not None,
        BLOCK_BYTES=BLOCK_BYTES,
        num_warps=4,
        enable_fp_fusion=False,
    )
