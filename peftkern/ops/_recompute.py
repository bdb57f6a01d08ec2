"""Decoded weights that a recomputed forward leaves to the backward which follows it at once.

A checkpointed layer runs its forward again inside the backward pass, decodes its NF4 weight, and a moment later needs
it once more for dx. Between the two the dense weight is kept here, up to `BUDGET_BYTES`; what came first gives way,
for its backward comes last. When the backward pass ends, nothing is kept.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

import torch

BUDGET_BYTES = 512 << 20


class _Key(NamedTuple):
    """One state of the packed bytes, read on one stream. Saved tensors come back as aliases: objects tell nothing."""

    address: int
    version: int
    numel: int
    dtype: torch.dtype
    stream: int


_kept: OrderedDict[_Key, tuple[torch.Tensor, torch.Tensor]] = OrderedDict()  # packed, so that it lives on, and dense
_task = -1  # the backward pass that it belongs to


def keep(packed: torch.Tensor, dense: torch.Tensor) -> None:
    """Keeps a weight that a forward has decoded, if that runs inside of a backward pass."""
    global _task
    task = torch._C._current_graph_task_id()  # -1 outside of one
    if task != _task:  # leftovers of one that broke off
        _kept.clear()
        _task = task
        if task != -1:
            torch.autograd.Variable._execution_engine.queue_callback(_kept.clear)
    if task == -1 or dense.nbytes > BUDGET_BYTES or (key := _key(packed, dense.dtype)) is None:
        return
    _kept[key] = packed, dense
    while sum(kept.nbytes for _, kept in _kept.values()) > BUDGET_BYTES:
        _kept.popitem(last=False)


def take(packed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
    """The weight that a recomputed forward has left, which is kept no longer; None where there is none."""
    if not _kept:
        return None
    key = _key(packed, dtype)
    return None if key is None or key not in _kept else _kept.pop(key)[1]


def _key(packed: torch.Tensor, dtype: torch.dtype) -> _Key | None:
    if type(packed) not in (torch.Tensor, torch.nn.Parameter) or packed.is_inference():
        return None  # traced, or without a count of versions
    stream = torch.cuda.current_stream(packed.device).cuda_stream if packed.is_cuda else 0
    return _Key(packed.data_ptr(), packed._version, packed.numel(), dtype, stream)
