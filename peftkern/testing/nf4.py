"""NF4 weights of any size without quantizing one, and their row slices."""

from __future__ import annotations

from dataclasses import replace

import torch

from peftkern.ops._code_tables import dynamic_map
from peftkern.ops.nf4 import reference
from peftkern.ops.nf4.weight import NESTED_BLOCKSIZE, NF4Weight

STD = 0.02  # of a trained projection


def random_nf4(
    shape: tuple[int, ...],
    blocksize: int = 64,
    double_quant: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> NF4Weight:
    """Random codes under the scales of a trained weight: every byte and every scale code occurs."""
    generator = torch.Generator(device).manual_seed(seed)
    size = torch.Size(shape)
    blocks = -(-size.numel() // blocksize)

    def codes(*count: int) -> torch.Tensor:
        return torch.randint(0, 256, count, generator=generator, device=device, dtype=torch.uint8)

    def scales(count: int, low: float) -> torch.Tensor:
        return torch.rand(count, generator=generator, device=device).mul_(STD).add_(low)

    packed = codes((size.numel() + 1) // 2, 1)
    if not double_quant:
        return NF4Weight(packed, scales(blocks, 2 * STD), size, dtype, blocksize)
    nested_absmax = scales(-(-blocks // NESTED_BLOCKSIZE), STD / 2)
    code, offset = dynamic_map(signed=True, device=torch.device(device)), torch.tensor(3 * STD, device=device)
    return NF4Weight(packed, codes(blocks), size, dtype, blocksize, nested_absmax, code, offset)


def row_slice(q: NF4Weight, first: int, last: int) -> NF4Weight:
    """Rows first to last of a matrix as a weight of its own, a view.

    Raises:
        ValueError: `first` is not where a block starts, or a block of scales where they are quantized too.
    """
    K = q.shape[1]
    begin, end = first * K, last * K
    unit = q.blocksize * (q.nested_blocksize if q.double_quant else 1)
    if begin % unit:
        raise ValueError(f"row_slice: row {first} of {K} columns starts inside a block of {unit} elements")
    block, last_block = begin // q.blocksize, -(-end // q.blocksize)
    nested = q.nested_absmax
    if nested is not None:
        nested = nested[block // q.nested_blocksize : -(-last_block // q.nested_blocksize)]
    return replace(
        q,
        packed=q.packed[begin // 2 : (end + 1) // 2],
        absmax=q.absmax[block:last_block],
        shape=torch.Size((last - first, K)),
        nested_absmax=nested,
    )


def dense_nf4(q: NF4Weight, dtype: torch.dtype) -> torch.Tensor:
    """The weight decoded by the reference."""
    out = torch.empty(q.shape, dtype=dtype, device=q.device)
    reference.dequantize_out(*q.tensors(), q.blocksize, q.nested_blocksize, out)
    return out
