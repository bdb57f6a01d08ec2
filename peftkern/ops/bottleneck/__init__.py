"""Bottleneck adapter: down, activation, up and residual in one op. See README.md in this folder."""

from peftkern.ops._library import fill
from peftkern.ops.bottleneck import op, reference
from peftkern.ops.bottleneck.function import bottleneck

for _key in ("CPU", "CUDA"):
    fill("bottleneck_fwd", _key, "reference")(reference.bottleneck_fwd)
    fill("bottleneck_bwd", _key, "reference")(reference.bottleneck_bwd)

__all__ = ["bottleneck", "op"]
