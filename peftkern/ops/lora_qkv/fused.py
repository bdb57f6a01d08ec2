"""LoRA QKV without dropout in one launch a pass (csrc/gemm), for what that takes; the rest is composed.

With NF4 weights it is a launch a projection, so that one dense weight is there at a time; S of all is still made by one
reading of x, and so are all dA.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch

from peftkern.ops._library import backends
from peftkern.ops._projection import LAYOUT, PIECES, unpack_weight
from peftkern.ops.lora_qkv.reference import Optionals, Tensors

try:
    from peftkern._host import lora_group_covers
except ImportError:
    lora_group_covers = None

_ops = torch.ops.peftkern
_ADAPTER_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ALIGNMENT = 16  # bytes


@lru_cache
def _compiled() -> bool:
    return lora_group_covers is not None and backends()["lora_group_fwd"].get("CUDA") == "cuda"


@lru_cache
def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def takes(
    rows: Sequence[torch.Tensor],
    K: int,
    pieces: Optionals,
    layouts: Sequence[int],
    lora_A: Tensors,
    lora_B: Tensors,
    dropout: bool,
) -> bool:
    """Whether these projections go through the lora_group ops. `rows`: what is read of x, of every dy, and of dx."""
    first = rows[0]
    if not first.is_cuda or dropout or not _compiled():
        return False
    dense = [w for i, w in enumerate(pieces[::PIECES]) if w is not None and not layouts[LAYOUT * i]]
    adapters = ([A for A in lora_A if A.numel()], [B for B in lora_B if B.numel()])
    half = (
        first.dtype in (torch.float16, torch.bfloat16)
        and all(t.dtype == first.dtype for t in (*rows, *dense))
        and all(t.dtype in _ADAPTER_DTYPES and t.dtype == each[0].dtype for each in adapters for t in each)
    )
    usable = (*rows, *adapters[0], *adapters[1])
    aligned = all(not t.is_contiguous() or t.data_ptr() % ALIGNMENT == 0 for t in usable) and all(
        w.is_contiguous() and w.data_ptr() % ALIGNMENT == 0 for w in dense
    )
    ranks = [A.shape[0] for A in lora_A]
    N = [B.shape[0] for B in lora_B]
    return lora_group_covers(first.shape[0], K, N, ranks, half, aligned, _capability(first.device))


def lora_qkv_fwd(
    x: torch.Tensor,
    pieces: Optionals,
    layouts: Sequence[int],
    lora_A: Tensors,
    lora_B: Tensors,
    biases: Optionals,
    scalings: Sequence[float],
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """For what `takes`."""
    S = x.new_empty((x.shape[0], sum(A.shape[0] for A in lora_A)))
    count = len(lora_A)
    shared = lora_A, lora_B, biases, scalings
    if not any(layouts):
        return _ops.lora_group_fwd(x, pieces[::PIECES], *shared, 0, S), S
    ys = []
    for i in range(count):
        weight = unpack_weight(pieces, layouts, i, x.dtype, forward=True)
        ys += _ops.lora_group_fwd(x, [weight], *shared, i, S)
        del weight
    return ys, S


def lora_qkv_bwd(
    dys: Tensors,
    x: torch.Tensor | None,
    pieces: Optionals,
    layouts: Sequence[int],
    lora_A: Tensors,
    lora_B: Tensors,
    S: torch.Tensor | None,
    scalings: Sequence[float],
    need_dx: bool,
    need_dA: Sequence[bool],
    need_dB: Sequence[bool],
    total: torch.Tensor | None = None,
) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    """For what `takes`. dx is added to `total` where that is given, and is it."""
    if not any(need_dA):
        x = None
    if not need_dx or not any(layouts):
        weights = pieces[::PIECES] if need_dx else []
        return _ops.lora_group_bwd(
            dys, x, weights, lora_A, lora_B, S, scalings, 0, None, total, need_dx, need_dA, need_dB
        )
    D = dys[0].new_empty((dys[0].shape[0], sum(A.shape[0] for A in lora_A)))
    dx = total
    dA: list[torch.Tensor] = []
    dB: list[torch.Tensor] = []
    last = len(dys) - 1
    for i, dy in enumerate(dys):
        weight = unpack_weight(pieces, layouts, i, dy.dtype)
        dx, dA, own = _ops.lora_group_bwd(
            [dy],
            x if i == last else None,
            [weight],
            lora_A,
            lora_B,
            S,
            scalings,
            i,
            D,
            dx,
            True,
            need_dA,
            need_dB,
        )
        del weight
        dB.append(own[i])
    assert dx is not None
    return dx, dA, dB
