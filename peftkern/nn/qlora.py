"""QLoRALinear: LoRALinear over a base in NF4."""

from __future__ import annotations

import torch
import torch.nn as nn

from peftkern.nn.lora import LoRALinear
from peftkern.nn.nf4 import NF4Linear, is_bitsandbytes_4bit


class QLoRALinear(LoRALinear):
    """LoRALinear whose base is stored in NF4: about 0.52 bytes per weight at block 64 with double quantization.

    Args:
        base_layer: nn.Linear or transformers' Conv1D, quantized here on its device; no reference to its dense weight is
            kept. NF4Linear and bitsandbytes' Linear4bit are taken over as they are, blocksize and double_quant then
            come from them.
        rank, lora_alpha, dropout, use_rslora: as for LoRALinear.
        blocksize: elements per scale, a power of two from 32 to 4096.
        double_quant: store the scales in 8 bits too.
        compute_dtype: the input is cast to it and the output back. None: the base's, else the input's dtype.

    Raises:
        TypeError: a base that is none of these.
        ValueError: a bad rank, lora_alpha, dropout, blocksize or compute_dtype.

    Source: Dettmers et al. 2023, arXiv:2305.14314.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        rank: int = 16,
        lora_alpha: float = 32,
        dropout: float = 0.0,
        blocksize: int = 64,
        double_quant: bool = True,
        compute_dtype: torch.dtype | None = None,
        use_rslora: bool = False,
    ) -> None:
        super().__init__(
            quantized(base_layer, blocksize, double_quant, compute_dtype), rank, lora_alpha, dropout, use_rslora
        )


def quantized(
    layer: nn.Module, blocksize: int = 64, double_quant: bool = True, compute_dtype: torch.dtype | None = None
) -> NF4Linear:
    """The layer as an NF4Linear: quantized if it is dense, over the same bytes if it is in NF4 already."""
    if is_bitsandbytes_4bit(layer):
        layer = NF4Linear.from_bitsandbytes(layer)
    if not isinstance(layer, NF4Linear):
        return NF4Linear.from_linear(layer, blocksize, double_quant, compute_dtype)
    if compute_dtype is not None:
        layer.compute_dtype = compute_dtype
    return layer
