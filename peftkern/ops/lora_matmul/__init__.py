"""LoRA matmul: a frozen linear layer and its low-rank update in one op. See README.md in this folder."""

from peftkern.ops._library import fill
from peftkern.ops.lora_matmul import composed, op, reference
from peftkern.ops.lora_matmul.function import lora_matmul

try:
    from peftkern.ops.lora_matmul import triton_kernels
except ImportError:  # no triton on this platform
    triton_kernels = None  # type: ignore[assignment]

for _suffix in ("", "_pieces"):
    if triton_kernels is not None:
        fill(f"lora_matmul_fwd{_suffix}", "CUDA", "triton")(triton_kernels.lora_matmul_fwd)
        fill(f"lora_matmul_bwd{_suffix}", "CUDA", "triton")(triton_kernels.lora_matmul_bwd)
    for _key in ("CPU", "CUDA"):
        fill(f"lora_matmul_fwd_nf4{_suffix}", _key, "composed")(composed.lora_matmul_fwd_nf4)
        fill(f"lora_matmul_fwd{_suffix}", _key, "reference")(reference.lora_matmul_fwd)
        fill(f"lora_matmul_bwd{_suffix}", _key, "reference")(reference.lora_matmul_bwd)
        fill(f"lora_matmul_bwd_add{_suffix}", _key, "composed")(composed.bwd_add(_suffix))

__all__ = ["lora_matmul", "op"]
