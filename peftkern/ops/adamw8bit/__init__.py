"""8-bit AdamW: one step of many tensors in one call. See README.md in this folder."""

from peftkern.ops._library import fill
from peftkern.ops.adamw8bit import op, reference
from peftkern.ops.adamw8bit.function import adamw8bit_step_

try:
    from peftkern.ops.adamw8bit import triton_kernels
except ImportError:  # no triton on this platform
    triton_kernels = None  # type: ignore[assignment]

if triton_kernels is not None:
    fill("adamw8bit_step_", "CUDA", "triton")(triton_kernels.step_)
    fill("adamw8bit_found_inf_", "CUDA", "triton")(triton_kernels.found_inf_)
for _key in ("CPU", "CUDA"):
    fill("adamw8bit_step_", _key, "reference")(reference.step_)
    fill("adamw8bit_found_inf_", _key, "reference")(reference.found_inf_)

__all__ = ["adamw8bit_step_", "op"]
