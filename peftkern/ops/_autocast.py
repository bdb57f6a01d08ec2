"""Autocast for custom ops: the rule of `torch.nn.functional.linear`, applied before the op is called."""

from __future__ import annotations

import torch


def autocast_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype in which a matmul of `x` runs: autocast's where it is on for x's device, else x's own."""
    if x.dtype != torch.float64 and torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype
