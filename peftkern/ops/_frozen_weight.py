"""A frozen weight is a dense tensor or an NF4Weight. The one place that takes them apart and makes them dense.

`autograd.Function` and `torch.compile` see only tensors and constants, so a weight travels as `pieces` (tensors or
None) and `layout` (None when dense, else the constants that decode the pieces).
"""

from __future__ import annotations

from typing import TypeAlias

import torch

from peftkern.ops import _recompute
from peftkern.ops.nf4.weight import FLOAT_DTYPES, NF4Weight

FrozenWeight: TypeAlias = torch.Tensor | NF4Weight
Pieces: TypeAlias = tuple[torch.Tensor | None, ...]
Layout: TypeAlias = tuple[int, int, int, int] | None  # (N, K, blocksize, nested_blocksize)

COMPUTE_DTYPES = (*FLOAT_DTYPES, torch.float64)


def split_weight(weight: FrozenWeight) -> tuple[Pieces, Layout]:
    """The tensors and the constants of a weight [N, K]."""
    if isinstance(weight, NF4Weight):
        return weight.tensors(), (*weight.shape, weight.blocksize, weight.nested_blocksize)  # type: ignore[return-value]
    return (weight,), None


def dense_weight(pieces: Pieces, layout: Layout, dtype: torch.dtype, forward: bool = False) -> torch.Tensor:
    """The weight as a dense matrix [N, K]: the tensor itself, in its own dtype, or NF4 decoded to `dtype`.

    A dense weight is cast by the op that reads it, not here: torch.compile would see the cast and save its result.
    What a `forward` decodes while it is recomputed serves its backward.
    """
    if layout is None:
        (weight,) = pieces
        assert weight is not None
        return weight.detach()
    packed = pieces[0]
    assert packed is not None
    out_features, in_features, blocksize, nested_blocksize = layout
    eager = not torch.compiler.is_compiling()
    if eager and not forward and (kept := _recompute.take(packed, dtype)) is not None:
        return kept
    out = torch.empty((out_features, in_features), dtype=dtype, device=packed.device)
    torch.ops.peftkern.nf4_dequantize_out(*pieces, blocksize, nested_blocksize, out)
    if eager and forward:
        _recompute.keep(packed, out)
    return out


def dense_slice(pieces: Pieces, layout: Layout, dtype: torch.dtype, rows: slice, columns: slice) -> torch.Tensor:
    """Some rows and columns of the weight in `dtype`: a view of a dense one that has it, else of no more than these."""
    if layout is None:
        (weight,) = pieces
        assert weight is not None
        return weight.detach()[rows, columns].to(dtype)
    packed = pieces[0]
    assert packed is not None
    out_features, in_features, *blocksizes = layout
    row, end, _ = rows.indices(out_features)
    column, last, _ = columns.indices(in_features)
    out = torch.empty((end - row, last - column), dtype=dtype, device=packed.device)
    torch.ops.peftkern.nf4_dequantize_slice_out(*pieces, *blocksizes, out_features, in_features, row, column, out)
    return out


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether `tensor` is a DTensor, told without importing torch.distributed."""
    return hasattr(tensor, "device_mesh")


def check_frozen(op: str, weight: FrozenWeight) -> None:
    """Raises ValueError or TypeError for a weight that no matmul can use: not a matrix, not frozen, not here."""
    if isinstance(weight, NF4Weight):
        weight.check()
    elif not isinstance(weight, torch.Tensor):
        raise TypeError(f"{op}: weight must be a torch.Tensor or an NF4Weight, got {type(weight).__name__}")
    elif is_sharded(weight):
        raise ValueError(
            f"{op}: weight is a sharded DTensor; call the module that FSDP or tensor parallelism wraps, or pass "
            "weight.full_tensor()"
        )
    elif weight.dtype not in COMPUTE_DTYPES:
        raise ValueError(
            f"{op}: weight must be float32, float16 or bfloat16, got {weight.dtype}; cast it, or quantize it with "
            "quantize_nf4"
        )
    elif weight.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{op}: weight is frozen and gets no gradient, but its requires_grad is True; call "
            "weight.requires_grad_(False), or use torch.nn.functional.linear to train it"
        )
    if 0 in weight.shape:
        raise ValueError(
            f"{op}: weight is empty, got shape {tuple(weight.shape)}; FSDP and ZeRO-3 leave such a shard outside the "
            "forward of the module they wrap: gather it, or call that module"
        )
    if len(weight.shape) != 2:
        raise ValueError(f"{op}: weight must be a matrix [N, K], got shape {tuple(weight.shape)}")
