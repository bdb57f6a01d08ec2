"""LoRA MLP: gate, up, activation and down with their adapters in one op. See README.md in this folder."""

from functools import partial

import torch

from peftkern.ops._library import backends, fill
from peftkern.ops.lora_mlp import op, reference
from peftkern.ops.lora_mlp.function import lora_mlp

try:
    from peftkern.ops.lora_mlp import triton_kernels
except ImportError:  # no triton on this platform
    triton_kernels = None  # type: ignore[assignment]

if triton_kernels is not None and backends()["lora_qkv_fwd"].get("CUDA") != "reference":
    fill("lora_mlp_fwd", "CUDA", "triton")(triton_kernels.lora_mlp_fwd)
    fill("lora_mlp_bwd", "CUDA", "triton")(triton_kernels.lora_mlp_bwd)
for _key in ("CPU", "CUDA"):
    if backends()["lora_qkv_fwd"].get(_key) != "reference":
        fill("lora_mlp_fwd", _key, "composed")(partial(reference.lora_mlp_fwd, ops=torch.ops.peftkern))
        fill("lora_mlp_bwd", _key, "composed")(partial(reference.lora_mlp_bwd, ops=torch.ops.peftkern))
    fill("lora_mlp_fwd", _key, "reference")(reference.lora_mlp_fwd)
    fill("lora_mlp_bwd", _key, "reference")(reference.lora_mlp_bwd)

__all__ = ["lora_mlp", "op"]
