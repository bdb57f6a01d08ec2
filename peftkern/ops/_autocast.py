"""Autocast for custom ops: the rule of `torch.nn.functional.linear`, applied before the op is called."""

from __future__ import annotations

import torch


def autocast_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype in which a matmul of `x` runs: autocast's where it is on for x's device, else x's own."""
    kind = x.device.type
    if x.dtype != torch.float64 and kind != "meta" and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype
