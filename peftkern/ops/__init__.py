"""The ops, one folder each. Every op picks its backend per device at import; see `peftkern.backends()`."""

from peftkern.ops._library import backends
from peftkern.ops._projection import LoRAProjection
from peftkern.ops.adamw8bit import adamw8bit_step_
from peftkern.ops.bottleneck import bottleneck
from peftkern.ops.lora_matmul import lora_matmul
from peftkern.ops.lora_mlp import lora_mlp
from peftkern.ops.lora_qkv import lora_qkv
from peftkern.ops.nf4 import NF4Weight, dequantize_nf4, nf4_matmul, quantize_nf4

__all__ = [
    "LoRAProjection",
    "NF4Weight",
    "adamw8bit_step_",
    "backends",
    "bottleneck",
    "dequantize_nf4",
    "lora_matmul",
    "lora_mlp",
    "lora_qkv",
    "nf4_matmul",
    "quantize_nf4",
]
