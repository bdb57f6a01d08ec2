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
_BACKWARDS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "gelu": lambda grad, h: torch.ops.aten.gelu_backward.grad_input(grad, h, grad_input=grad),
    "gelu_tanh": lambda grad, h: torch.ops.aten.gelu_backward.grad_input(grad, h, approximate="tanh", grad_input=grad),
    "relu": lambda grad, h: grad.mul_(h > 0),
    "silu": lambda grad, h: torch.ops.aten.silu_backward.grad_input(grad, h, grad_input=grad),
}


def activate(h: torch.Tensor, activation: str) -> torch.Tensor:
    """The activation of `h`: "gelu" (exact, by erf), "gelu_tanh", "relu" or "silu"."""
    return _ACTIVATIONS[activation](h)


def activation_backward_(grad: torch.Tensor, h: torch.Tensor, activation: str) -> torch.Tensor:
    """grad * activation'(h), in grad's place."""
    return _BACKWARDS[activation](grad, h)
