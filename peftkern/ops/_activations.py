"""Activations by name, and their derivatives, elementwise in eager PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": functional.gelu,
    "gelu_tanh": lambda h: functional.gelu(h, approximate="tanh"),
    "relu": functional.relu,
    "silu": functional.silu,
}
_DERIVATIVES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "gelu": torch.ops.aten.gelu_backward,
    "gelu_tanh": lambda grad, h: torch.ops.aten.gelu_backward(grad, h, approximate="tanh"),
    "relu": lambda grad, h: grad * (h > 0),
    "silu": torch.ops.aten.silu_backward,
}


def activate(h: torch.Tensor, activation: str) -> torch.Tensor:
    """The activation of `h`: "gelu" (exact, by erf), "gelu_tanh", "relu" or "silu"."""
    return _ACTIVATIONS[activation](h)


def activation_backward(grad: torch.Tensor, h: torch.Tensor, activation: str) -> torch.Tensor:
    """grad * activation'(h)."""
    return _DERIVATIVES[activation](grad, h)
