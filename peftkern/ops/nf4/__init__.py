"""NF4: 4-bit NormalFloat quantization and the matmul with a frozen NF4 weight. See README.md in this folder."""

from peftkern.ops._library import fill
from peftkern.ops.nf4 import op, reference
from peftkern.ops.nf4.function import dequantize_nf4, nf4_matmul, quantize_nf4
from peftkern.ops.nf4.weight import NF4Weight

try:
    from peftkern.ops.nf4 import triton_kernels
except ImportError:  # no triton on this platform
    pass
else:
    fill("nf4_quantize", "CUDA", "triton")(triton_kernels.quantize)
    fill("nf4_quantize_absmax", "CUDA", "triton")(triton_kernels.quantize_absmax)
    fill("nf4_dequantize_out", "CUDA", "triton")(triton_kernels.dequantize_out)
    fill("nf4_dequantize_slice_out", "CUDA", "triton")(triton_kernels.dequantize_slice_out)
    fill("nf4_matmul", "CUDA", "triton")(triton_kernels.matmul)
    fill("nf4_matmul_dx", "CUDA", "triton")(triton_kernels.matmul_dx)

for _key in ("CPU", "CUDA"):
    fill("nf4_quantize", _key, "reference")(reference.quantize)
    fill("nf4_quantize_absmax", _key, "reference")(reference.quantize_absmax)
    fill("nf4_dequantize_out", _key, "reference")(reference.dequantize_out)
    fill("nf4_dequantize_slice_out", _key, "reference")(reference.dequantize_slice_out)
    fill("nf4_matmul", _key, "reference")(reference.matmul)
    fill("nf4_matmul_dx", _key, "reference")(reference.matmul_dx)

__all__ = ["NF4Weight", "dequantize_nf4", "nf4_matmul", "op", "quantize_nf4"]
