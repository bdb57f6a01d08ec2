"""What has no kernel of its own and is made of the other ops, whichever backend they have on the device."""

from __future__ import annotations

from collections.abc import Callable

import torch


def bwd_add(suffix: str) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """lora_matmul_bwd_add over the lora_matmul_bwd op of the same suffix."""
    bwd = getattr(torch.ops.peftkern, f"lora_matmul_bwd{suffix}")

    def lora_matmul_bwd_add(
        dy: torch.Tensor,
        x: torch.Tensor | None,
        weight: torch.Tensor,
        lora_A: torch.Tensor,
        lora_B: torch.Tensor,
        S: torch.Tensor | None,
        seed: torch.Tensor | None,
        scaling: float,
        dropout_p: float,
        need_dA: bool,
        need_dB: bool,
        dx: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        own, dA, dB = bwd(dy, x, weight, lora_A, lora_B, S, seed, scaling, dropout_p, True, need_dA, need_dB)
        dx += own
        return dA, dB

    return lora_matmul_bwd_add
