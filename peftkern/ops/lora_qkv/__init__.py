"""LoRA QKV: several LoRA projections of one x in one op. See README.md in this folder."""

from peftkern.ops._library import backends, fill
from peftkern.ops.lora_qkv import composed, op, reference
from peftkern.ops.lora_qkv.function import lora_qkv

for _key in ("CPU", "CUDA"):
    if backends()["lora_matmul_fwd"].get(_key) != "reference":  # of references, this op's own has fewer passes
        fill("lora_qkv_fwd", _key, "composed")(composed.lora_qkv_fwd)
        fill("lora_qkv_bwd", _key, "composed")(composed.lora_qkv_bwd)
        fill("lora_qkv_bwd_add", _key, "composed")(composed.lora_qkv_bwd_add)
    fill("lora_qkv_fwd", _key, "reference")(reference.lora_qkv_fwd)
    fill("lora_qkv_bwd", _key, "reference")(reference.lora_qkv_bwd)
    fill("lora_qkv_bwd_add", _key, "reference")(reference.lora_qkv_bwd_add)

__all__ = ["lora_qkv", "op"]
