"""NF4 in Triton: the backend for GPUs when no CUDA binary is present."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from peftkern.ops._code_tables import nf4_code
from peftkern.ops.nf4 import reference
from peftkern.ops.nf4.weight import NF4Tensors

BLOCK_BYTES = 512  # packed bytes per program: 1024 weights
QUANTIZE_TILE = 4096  # weights per program: every blocksize divides it


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
    first,
    stride,
    columns,
    NESTED: tl.constexpr,
    SLICE: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
):
    """All of a weight, or a slice: from element `first` on, of rows `stride` apart, `columns`. All three are even."""
    byte = tl.program_id(0).to(tl.int64) * BLOCK_BYTES + tl.arange(0, BLOCK_BYTES)
    in_bytes = byte * 2 < numel
    if SLICE:
        row = byte * 2 // columns
        byte = (first + row * stride + (byte * 2 - row * columns)) // 2
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
    weight = packed, absmax, nested_absmax, nested_code, nested_offset
    _dequantize(weight, blocksize, nested_blocksize, out, None)


_slice_of_whole = reference.slices(dequantize_out)


def dequantize_slice_out(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    nested_absmax: torch.Tensor | None,
    nested_code: torch.Tensor | None,
    nested_offset: torch.Tensor | None,
    blocksize: int,
    nested_blocksize: int,
    out_features: int,
    in_features: int,
    row: int,
    column: int,
    out: torch.Tensor,
) -> None:
    """Writes rows from `row` on and columns from `column` on into `out`; bytes that a slice would split: of all."""
    weight = packed, absmax, nested_absmax, nested_code, nested_offset
    if column % 2 or in_features % 2 or out.shape[1] % 2:
        sizes = blocksize, nested_blocksize, out_features, in_features
        return _slice_of_whole(*weight, *sizes, row, column, out)
    _dequantize(weight, blocksize, nested_blocksize, out, (row * in_features + column, in_features, out.shape[1]))


def _dequantize(
    weight: NF4Tensors,
    blocksize: int,
    nested_blocksize: int,
    out: torch.Tensor,
    part: tuple[int, int, int] | None,
) -> None:
    """`part`: the kernel's first, stride and columns, or all of the weight."""
    numel = out.numel()
    if numel == 0:
        return
    packed, absmax, nested_absmax, nested_code, nested_offset = weight
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
        *(part or (0, 0, 0)),
        NESTED=nested_absmax is not None,
        SLICE=part is not None,
        BLOCK_BYTES=BLOCK_BYTES,
        num_warps=4,
        enable_fp_fusion=False,
    )


matmul, matmul_dx = reference.matmuls(dequantize_out)


@triton.jit
def _largest(x, axis: tl.constexpr):
    """Largest magnitude along an axis. As integers, magnitudes order as the floats do and NaN beats them all."""
    return tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=axis).to(tl.float32, bitcast=True)


@triton.jit
def _scale(x, largest, tail, HAS_TAIL: tl.constexpr):
    """x over its block's largest magnitude: whole blocks multiply by the reciprocal, a tail divides."""
    safe = tl.where(largest < 1e-38, 1e-38, largest)
    scaled = x * tl.div_rn(tl.full(safe.shape, 1.0, tl.float32), safe)[:, None]
    if HAS_TAIL:
        scaled = tl.where(tail[:, None], tl.div_rn(x, tl.broadcast_to(safe[:, None], x.shape)), scaled)
    return tl.where(scaled < -1.0, -1.0, tl.where(scaled > 1.0, 1.0, scaled)), tl.where(tail, safe, largest)


@triton.jit
def _nf4_quantize_kernel(
    weight_ptr,
    code_ptr,
    packed_ptr,
    absmax_ptr,
    numel,
    BLOCKS: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    HAS_TAIL: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    index = block[:, None] * BLOCKSIZE + tl.arange(0, BLOCKSIZE)[None, :]
    x = tl.load(weight_ptr + index, mask=index < numel, other=0.0).to(tl.float32)
    scaled, absmax = _scale(x, _largest(x, 1), (block + 1) * BLOCKSIZE > numel, HAS_TAIL)
    tl.store(absmax_ptr + block, absmax, mask=block * BLOCKSIZE < numel)
    codes = tl.zeros(x.shape, tl.int32)
    for i in tl.static_range(15):  # the code counts the midpoints below the value; NaN counts them all
        midpoint = (tl.load(code_ptr + i) + tl.load(code_ptr + i + 1)) * 0.5
        codes += tl.where(scaled <= midpoint, 0, 1)
    codes = tl.where(index < numel, codes, 7)
    even, odd = tl.split(tl.reshape(codes, (BLOCKS, BLOCKSIZE // 2, 2)))
    byte = block[:, None] * (BLOCKSIZE // 2) + tl.arange(0, BLOCKSIZE // 2)[None, :]
    tl.store(packed_ptr + byte, (even * 16 + odd).to(tl.uint8), mask=byte * 2 < numel)


@triton.jit
def _nf4_quantize_absmax_kernel(
    absmax_ptr,
    offset_ptr,
    code_ptr,
    codes_ptr,
    nested_absmax_ptr,
    numel,
    blocksize,
    WIDTH: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    lane = tl.arange(0, WIDTH)[None, :]
    index = block[:, None] * blocksize + lane
    inside = (lane < blocksize) & (index < numel)
    x = tl.load(absmax_ptr + index, mask=inside, other=0.0) - tl.load(offset_ptr)
    x = tl.where(inside, x, 0.0)
    scaled, nested_absmax = _scale(x, _largest(x, 1), (block + 1) * blocksize > numel, True)
    tl.store(nested_absmax_ptr + block, nested_absmax)
    codes = tl.zeros(x.shape, tl.int32)
    for level in tl.static_range(8):  # binary search over the 255 midpoints
        probe = codes + ((128 >> level) - 1)
        midpoint = (tl.load(code_ptr + probe) + tl.load(code_ptr + probe + 1)) * 0.5
        codes += tl.where(midpoint >= scaled, 0, 128 >> level)
    tl.store(codes_ptr + index, codes.to(tl.uint8), mask=inside)


def quantize(weight: torch.Tensor, blocksize: int) -> tuple[torch.Tensor, torch.Tensor]:
    """float [any shape] -> packed uint8 [(n + 1) // 2, 1], absmax float32 [ceil(n / blocksize)], as the reference."""
    numel = weight.numel()
    packed = weight.new_empty(((numel + 1) // 2, 1), dtype=torch.uint8)
    absmax = weight.new_empty((triton.cdiv(numel, blocksize),), dtype=torch.float32)
    if numel:
        _nf4_quantize_kernel[(triton.cdiv(numel, QUANTIZE_TILE),)](
            weight.contiguous(),
            nf4_code(weight.device),
            packed,
            absmax,
            numel,
            BLOCKS=QUANTIZE_TILE // blocksize,
            BLOCKSIZE=blocksize,
            HAS_TAIL=numel % blocksize != 0,
            num_warps=8,
            enable_fp_fusion=False,
        )
    return packed, absmax


def quantize_absmax(
    absmax: torch.Tensor, offset: torch.Tensor, code: torch.Tensor, blocksize: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """absmax float32 [b] - offset -> 8-bit codes uint8 [b], nested absmax float32 [ceil(b / blocksize)]."""
    numel = absmax.numel()
    codes = torch.empty_like(absmax, dtype=torch.uint8)
    nested_absmax = absmax.new_empty((triton.cdiv(numel, blocksize),), dtype=torch.float32)
    if numel:
        _nf4_quantize_absmax_kernel[(nested_absmax.numel(),)](
            absmax.contiguous(),
            offset,
            code.contiguous(),
            codes,
            nested_absmax,
            numel,
            blocksize,
            WIDTH=triton.next_power_of_2(blocksize),
            num_warps=4,
            enable_fp_fusion=False,
        )
    return codes, nested_absmax
