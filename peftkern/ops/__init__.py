"""The ops, one folder each. Every op picks its backend per device at import; see `peftkern.backends()`."""

from peftkern.ops._library import backends
from peftkern.ops.nf4 import NF4Weight, dequantize_nf4, nf4_matmul, quantize_nf4

__all__ = ["NF4Weight", "backends", "dequantize_nf4", "nf4_matmul", "quantize_nf4"]
