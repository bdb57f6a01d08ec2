"""LoRA matmul over an NF4 weight as it is stored, composed of nf4_matmul and torch's ops."""

from __future__ import annotations

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
