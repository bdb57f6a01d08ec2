"""8-bit AdamW in Triton, for GPUs without the compiled library: a launch per tensor, the reference's bits.

Products, sums, roots and quotients are rounded one by one (`enable_fp_fusion=False`, `sqrt_rn`, `div_rn`), codes found
by bisection of the decision points.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from peftkern.ops._dropout_triton import philox
from peftkern.ops.adamw8bit import reference
from peftkern.ops.adamw8bit.op import GRADIENT_LIMIT, consecutive_places
from peftkern.ops.adamw8bit.reference import MIN_ABSMAX, Tensors

STEP_ELEMENTS = 1024  # of a program, where blocks are shorter
PIECE = 2048  # of the look's sums


@triton.jit
def _codes(values, inverse, points_ptr):
    """How many of 255 ascending points lie below each value * inverse; the 256th is infinite."""
    scaled = values * inverse
    code = tl.zeros(scaled.shape, tl.int32)
    for level in tl.static_range(8):
        below = tl.load(points_ptr + code + ((128 >> level) - 1)) < scaled
        code += tl.where(below, 128 >> level, 0)
    return code


@triton.jit
def _halves(call, count, seed_low, seed_high):
    """Eight numbers of 16 bits for each call, side by side."""
    zero = tl.zeros_like(call).to(tl.uint32)
    w0, w1, w2, w3 = philox(call.to(tl.uint32), (call >> 32).to(tl.uint32), zero, zero + count, seed_low, seed_high)
    even = tl.interleave(tl.interleave(w0 & 0xFFFF, w2 & 0xFFFF), tl.interleave(w1 & 0xFFFF, w3 & 0xFFFF))
    odd = tl.interleave(tl.interleave(w0 >> 16, w2 >> 16), tl.interleave(w1 >> 16, w3 >> 16))
    return tl.interleave(even, odd)


@triton.jit
def _step_kernel(
    p_ptr,
    grad_ptr,
    m_ptr,
    v_ptr,
    m_absmax_ptr,
    v_absmax_ptr,
    m_book_ptr,
    v_book_ptr,
    m_points_ptr,
    v_points_ptr,
    numbers_ptr,
    skip_ptr,
    count_ptr,
    seed_ptr,
    numel,
    first_call,
    MIN_ABSMAX: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """BLOCKS blocks of one tensor."""
    end = tl.where(tl.load(skip_ptr) == 0.0, numel, 0)
    beta1, rest1 = tl.load(numbers_ptr), tl.load(numbers_ptr + 1)
    beta2, rest2 = tl.load(numbers_ptr + 2), tl.load(numbers_ptr + 3)
    eps, decay = tl.load(numbers_ptr + 4), tl.load(numbers_ptr + 5)
    step_size, inverse_bias2 = tl.load(numbers_ptr + 6), tl.load(numbers_ptr + 7)
    gradient_scale = tl.load(numbers_ptr + 8)

    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    i = block[:, None] * BLOCKSIZE + tl.arange(0, BLOCKSIZE)[None, :]
    inside = i < end
    has = block * BLOCKSIZE < end
    m_scale = tl.load(m_absmax_ptr + block, mask=has, other=0.0) * beta1
    v_scale = tl.load(v_absmax_ptr + block, mask=has, other=0.0) * beta2
    g = tl.load(grad_ptr + i, mask=inside, other=0.0).to(tl.float32) * gradient_scale
    m_book = tl.load(m_book_ptr + tl.load(m_ptr + i, mask=inside, other=0).to(tl.int32))
    v_book = tl.load(v_book_ptr + tl.load(v_ptr + i, mask=inside, other=0).to(tl.int32))
    m = tl.where(inside, m_book * m_scale[:, None] + g * rest1, 0.0)
    v = tl.where(inside, v_book * v_scale[:, None] + g * g * rest2, 0.0)

    p = tl.load(p_ptr + i, mask=inside, other=0.0).to(tl.float32)
    p = p * decay - tl.div_rn(m, tl.sqrt_rn(v) * inverse_bias2 + eps) * step_size
    if p_ptr.dtype.element_ty == tl.bfloat16:  # by its bits: interpreted, a cast would cut them off
        bits = p.to(tl.uint32, bitcast=True)
        more = (bits >> 16 & 1) + 0x7FFF  # to nearest, ties to even
        if STOCHASTIC:
            call = first_call + block[:, None] * (BLOCKSIZE // 8) + tl.arange(0, BLOCKSIZE // 8)[None, :]
            seed, count = tl.load(seed_ptr), tl.load(count_ptr).to(tl.uint32)
            more = _halves(call, count, seed.to(tl.uint32), (seed >> 32).to(tl.uint32))
        rounded = tl.add(bits, more, sanitize_overflow=False) >> 16
        rounded = tl.where((bits & 0x7F800000) == 0x7F800000, bits >> 16, rounded)
        rounded = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, rounded)
        tl.store(p_ptr + i, rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True), mask=inside)
    else:
        tl.store(p_ptr + i, p.to(p_ptr.dtype.element_ty), mask=inside)

    m_largest, v_largest = tl.max(tl.abs(m), axis=1), tl.max(v, axis=1)
    m_absmax = tl.where(m_largest > 0.0, tl.maximum(m_largest, MIN_ABSMAX), m_largest)
    v_absmax = tl.where(v_largest > 0.0, tl.maximum(v_largest, MIN_ABSMAX), v_largest)
    one = tl.full(m_absmax.shape, 1.0, tl.float32)
    m_inverse = tl.div_rn(one, tl.maximum(m_absmax, MIN_ABSMAX))
    v_inverse = tl.div_rn(one, tl.maximum(v_absmax, MIN_ABSMAX))
    tl.store(m_ptr + i, _codes(m, m_inverse[:, None], m_points_ptr).to(tl.uint8), mask=inside)
    tl.store(v_ptr + i, _codes(v, v_inverse[:, None], v_points_ptr).to(tl.uint8), mask=inside)
    tl.store(m_absmax_ptr + block, m_absmax, mask=has)
    tl.store(v_absmax_ptr + block, v_absmax, mask=has)


@triton.jit
def _look_kernel(grad_ptr, scale_ptr, bad_ptr, sums_ptr, numel, LIMIT: tl.constexpr, ROWS: tl.constexpr):
    """Of a piece of ROWS * 256 elements: whether one cannot be used, and the sum of squares in its order."""
    piece = tl.program_id(0).to(tl.int64)
    scale = tl.load(scale_ptr)
    sums = tl.zeros((256,), tl.float32)
    bad = tl.zeros((256,), tl.int32)
    for row in tl.static_range(ROWS):
        i = (piece * ROWS + row) * 256 + tl.arange(0, 256)
        g = tl.load(grad_ptr + i, mask=i < numel, other=0.0).to(tl.float32) * scale
        bad |= tl.where(tl.abs(g) < LIMIT, 0, 1)  # NaN is not below
        sums = sums + g * g
    for level in tl.static_range(8):
        sums = tl.sum(tl.reshape(sums, (128 >> level, 2)), axis=1)
    tl.store(bad_ptr + piece, tl.max(bad, axis=0))
    tl.store(sums_ptr + piece + tl.arange(0, 1), sums)


def step_(
    params: Tensors,
    grads: Tensors,
    exp_avg: Tensors,
    exp_avg_sq: Tensors,
    exp_avg_absmax: Tensors,
    exp_avg_sq_absmax: Tensors,
    exp_avg_qmap: torch.Tensor,
    exp_avg_sq_qmap: torch.Tensor,
    lr: float,
    lr_tensor: torch.Tensor | None,
    step: float,
    step_tensor: torch.Tensor | None,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    blocksize: int,
    grad_scale: torch.Tensor | None,
    found_inf: torch.Tensor | None,
    maximize: bool,
    max_norm: float = 0.0,
    grad_norm: torch.Tensor | None = None,
    seed: int | None = None,
    code_tables: torch.Tensor | None = None,
    places: Sequence[int] | None = None,
) -> None:
    """The op."""
    if not params:
        return
    device = params[0].device
    rate = lr if lr_tensor is None else lr_tensor
    count = step if step_tensor is None else step_tensor
    clip = reference.clip_factor(max_norm, grad_norm)
    h = reference.numbers(rate, count, beta1, beta2, eps, weight_decay, grad_scale, maximize, clip=clip)
    values = (h.beta1, 1 - h.beta1, h.beta2, 1 - h.beta2, h.eps, h.decay, h.step_size, h.inverse_bias2)
    numbers = torch.stack([_float32(value, device) for value in (*values, h.gradient_scale)])
    skip = torch.zeros((), device=device) if found_inf is None else found_inf.reshape(())
    if grad_norm is not None:
        skip = torch.where(torch.isfinite(grad_norm), skip, torch.ones_like(skip))
    books = exp_avg_qmap, exp_avg_sq_qmap, *decision_points(exp_avg_qmap, exp_avg_sq_qmap)
    counts = torch.as_tensor(count, device=device).to(torch.int64).reshape(1)
    seeds = torch.tensor([seed or 0], device=device)
    blocks = max(1, STEP_ELEMENTS // blocksize)
    places = consecutive_places(p.numel() for p in params) if places is None else places
    for place, p, *others in zip(places, params, grads, exp_avg, exp_avg_sq, exp_avg_absmax, exp_avg_sq_absmax):
        if p.numel() == 0:
            continue
        grid = (triton.cdiv(triton.cdiv(p.numel(), blocksize), blocks),)
        _step_kernel[grid](
            p,
            *others,
            *books,
            numbers,
            skip,
            counts,
            seeds,
            p.numel(),
            place // 8,
            MIN_ABSMAX=MIN_ABSMAX,
            STOCHASTIC=seed is not None and p.dtype == torch.bfloat16,
            BLOCKSIZE=blocksize,
            BLOCKS=blocks,
            enable_fp_fusion=False,
        )


def found_inf_(
    grads: Tensors,
    grad_scale: torch.Tensor | None,
    found_inf: torch.Tensor,
    norm: torch.Tensor | None = None,
    steps: Sequence[torch.Tensor] = (),
    skipped: torch.Tensor | None = None,
) -> None:
    """The op."""
    scale = _float32(1.0 if grad_scale is None else grad_scale.float().reciprocal().reshape(()), found_inf.device)
    sums = []
    for grad in grads:
        if grad.numel() == 0:
            continue
        pieces = triton.cdiv(grad.numel(), 8192) * 4
        bad = torch.empty(pieces, dtype=torch.int32, device=grad.device)
        sums.append(torch.empty(pieces, device=grad.device))
        arguments = {"LIMIT": GRADIENT_LIMIT, "ROWS": PIECE // 256, "enable_fp_fusion": False}
        _look_kernel[(pieces,)](grad, scale, bad, sums[-1], grad.numel(), **arguments)
        found_inf.copy_(torch.where(bad.any(), torch.ones_like(found_inf), found_inf))
    if norm is not None:
        norm.copy_(reference.norm_of_pieces(sums))
    reference.count_(found_inf, norm, steps, skipped)


def decision_points(first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of two code books the values from which on the next code is nearer, and infinity, float32 [256] each.

    A second moment above zero takes at least the smallest code above zero.
    """
    points = [torch.nn.functional.pad((book[:-1] + book[1:]) / 2, (0, 1), value=torch.inf) for book in (first, second)]
    below = torch.nn.functional.pad(second[:-1] <= 0, (0, 1))
    return points[0], torch.where(below, points[1].clamp(max=0.0), points[1])


def _float32(value: float | torch.Tensor, device: torch.device) -> torch.Tensor:
    return torch.as_tensor(value, device=device).to(torch.float32).reshape(())
