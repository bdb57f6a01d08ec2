"""peftkern: fused kernels for parameter-efficient fine-tuning."""

from peftkern.ops import NF4Weight, backends, bottleneck, dequantize_nf4, lora_matmul, nf4_matmul, quantize_nf4

__version__ = "0.1.0"

__all__ = ["NF4Weight", "backends", "bottleneck", "dequantize_nf4", "lora_matmul", "nf4_matmul", "quantize_nf4"]
