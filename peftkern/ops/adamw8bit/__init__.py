"""8-bit AdamW: one step of many tensors in one call. See README.md in this folder."""

from peftkern.ops._library import fill
from peftkern.ops.adamw8bit import op, reference
from peftkern.ops.adamw8bit.function import adamw8bit_step_

for _key in ("CPU", "CUDA"):
    fill("adamw8bit_step_", _key, "reference")(reference.step_)
    fill("adamw8bit_found_inf_", _key, "reference")(reference.found_inf_)

__all__ = ["adamw8bit_step_", "op"]
