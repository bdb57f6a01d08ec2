"""8-bit AdamW in eager PyTorch, any device: the oracle, and the backend where nothing compiled is present.

It computes in float32, or in float64 when the parameters are float64. The order of the roundings below is the op's
definition: other backends give the same codes, scales and parameters bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from peftkern.ops._dropout import philox4x32
from peftkern.ops.adamw8bit.op import GRADIENT_LIMIT, consecutive_places

Tensors = list[torch.Tensor]
MIN_ABSMAX = 2.0**-126  # the smallest float32 whose reciprocal is finite


def decode(codes: torch.Tensor, absmax: torch.Tensor, qmap: torch.Tensor, blocksize: int) -> torch.Tensor:
    """uint8 codes of any shape, absmax [blocks] -> flat values qmap[code] * absmax of the code's block."""
    values = qmap[codes.reshape(-1).int()]
    return values * absmax.repeat_interleave(blocksize)[: values.numel()]


def encode(
    values: torch.Tensor, qmap: torch.Tensor, blocksize: int, positive_stays_positive: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Flat values -> uint8 codes [n] of the nearest qmap value (a tie takes the lower code), absmax [blocks].

    Each value is multiplied by the reciprocal of its block's largest magnitude.

    Args:
        positive_stays_positive: a positive value takes at least the smallest positive code.
    """
    numel = values.numel()
    blocks = -(-numel // blocksize)
    padded = torch.nn.functional.pad(values, (0, blocks * blocksize - numel)).view(blocks, blocksize)
    largest = padded.abs().amax(dim=1) if numel else values.new_zeros(0)
    scaled = padded * largest.clamp(min=MIN_ABSMAX).reciprocal().unsqueeze(1)
    codes = torch.bucketize(scaled, (qmap[:-1] + qmap[1:]) / 2, out_int32=True)
    if positive_stays_positive:
        smallest = (qmap <= 0).sum().clamp(max=255).int()
        codes = torch.where(scaled > 0, codes.maximum(smallest), codes)
    # A scale below the smallest normal float has no finite reciprocal: codes are relative to what is stored.
    absmax = torch.where(largest > 0, largest.clamp(min=MIN_ABSMAX), largest)
    return codes.reshape(-1)[:numel].to(torch.uint8), absmax


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
    if found_inf is None:
        found_inf = torch.zeros((), device=params[0].device)
    if grad_norm is not None:
        found_inf = torch.where(torch.isfinite(grad_norm), found_inf, torch.ones_like(found_inf))
    if not found_inf.is_cuda and found_inf:
        return
    h = numbers(
        lr if lr_tensor is None else lr_tensor,
        step if step_tensor is None else step_tensor,
        beta1,
        beta2,
        eps,
        weight_decay,
        grad_scale,
        maximize,
        torch.float64 if params[0].dtype == torch.float64 else torch.float32,
        clip_factor(max_norm, grad_norm),
    )
    places = consecutive_places(p.numel() for p in params) if places is None else places
    for place, p, grad, m_codes, v_codes, m_absmax, v_absmax in zip(
        places, params, grads, exp_avg, exp_avg_sq, exp_avg_absmax, exp_avg_sq_absmax
    ):
        m = decode(m_codes, m_absmax * beta1, exp_avg_qmap, blocksize)
        v = decode(v_codes, v_absmax * beta2, exp_avg_sq_qmap, blocksize)
        new, m, v = update(p.reshape(-1), grad.reshape(-1), m, v, h)
        if seed is not None and p.dtype == torch.bfloat16:
            new = round_stochastically(new, place, seed, step if step_tensor is None else step_tensor)
        new_m = encode(m, exp_avg_qmap, blocksize, positive_stays_positive=False)
        new_v = encode(v, exp_avg_sq_qmap, blocksize, positive_stays_positive=True)
        assign((p, m_codes, m_absmax, v_codes, v_absmax), (new, *new_m, *new_v), found_inf)


class Numbers(NamedTuple):
    """One step's numbers: floats, or 0-dim tensors of the computing dtype where the host does not know them."""

    beta1: float
    beta2: float
    eps: float
    decay: float | torch.Tensor  # 1 - lr * weight_decay
    step_size: float | torch.Tensor  # lr / (1 - beta1^step)
    inverse_bias2: float | torch.Tensor  # 1 / sqrt(1 - beta2^step)
    gradient_scale: float | torch.Tensor  # 1 / grad_scale, negative to maximize
    dtype: torch.dtype


def numbers(
    lr: float | torch.Tensor,
    step: float | torch.Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    grad_scale: torch.Tensor | None,
    maximize: bool,
    dtype: torch.dtype = torch.float32,
    clip: torch.Tensor | None = None,
) -> Numbers:
    """Worked out in float64, then rounded once to the computing dtype (floats by the arithmetic that uses them).

    Args:
        clip: what `clip_factor` returned.
    """
    rate, count = _number(lr), _number(step)
    bias1, bias2 = 1 - beta1**count, 1 - beta2**count
    root = bias2.sqrt() if isinstance(bias2, torch.Tensor) else math.sqrt(bias2)
    scale = _gradient_scale(grad_scale, dtype)
    if clip is not None:
        scale = scale * clip.to(dtype)
    return Numbers(
        beta1,
        beta2,
        eps,
        _rounded(1 - rate * weight_decay, dtype),
        _rounded(rate / bias1, dtype),
        _rounded(1 / root, dtype),
        -scale if maximize else scale,
        dtype,
    )


def update(
    p: torch.Tensor, grad: torch.Tensor, m: torch.Tensor, v: torch.Tensor, h: Numbers
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """AdamW in h.dtype: parameter, gradient, beta1 * m and beta2 * v of one shape -> the new parameter, m and v."""
    g = grad.to(h.dtype) * h.gradient_scale
    m = m + g * (1 - h.beta1)
    v = v + g * g * (1 - h.beta2)
    return p.to(h.dtype) * h.decay - m / (_sqrt(v) * h.inverse_bias2 + h.eps) * h.step_size, m, v


def assign(old: Sequence[torch.Tensor], new: Sequence[torch.Tensor], found_inf: torch.Tensor) -> None:
    """Writes the new values, rounded to the old dtypes, unless found_inf is set; nothing waits for the device."""
    for target, value in zip(old, new):
        target.copy_(torch.where(found_inf != 0, target, value.to(target.dtype).view(target.shape)))


def found_inf_(
    grads: Tensors,
    grad_scale: torch.Tensor | None,
    found_inf: torch.Tensor,
    norm: torch.Tensor | None = None,
    steps: Sequence[torch.Tensor] = (),
    skipped: torch.Tensor | None = None,
) -> None:
    """The op. A gradient of a magnitude that is not below 2^63, NaN and infinity too, cannot be used."""
    scale = _gradient_scale(grad_scale, torch.float32)
    for grad in grads:
        scaled = grad.to(torch.promote_types(grad.dtype, torch.float32)) * scale
        found_inf.copy_(torch.where((scaled.abs() < GRADIENT_LIMIT).all(), found_inf, torch.ones_like(found_inf)))
    if norm is not None:
        norm.copy_(gradient_norm(grads, scale))
    count_(found_inf, norm, steps, skipped)


def count_(
    found_inf: torch.Tensor,
    norm: torch.Tensor | None,
    steps: Sequence[torch.Tensor],
    skipped: torch.Tensor | None,
) -> None:
    """What `found_inf_` does after its look: a norm that is not finite counts as a bad gradient; then the counts."""
    if norm is not None:
        found_inf.copy_(torch.where(torch.isfinite(norm), found_inf, torch.ones_like(found_inf)))
    for step in steps:
        step.add_(1 - found_inf.reshape(step.shape))
    if skipped is not None:
        skipped.add_((found_inf != 0).reshape(skipped.shape))


def gradient_norm(grads: Tensors, scale: float | torch.Tensor) -> torch.Tensor:
    """The Euclidean norm of all gradients times `scale`, by sums in this order, so that every backend has its bits.

    In float32, within a piece of 2048 elements of one tensor: 256 sums of every 256th square in order, then neighbours
    in pairs. In float64, over the pieces of the list: 512 sums of every 512th in order, then neighbours in pairs. A
    tensor has four pieces for every 8192 elements begun.
    """
    pieces = []
    for grad in grads:
        if grad.numel():
            values = grad.reshape(-1).float() * scale
            rows = torch.nn.functional.pad(values, (0, -values.numel() % 8192)).view(-1, 8, 256)
            pieces.append(_in_pairs(_in_order((rows * rows).unbind(1))))
    return norm_of_pieces(pieces)


def norm_of_pieces(pieces: Tensors) -> torch.Tensor:
    """`gradient_norm` from the sums of each tensor's pieces."""
    if not pieces:
        return torch.zeros(())
    sums = torch.cat(pieces).double()
    rows = torch.nn.functional.pad(sums, (0, -sums.numel() % 512)).view(-1, 512)
    return _in_pairs(_in_order(rows.unbind(0))).sqrt().float()


def clip_factor(max_norm: float, grad_norm: torch.Tensor | None) -> torch.Tensor | None:
    """What gradients are multiplied by to have a norm of at most `max_norm`; as torch.nn.utils.clip_grad_norm_."""
    if grad_norm is None:
        return None
    return (max_norm / (grad_norm.double() + 1e-6)).clamp(max=1.0).float()


def round_stochastically(values: torch.Tensor, place: int, seed: int, step: float | torch.Tensor) -> torch.Tensor:
    """Flat float32 to bfloat16, away from zero with a probability of the part that is dropped.

    Places 8 i to 8 i + 7 take the eight halves of the words that Philox4x32-7 makes of counter (i, i >> 32, 0, step)
    and the seed, the low half of the first word first.

    Args:
        place: of the first value.
    """
    call = torch.arange(place // 8, -(-(place + values.numel()) // 8), device=values.device)
    count = torch.as_tensor(step, device=values.device).to(torch.int64).reshape(())
    counter = (call & 0xFFFFFFFF, call >> 32, call * 0, call * 0 + count)
    key = (call.new_tensor(seed & 0xFFFFFFFF), call.new_tensor(seed >> 32 & 0xFFFFFFFF))
    words = philox4x32(counter, key)
    halves = torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], dim=1)
    bits = values.view(torch.int32)
    rounded = (bits + halves.reshape(-1)[place % 8 :][: values.numel()].int()) >> 16
    nearest = values.bfloat16()
    return torch.where(torch.isfinite(values), rounded.short().view(torch.bfloat16), nearest)


def _in_order(terms: Sequence[torch.Tensor]) -> torch.Tensor:
    total = torch.zeros_like(terms[0])
    for term in terms:
        total = total + term
    return total


def _in_pairs(values: torch.Tensor) -> torch.Tensor:
    while values.shape[-1] > 1:
        values = values[..., 0::2] + values[..., 1::2]
    return values.squeeze(-1)


def _sqrt(v: torch.Tensor) -> torch.Tensor:
    """Correctly rounded, which float32 `sqrt` on the CPU is not (MKL's vector library may err in the last bit)."""
    return v.double().sqrt().to(v.dtype)


def _number(value: float | torch.Tensor) -> float | torch.Tensor:
    """A Python number where the host knows it, else float64 on the device, so that nothing waits for the device."""
    if isinstance(value, torch.Tensor):
        return value.double() if value.is_cuda else float(value)
    return value


def _rounded(value: float | torch.Tensor, dtype: torch.dtype) -> float | torch.Tensor:
    return value.to(dtype) if isinstance(value, torch.Tensor) else value


def _gradient_scale(grad_scale: torch.Tensor | None, dtype: torch.dtype) -> float | torch.Tensor:
    return 1.0 if grad_scale is None else grad_scale.to(dtype).reciprocal()
