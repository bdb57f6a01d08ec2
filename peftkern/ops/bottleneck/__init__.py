"""Bottleneck adapter: down, activation, up and residual in one op. See README.md in this folder."""

from peftkern.ops._library import fill
from peftkern.ops.bottleneck import op, reference
from peftkern.ops.bottleneck.function import bottleneck

try:
    from peftkern.ops.bottleneck import triton_kernels
except ImportError:  # no triton on this platform
    triton_kernels = None  # type: ignore[assignment]

for _suffix in ("", "_pieces"):
    if triton_kernels is not None:
        fill(f"bottleneck_fwd{_suffix}", "CUDA", "triton")(triton_kernels.bottleneck_fwd)
        fill(f"bottleneck_bwd{_suffix}", "CUDA", "triton")(triton_kernels.bottleneck_bwd)
    for _key in ("CPU", "CUDA"):
        fill(f"bottleneck_fwd{_suffix}", _key, "reference")(reference.bottleneck_fwd)
        fill(f"bottleneck_bwd{_suffix}", _key, "reference")(reference.bottleneck_bwd)

__all__ = ["bottleneck", "op"]
