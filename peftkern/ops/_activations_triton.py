"""Activations and their derivatives in Triton kernels."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def activate(h, ACTIVATION: tl.constexpr):
    """The activation of h, float32, and its derivative."""
    if ACTIVATION == "gelu":
        below = 0.5 * (1.0 + tl.erf(h * 0.7071067811865476))
        value, slope = h * below, below + h * 0.3989422804014327 * tl.exp(-0.5 * h * h)
    elif ACTIVATION == "gelu_tanh":
        z = 1.5957691216057308 * (h + 0.044715 * h * h * h)
        below, above = tl.sigmoid(z), tl.sigmoid(-z)  # (1 + tanh) / 2 and (1 - tanh) / 2, without cancellation
        value = h * below
        slope = below + value * above * 1.5957691216057308 * (1.0 + 0.134145 * h * h)
    elif ACTIVATION == "relu":
        value, slope = tl.where(h <= 0.0, 0.0, h), tl.where(h > 0.0, 1.0, 0.0)  # a NaN stays one
    else:
        sigmoid = tl.sigmoid(h)
        value, slope = h * sigmoid, sigmoid * (1.0 + h * (1.0 - sigmoid))
    return value, slope
