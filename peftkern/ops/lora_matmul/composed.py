"""What has no kernel of its own and is made of the other ops, whichever backend they have on the device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.functional import linear


def lora_matmul_fwd_nf4(
    x: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    nested_absmax: torch.Tensor | None,
    nested_code: torch.Tensor | None,
    nested_offset: torch.Tensor | None,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    bias: torch.Tensor | None,
    scaling: float,
    blocksize: int,
    nested_blocksize: int,
    out_features: int,
    settled: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y = x weight^T + scaling * S lora_B^T + bias and S = x lora_A^T."""
    weight = (packed, absmax, nested_absmax, nested_code, nested_offset)
    with torch.autocast(x.device.type, enabled=False):  # the dtypes are settled by the caller
        S = linear(x, lora_A.to(x.dtype))
        y = torch.ops.peftkern.nf4_matmul(
            x.contiguous(), *weight, bias, blocksize, nested_blocksize, out_features, settled
        )
        y += scaling * linear(S, lora_B.to(x.dtype))
    return y, S


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
