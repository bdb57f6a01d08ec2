"""LoRA matmul out of cuBLAS and Triton: the backend for every GPU, dtype, rank and shape without a kernel of its own.

cuBLAS does the products that need no mask. Three Triton kernels regenerate it where they read x or write dx:

    project          S = mask(x) lora_A^T                  split over K where the rows alone are too few programs
    adapter_grad     factor * L^T mask(z), in the adapter's dtype, split over the tokens: dA (L = D, z = x) and,
                     without a mask, dB (L = S, z = dy)
    masked_low_rank  factor * mask(D lora_A), to which cuBLAS adds dy weight in place

The splits leave float32 partials, which `sum_splits` adds in a fixed order: no atomics, so results repeat bitwise.
Ranks are padded to a power of two of 16 to 128; larger ones take several programs, each of which reads x anew.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.nn.functional import linear

from peftkern.ops._dropout import dropout_threshold
from peftkern.ops._dropout_triton import kept
from peftkern.ops.lora_matmul import reference

PROGRAMS = 256  # products are split until so many programs share them: two for each SM of a large GPU
SUM_BLOCK = 1024  # elements per program


@triton.jit
def _project_kernel(
    x_ptr,
    a_ptr,
    out_ptr,
    seed_ptr,
    threshold,
    M,
    K,
    r,
    splits,
    chunk,
    stride_xm,
    stride_xk,
    stride_ar,
    stride_ak,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """out[split, m, :] = mask(x)[m, split's chunk] A[:, split's chunk]^T"""
    rank_tiles = tl.cdiv(r, BLOCK_R)
    program = tl.program_id(0)
    i = program % rank_tiles * BLOCK_R + tl.arange(0, BLOCK_R)
    split = program // rank_tiles % splits
    m = (program // rank_tiles // splits).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    x_row = x_ptr + m[:, None] * stride_xm
    a_row = a_ptr + i[None, :].to(tl.int64) * stride_ar
    end = tl.minimum(split * chunk + chunk, K)
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for first in tl.range(split * chunk, end, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K).to(tl.int64)
        x = tl.load(x_row + k[None, :] * stride_xk, mask=(m[:, None] < M) & (k[None, :] < end), other=0.0)
        a = tl.load(a_row + k[:, None] * stride_ak, mask=(i[None, :] < r) & (k[:, None] < end), other=0.0)
        x = tl.where(kept(seed_ptr, threshold, m, first, BLOCK_K), x, 0.0)
        acc = tl.dot(x, a, acc, input_precision=PRECISION)
    out = out_ptr + (split.to(tl.int64) * M + m[:, None]) * r + i[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=(m[:, None] < M) & (i[None, :] < r))


@triton.jit
def _adapter_grad_kernel(
    z_ptr,
    l_ptr,
    out_ptr,
    seed_ptr,
    threshold,
    factor,
    M,
    C,
    r,
    splits,
    chunk,
    stride_zm,
    stride_zc,
    stride_lm,
    stride_lr,
    stride_or,
    stride_oc,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """out[split, r, C] = factor * l[split's chunk, :]^T mask(z)[split's chunk, :], its last two strides as given."""
    rank_tiles = tl.cdiv(r, BLOCK_R)
    program = tl.program_id(0)
    i = program % rank_tiles * BLOCK_R + tl.arange(0, BLOCK_R)
    split = program // rank_tiles % splits
    first_c = program // rank_tiles // splits * BLOCK_C
    c = first_c + tl.arange(0, BLOCK_C)
    z_column = z_ptr + c[None, :].to(tl.int64) * stride_zc
    l_column = l_ptr + i[None, :] * stride_lr
    end = tl.minimum((split.to(tl.int64) + 1) * chunk, M)
    acc = tl.zeros((BLOCK_C, BLOCK_R), tl.float32)
    for first in tl.range(split.to(tl.int64) * chunk, end, BLOCK_M):
        m = first + tl.arange(0, BLOCK_M)
        z = tl.load(z_column + m[:, None] * stride_zm, mask=(m[:, None] < end) & (c[None, :] < C), other=0.0)
        l = tl.load(l_column + m[:, None] * stride_lm, mask=(m[:, None] < end) & (i[None, :] < r), other=0.0)  # noqa: E741
        if DROPOUT:
            z = tl.where(kept(seed_ptr, threshold, m, first_c, BLOCK_C), z, 0.0)
        acc = tl.dot(tl.trans(z), l, acc, input_precision=PRECISION)
    out = (
        out_ptr + split.to(tl.int64) * r * C + i[None, :].to(tl.int64) * stride_or + c[:, None].to(tl.int64) * stride_oc
    )
    tl.store(out, (acc * factor).to(out_ptr.dtype.element_ty), mask=(i[None, :] < r) & (c[:, None] < C))


@triton.jit
def _masked_low_rank_kernel(
    d_ptr,
    a_ptr,
    out_ptr,
    seed_ptr,
    threshold,
    factor,
    M,
    K,
    r,
    stride_dm,
    stride_dr,
    stride_ar,
    stride_ak,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """out = factor * mask(d A)"""
    tiles = tl.cdiv(K, BLOCK_K)
    program = tl.program_id(0)
    first_k = program % tiles * BLOCK_K
    k = first_k + tl.arange(0, BLOCK_K)
    m = (program // tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    d_row = d_ptr + m[:, None] * stride_dm
    a_column = a_ptr + k[None, :].to(tl.int64) * stride_ak
    acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for first in tl.range(0, r, BLOCK_R):
        i = first + tl.arange(0, BLOCK_R).to(tl.int64)
        d = tl.load(d_row + i[None, :] * stride_dr, mask=(m[:, None] < M) & (i[None, :] < r), other=0.0)
        a = tl.load(a_column + i[:, None] * stride_ar, mask=(i[:, None] < r) & (k[None, :] < K), other=0.0)
        acc = tl.dot(d, a, acc, input_precision=PRECISION)
    product = (acc * factor).to(out_ptr.dtype.element_ty)
    product = tl.where(kept(seed_ptr, threshold, m, first_k, BLOCK_K), product, 0.0)
    tl.store(out_ptr + m[:, None] * K + k[None, :], product, mask=(m[:, None] < M) & (k[None, :] < K))


@triton.jit
def _sum_splits_kernel(partial_ptr, out_ptr, factor, splits, numel, BLOCK: tl.constexpr):
    """out = factor * (partial[0] + partial[1] + ...)"""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    partial = partial_ptr + index
    for _ in tl.range(splits):
        acc += tl.load(partial, mask=index < numel, other=0.0)
        partial += numel
    tl.store(out_ptr + index, (acc * factor).to(out_ptr.dtype.element_ty), mask=index < numel)


def _sum_splits(partial: torch.Tensor, out: torch.Tensor, factor: float) -> None:
    numel = out.numel()
    _sum_splits_kernel[(triton.cdiv(numel, SUM_BLOCK),)](partial, out, factor, len(partial), numel, BLOCK=SUM_BLOCK)


def _rank_block(r: int) -> int:
    return min(max(16, triton.next_power_of_2(r)), 128)


def _split(length: int, block: int, tiles: int) -> tuple[int, int]:
    """(splits, length of each, a multiple of `block`) so that tiles * splits programs fill the GPU; by shape alone."""
    steps = max(triton.cdiv(length, block), 1)
    steps_each = triton.cdiv(steps, min(max(PROGRAMS // tiles, 1), steps))
    return triton.cdiv(steps, steps_each), steps_each * block


def _precision(dtype: torch.dtype) -> str | None:
    """float32 products in float32, not TF32."""
    return "ieee" if dtype == torch.float32 else None


def project(x: torch.Tensor, lora_A: torch.Tensor, seed: torch.Tensor, dropout_p: float) -> torch.Tensor:
    """mask(x) lora_A^T: x [M, K] and lora_A [r, K] of one dtype -> [M, r] in it; the kept elements are not scaled."""
    (M, K), r = x.shape, lora_A.shape[0]
    out = x.new_empty(M, r)
    if M == 0:
        return out
    block_r, block_m = _rank_block(r), 64
    block_k = (128 if block_r <= 32 else 64) // (x.element_size() // 2)
    tiles = triton.cdiv(M, block_m) * triton.cdiv(r, block_r)
    splits, chunk = _split(K, block_k, tiles)
    target = out if splits == 1 else x.new_empty((splits, M, r), dtype=torch.float32)
    _project_kernel[(tiles * splits,)](
        x,
        lora_A,
        target,
        seed,
        dropout_threshold(dropout_p),
        M,
        K,
        r,
        splits,
        chunk,
        *x.stride(),
        *lora_A.stride(),
        PRECISION=_precision(x.dtype),
        BLOCK_M=block_m,
        BLOCK_K=block_k,
        BLOCK_R=block_r,
        num_warps=4 if block_r <= 64 else 8,
        num_stages=3,
    )
    if splits > 1:
        _sum_splits(target, out, 1.0)
    return out


def adapter_grad(
    left: torch.Tensor,
    z: torch.Tensor,
    factor: float,
    out: torch.Tensor,
    seed: torch.Tensor | None = None,
    dropout_p: float = 0.0,
) -> None:
    """Writes factor * left^T mask(z), rounded once, into `out` [r, C], or transposed if `out` is a transposed matrix.

    left [M, r] and z [M, C] are of one dtype; `out` is of any float dtype and dense.
    """
    (M, C), r = z.shape, left.shape[1]
    if out.numel() == 0:
        return
    block_r, block_c = _rank_block(r), 128
    block_m = 64 // (z.element_size() // 2)
    tiles = triton.cdiv(C, block_c) * triton.cdiv(r, block_r)
    splits, chunk = _split(M, block_m, tiles)
    target = out if splits == 1 else torch.empty((splits, out.numel()), dtype=torch.float32, device=out.device)
    _adapter_grad_kernel[(tiles * splits,)](
        z,
        left,
        target,
        seed,
        dropout_threshold(dropout_p),
        factor if splits == 1 else 1.0,
        M,
        C,
        r,
        splits,
        chunk,
        *z.stride(),
        *left.stride(),
        *out.stride(),
        DROPOUT=seed is not None,
        PRECISION=_precision(z.dtype),
        BLOCK_M=block_m,
        BLOCK_C=block_c,
        BLOCK_R=block_r,
        num_warps=4 if block_r <= 64 else 8,
        num_stages=3,
    )
    if splits > 1:
        _sum_splits(target, out, factor)


def masked_low_rank(
    D: torch.Tensor, lora_A: torch.Tensor, factor: float, seed: torch.Tensor, dropout_p: float
) -> torch.Tensor:
    """factor * mask(D lora_A), rounded once: D [M, r] and lora_A [r, K] of one dtype -> [M, K] in it."""
    M, (r, K) = D.shape[0], lora_A.shape
    out = D.new_empty(M, K)
    block_m, block_k = 64, 128
    block_r = min(_rank_block(r), 64 if D.element_size() == 2 else 32)
    if out.numel():
        _masked_low_rank_kernel[(triton.cdiv(M, block_m) * triton.cdiv(K, block_k),)](
            D,
            lora_A,
            out,
            seed,
            dropout_threshold(dropout_p),
            factor,
            M,
            K,
            r,
            *D.stride(),
            *lora_A.stride(),
            PRECISION=_precision(D.dtype),
            BLOCK_M=block_m,
            BLOCK_K=block_k,
            BLOCK_R=block_r,
            num_warps=4,
            num_stages=2,
        )
    return out


def _low_rank(left: torch.Tensor, right: torch.Tensor, factor: float, bias: torch.Tensor | None = None) -> torch.Tensor:
    """factor * left right + bias by cuBLAS."""
    if bias is not None:
        return torch.addmm(bias.to(left.dtype), left, right, alpha=factor)
    return left.new_empty(left.shape[0], right.shape[1]).addmm_(left, right, beta=0, alpha=factor)


def lora_matmul_fwd(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    bias: torch.Tensor | None,
    scaling: float,
    dropout_p: float,
    seed: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """S = mask(x) lora_A^T, then y = factor * S lora_B^T + bias, to which the base product is added in place."""
    if x.dtype == torch.float64:
        return reference.lora_matmul_fwd(x, weight, lora_A, lora_B, bias, scaling, dropout_p, seed)
    with torch.cuda.device_of(x), torch.autocast(x.device.type, enabled=False):
        A = lora_A.to(x.dtype)
        S = linear(x, A) if seed is None else project(x, A, seed, dropout_p)
        y = _low_rank(S, lora_B.to(x.dtype).t(), reference.low_rank_factor(scaling, dropout_p, seed), bias)
        return y.addmm_(x, weight.to(x.dtype).t()), S


def lora_matmul_bwd(
    dy: torch.Tensor,
    x: torch.Tensor | None,
    weight: torch.Tensor | None,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    S: torch.Tensor | None,
    seed: torch.Tensor | None,
    scaling: float,
    dropout_p: float,
    need_dx: bool,
    need_dA: bool,
    need_dB: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """With D = dy lora_B: dx = factor * mask(D lora_A) + dy weight, dA = factor * D^T mask(x), dB = factor * dy^T S."""
    if dy.dtype == torch.float64:
        return reference.lora_matmul_bwd(
            dy, x, weight, lora_A, lora_B, S, seed, scaling, dropout_p, need_dx, need_dA, need_dB
        )
    dx, dA, dB = dy.new_empty(0), lora_A.new_empty(0), lora_B.new_empty(0)
    factor = reference.low_rank_factor(scaling, dropout_p, seed)
    with torch.cuda.device_of(dy), torch.autocast(dy.device.type, enabled=False):
        D = dy @ lora_B.to(dy.dtype) if need_dx or need_dA else None
        if need_dx:
            assert D is not None
            assert weight is not None
            A = lora_A.to(dy.dtype)
            dx = _low_rank(D, A, factor) if seed is None else masked_low_rank(D, A, factor, seed, dropout_p)
            dx.addmm_(dy, weight.to(dy.dtype))
        if need_dA:
            assert D is not None
            assert x is not None
            dA = lora_A.new_empty(lora_A.shape)
            adapter_grad(D, x, factor, dA, seed, dropout_p)
        if need_dB:
            assert S is not None
            dB = lora_B.new_empty(lora_B.shape)
            adapter_grad(S, dy, factor, dB.t())
    return dx, dA, dB
