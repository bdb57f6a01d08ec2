"""LoRA matmul: a frozen linear layer and its low-rank update in one op. See README.md in this folder."""

from peftkern.ops._library import fill
from peftkern.ops.lora_matmul import op, reference
from peftkern.ops.lora_matmul.function import lora_matmul

try:
    from peftkern.ops.lora_matmul import triton_kernels
except ImportError:  # no triton on this platform
    pass
else:
    fill("lora_matmul_fwd", "CUDA", "triton")(triton_kernels.lora_matmul_fwd)
    fill("lora_matmul_bwd", "CUDA", "triton")(triton_kernels.lora_matmul_bwd)

for _key in ("CPU", "CUDA"):
    fill("lora_matmul_fwd", _key, "reference")(reference.lora_matmul_fwd)
    fill("lora_matmul_bwd", _key, "reference")(reference.lora_matmul_bwd)

__all__ = ["lora_matmul", "op"]
