"""Bottleneck adapter out of cuBLAS and Triton: the backend for every GPU, dtype and shape without a kernel of its own.

cuBLAS multiplies over the features and the tokens. Two Triton kernels do the rest in one pass each:

    update     y = residual + factor * a up_weight^T + bias, and dx = dh down_weight + dy
    middle     a = mask act(h); dh = act'(h) factor mask(dy up_weight) and its sums over tokens

In float32 cuBLAS does the first one's part too: it sums in several strands, Triton in one, which errs more. So it does
for few tokens of a wide bottleneck, where `update` has too few tiles to hide its latency.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.nn.functional import linear

from peftkern.ops import _activations
from peftkern.ops._activations_triton import activate
from peftkern.ops._dropout import dropout_scale, dropout_threshold
from peftkern.ops._dropout_triton import kept
from peftkern.ops.bottleneck import reference

# Activations that `update` computes itself, over again for every tile of H, rather than have `middle` launched.
_MOST_OWN_ACTIVATIONS = 1 << 21
_BLOCK_H = 128
# Up to these tokens, and above this b, cuBLAS and an addition are faster than `update`.
_FEW_TOKENS, _NARROW = 1024, 128


def few_and_wide(M: int, b: int) -> bool:
    """Whether a product of [M, b] is cuBLAS's and what is added to it a pass of its own, as in eager PyTorch."""
    return M <= _FEW_TOKENS and b > _NARROW


@triton.jit
def _update_kernel(
    left_ptr,
    right_ptr,
    skip_ptr,
    bias_ptr,
    out_ptr,
    seed_ptr,
    threshold,
    factor,
    bias_factor,
    M,
    H,
    b,
    stride_lm,
    stride_lb,
    stride_rb,
    stride_rh,
    stride_sm,
    stride_sh,
    stride_bias,
    HAS_SKIP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """out = skip + factor * left right + bias_factor * bias; with ACTIVATION, mask act(left) stands for left."""
    tiles = tl.cdiv(H, BLOCK_H)
    program = tl.program_id(0)
    n = program % tiles * BLOCK_H + tl.arange(0, BLOCK_H).to(tl.int64)
    m = (program // tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = (m[:, None] < M) & (n[None, :] < H)
    if HAS_SKIP:  # on its way while the product is made
        skip = tl.load(skip_ptr + m[:, None] * stride_sm + n[None, :] * stride_sh, mask=inside, other=0.0)
    acc = tl.zeros((BLOCK_M, BLOCK_H), tl.float32)
    for first in tl.range(0, b, BLOCK_B):
        i = first + tl.arange(0, BLOCK_B).to(tl.int64)
        left = tl.load(
            left_ptr + m[:, None] * stride_lm + i[None, :] * stride_lb,
            mask=(m[:, None] < M) & (i[None, :] < b),
            other=0.0,
        )
        if ACTIVATION is not None:
            value, _ = activate(left.to(tl.float32), ACTIVATION)
            if DROPOUT:
                value = tl.where(kept(seed_ptr, threshold, m, first, BLOCK_B), value, 0.0)
            left = value.to(left.dtype)
        right = tl.load(
            right_ptr + i[:, None] * stride_rb + n[None, :] * stride_rh,
            mask=(i[:, None] < b) & (n[None, :] < H),
            other=0.0,
        )
        acc = tl.dot(left, right, acc)
    out = acc * factor
    if HAS_BIAS:
        out += bias_factor * tl.load(bias_ptr + n * stride_bias, mask=n < H, other=0.0).to(tl.float32)[None, :]
    if HAS_SKIP:
        out += skip.to(tl.float32)
    tl.store(out_ptr + m[:, None] * H + n[None, :], out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _middle_kernel(
    g_ptr,
    h_ptr,
    dh_ptr,
    a_ptr,
    sums_ptr,
    seed_ptr,
    threshold,
    factor,
    M,
    b,
    stride_hm,
    stride_hb,
    HAS_G: tl.constexpr,
    HAS_A: tl.constexpr,
    HAS_SUMS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """dh = act'(h) * factor * mask(g), a = mask act(h), sums [row of tiles, b] of dh over a tile; g is contiguous."""
    tiles = tl.cdiv(b, BLOCK_B)
    program = tl.program_id(0)
    first = program % tiles * BLOCK_B
    i = first + tl.arange(0, BLOCK_B).to(tl.int64)
    m = (program // tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = (m[:, None] < M) & (i[None, :] < b)
    at = m[:, None] * b + i[None, :]
    h = tl.load(h_ptr + m[:, None] * stride_hm + i[None, :] * stride_hb, mask=inside, other=0.0)
    value, slope = activate(h.to(tl.float32), ACTIVATION)
    if DROPOUT:
        keep = kept(seed_ptr, threshold, m, first, BLOCK_B)
    if HAS_G:
        g = tl.load(g_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if DROPOUT:
            g = tl.where(keep, g, 0.0)
        dh = g * factor * slope
        tl.store(dh_ptr + at, dh.to(dh_ptr.dtype.element_ty), mask=inside)
        if HAS_SUMS:
            tl.store(sums_ptr + (program // tiles).to(tl.int64) * b + i, tl.sum(dh, 0), mask=i < b)
    if HAS_A:
        if DROPOUT:
            value = tl.where(keep, value, 0.0)
        tl.store(a_ptr + at, value.to(a_ptr.dtype.element_ty), mask=inside)


def _width_block(b: int, dtype: torch.dtype) -> int:
    return min(max(16, triton.next_power_of_2(b)), 64 if dtype.itemsize == 2 else 32)


def update(
    left: torch.Tensor,
    right: torch.Tensor,
    factor: float,
    out: torch.Tensor,
    skip: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    bias_factor: float = 1.0,
    activation: str | None = None,
    seed: torch.Tensor | None = None,
    dropout_p: float = 0.0,
) -> None:
    """out = skip + factor * left right + bias_factor * bias, rounded once; with `activation`, of left, and its dropout.

    left [M, b] and right [b, H] are of one 16-bit dtype, skip [M, H] and bias [H] of any, out [M, H] is contiguous.
    """
    (M, b), H = left.shape, right.shape[1]
    if out.numel() == 0:
        return
    block_m = 64
    _update_kernel[(triton.cdiv(M, block_m) * triton.cdiv(H, _BLOCK_H),)](
        left,
        right,
        skip,
        bias,
        out,
        seed,
        dropout_threshold(dropout_p),
        factor,
        bias_factor,
        M,
        H,
        b,
        *left.stride(),
        *right.stride(),
        *((0, 0) if skip is None else skip.stride()),
        0 if bias is None else bias.stride(0),
        HAS_SKIP=skip is not None,
        HAS_BIAS=bias is not None,
        ACTIVATION=activation,
        DROPOUT=seed is not None,
        BLOCK_M=block_m,
        BLOCK_H=_BLOCK_H,
        BLOCK_B=_width_block(b, left.dtype),
        num_warps=4,
        num_stages=2,
    )


def middle(
    g: torch.Tensor | None,
    h: torch.Tensor,
    factor: float,
    activation: str,
    need_a: bool,
    seed: torch.Tensor | None,
    dropout_p: float,
    need_sums: bool = False,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """dh = act'(h) * factor * mask(g) where g is given, a = mask act(h) where it is needed, and sums of dh.

    dh and a are [M, b] in h's dtype. The sums [., b], float32, are of dh before it is rounded: theirs over the rows is
    dh's over the tokens.
    """
    M, b = h.shape
    block_m, block_b = 32, _width_block(b, h.dtype)
    dh = None if g is None else h.new_empty(M, b)
    a = h.new_empty(M, b) if need_a else None
    sums = h.new_empty(triton.cdiv(M, block_m), b, dtype=torch.float32) if need_sums else None
    if M:
        _middle_kernel[(triton.cdiv(M, block_m) * triton.cdiv(b, block_b),)](
            g,
            h,
            dh,
            a,
            sums,
            seed,
            dropout_threshold(dropout_p),
            factor,
            M,
            b,
            *h.stride(),
            HAS_G=g is not None,
            HAS_A=need_a,
            HAS_SUMS=need_sums,
            ACTIVATION=activation,
            DROPOUT=seed is not None,
            BLOCK_M=block_m,
            BLOCK_B=block_b,
            num_warps=4,
            enable_fp_fusion=False,  # which results are wanted would change what is fused, and so dh's last bits
        )
    return dh, a, sums


def add_product(
    left: torch.Tensor,
    right: torch.Tensor,
    factor: float,
    skip: torch.Tensor | None,
    bias: torch.Tensor | None = None,
    bias_factor: float = 1.0,
) -> torch.Tensor:
    """skip + factor * left right + bias_factor * bias in float32, by cuBLAS."""
    if skip is None:
        product = left @ right
        return product if factor == 1.0 else product.mul_(factor)
    if bias is None:
        return torch.addmm(skip.float(), left, right, alpha=factor)
    return torch.add(skip.float(), bias.float(), alpha=bias_factor).addmm_(left, right, alpha=factor)


def _factor(scaling: float, dropout_p: float, seed: torch.Tensor | None) -> float:
    return scaling if seed is None else scaling * dropout_scale(dropout_p)


def bottleneck_fwd(
    x: torch.Tensor,
    down_weight: torch.Tensor,
    down_bias: torch.Tensor | None,
    up_weight: torch.Tensor,
    up_bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    activation: str,
    scaling: float,
    dropout_p: float,
    seed: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y = residual + scaling * (drop(act(h)) up_weight^T + up_bias) and h = x down_weight^T + down_bias."""
    skip = x if residual is None else residual
    dtype = torch.promote_types(x.dtype, skip.dtype)
    if dtype == torch.float64:
        return reference.bottleneck_fwd(
            x, down_weight, down_bias, up_weight, up_bias, residual, activation, scaling, dropout_p, seed
        )
    with torch.cuda.device_of(x), torch.autocast(x.device.type, enabled=False):
        h = linear(x, down_weight.to(x.dtype), None if down_bias is None else down_bias.to(x.dtype))
        factor, right = _factor(scaling, dropout_p, seed), up_weight.to(x.dtype).t()
        (M, H), b = x.shape, h.shape[1]
        if x.dtype != torch.float32 and seed is None and few_and_wide(M, b):
            bias = None if up_bias is None else up_bias.to(x.dtype)
            return torch.add(
                skip, linear(_activations.activate(h, activation), up_weight.to(x.dtype), bias), alpha=scaling
            ), h
        if x.dtype != torch.float32 and M * b * triton.cdiv(H, _BLOCK_H) <= _MOST_OWN_ACTIVATIONS:
            y = x.new_empty(x.shape, dtype=dtype)
            update(h, right, factor, y, skip, up_bias, scaling, activation, seed, dropout_p)
            return y, h
        _, a, _ = middle(None, h, 1.0, activation, True, seed, dropout_p)
        assert a is not None
        if x.dtype == torch.float32:
            return add_product(a, right, factor, skip, up_bias, scaling), h
        y = x.new_empty(x.shape, dtype=dtype)
        update(a, right, factor, y, skip, up_bias, scaling)
    return y, h


def bottleneck_bwd(
    dy: torch.Tensor,
    x: torch.Tensor | None,
    down_weight: torch.Tensor,
    up_weight: torch.Tensor,
    h: torch.Tensor,
    seed: torch.Tensor | None,
    activation: str,
    scaling: float,
    dropout_p: float,
    residual_is_x: bool,
    need_dx: bool,
    need_down_weight: bool,
    need_down_bias: bool,
    need_up_weight: bool,
    need_up_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """dh = act'(h) * factor * mask(dy up_weight); dx = dh down_weight (+ dy); d_down = dh^T x; d_up = factor dy^T a."""
    if torch.promote_types(h.dtype, dy.dtype) == torch.float64:
        return reference.bottleneck_bwd(
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
        )
    dx, d_down, d_up = h.new_empty(0), down_weight.new_empty(0), up_weight.new_empty(0)
    d_down_bias, d_up_bias = h.new_empty(0, dtype=torch.float32), h.new_empty(0, dtype=torch.float32)
    factor = _factor(scaling, dropout_p, seed)
    need_dh = need_dx or need_down_weight or need_down_bias
    with torch.cuda.device_of(dy), torch.autocast(dy.device.type, enabled=False):
        rows = dy.to(h.dtype)
        g = rows @ up_weight.to(h.dtype) if need_dh else None
        dh, a, sums = middle(g, h, factor, activation, need_up_weight, seed, dropout_p, need_down_bias)
        if need_dx:
            assert dh is not None
            skip, down = dy if residual_is_x else None, down_weight.to(h.dtype)
            if h.dtype == torch.float32:
                dx = add_product(dh, down, 1.0, skip)
            elif few_and_wide(*h.shape):
                dx = dh @ down
                if skip is not None:
                    dx += skip
            else:
                dx = h.new_empty(dy.shape)
                update(dh, down, 1.0, dx, skip)
        if need_down_weight:
            assert dh is not None
            assert x is not None
            d_down = (dh.t() @ x).to(down_weight.dtype)
        if need_down_bias:
            assert sums is not None
            d_down_bias = sums[0] if len(sums) == 1 else sums.sum(0)
        if need_up_weight:
            assert a is not None
            d_up = rows.t() @ a
            d_up = (d_up if factor == 1.0 else d_up.float() * factor).to(up_weight.dtype)
        if need_up_bias:
            d_up_bias = dy.sum(0, dtype=torch.float32)
            if scaling != 1.0:
                d_up_bias *= scaling
    return dx, d_down, d_down_bias, d_up, d_up_bias
