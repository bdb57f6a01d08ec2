"""LoRA QKV composed of the lora_matmul ops, whichever backend they have on the device, where it is not fused."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import linear

from peftkern.ops._projection import unpack_weight
from peftkern.ops.lora_qkv import fused
from peftkern.ops.lora_qkv.op import empty_grads
from peftkern.ops.lora_qkv.reference import Optionals, Tensors, seed_of, split_columns

_ops = torch.ops.peftkern


def lora_qkv_fwd(
    x: torch.Tensor,
    pieces: Optionals,
    layouts: Sequence[int],
    lora_A: Tensors,
    lora_B: Tensors,
    biases: Optionals,
    scalings: Sequence[float],
    dropout_p: float,
    seeds: torch.Tensor | None,
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """One lora_matmul_fwd per projection, or fused.py's launches."""
    if fused.takes([x], x.shape[1], pieces, layouts, lora_A, lora_B, seeds is not None):
        return fused.lora_qkv_fwd(x, pieces, layouts, lora_A, lora_B, biases, scalings)
    ys, parts = [], []
    for i, (A, B, bias, scaling) in enumerate(zip(lora_A, lora_B, biases, scalings)):
        weight = unpack_weight(pieces, layouts, i, x.dtype, forward=True)
        if len(A):
            y, S_i = _ops.lora_matmul_fwd(x, weight, A, B, bias, scaling, dropout_p, seed_of(seeds, i))
            parts.append(S_i)
        else:
            with torch.autocast(x.device.type, enabled=False):
                y = linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
        ys.append(y)
        del weight  # before the next one is made dense
    return ys, torch.cat(parts, dim=1) if parts else x.new_empty((x.shape[0], 0))


def lora_qkv_bwd(
    dys: Tensors,
    x: torch.Tensor | None,
    pieces: Optionals,
    layouts: Sequence[int],
    lora_A: Tensors,
    lora_B: Tensors,
    S: torch.Tensor | None,
    seeds: torch.Tensor | None,
    scalings: Sequence[float],
    dropout_p: float,
    need_dx: bool,
    need_dA: Sequence[bool],
    need_dB: Sequence[bool],
    total: torch.Tensor | None = None,
) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    """One lora_matmul_bwd per projection, all but the first of which add to dx; or fused.py's launches.

    Where `total` is given, dx is added to it, and is it.
    """
    rows = [*dys, *(t for t in (x if any(need_dA) else None, total) if t is not None)]
    if (need_dx or any(need_dA) or any(need_dB)) and fused.takes(
        rows, lora_A[0].shape[1], pieces if need_dx else [], layouts, lora_A, lora_B, seeds is not None
    ):
        return fused.lora_qkv_bwd(
            dys, x, pieces, layouts, lora_A, lora_B, S, scalings, need_dx, need_dA, need_dB, total
        )
    dx = total
    dA, dB = empty_grads(lora_A, [False] * len(lora_A)), empty_grads(lora_B, [False] * len(lora_B))
    parts = [None] * len(lora_A) if S is None else split_columns(S, [len(A) for A in lora_A])
    for i, (dy, A, B, S_i) in enumerate(zip(dys, lora_A, lora_B, parts)):
        if not (need_dx or need_dA[i] or need_dB[i]):
            continue
        weight = unpack_weight(pieces, layouts, i, dy.dtype) if need_dx else None
        if not len(A):
            assert weight is not None
            with torch.autocast(dy.device.type, enabled=False):
                own = dy @ weight.to(dy.dtype)
            dx = own if dx is None else dx.add_(own)
        elif dx is None:
            flags = need_dx, need_dA[i], need_dB[i]
            own, dA[i], dB[i] = _ops.lora_matmul_bwd(
                dy, x, weight, A, B, S_i, seed_of(seeds, i), scalings[i], dropout_p, *flags
            )
            dx = own if need_dx else None
        else:
            dA[i], dB[i] = _ops.lora_matmul_bwd_add(
                dy, x, weight, A, B, S_i, seed_of(seeds, i), scalings[i], dropout_p, need_dA[i], need_dB[i], dx
            )
        del weight  # before the next one is made dense
    return dys[0].new_empty(0) if dx is None else dx, dA, dB


def lora_qkv_bwd_add(
    dys: Tensors,
    x: torch.Tensor | None,
    pieces: Optionals,
    layouts: Sequence[int],
    lora_A: Tensors,
    lora_B: Tensors,
    S: torch.Tensor | None,
    seeds: torch.Tensor | None,
    scalings: Sequence[float],
    dropout_p: float,
    need_dA: Sequence[bool],
    need_dB: Sequence[bool],
    dx: torch.Tensor,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """dA and dB; dx is added to `dx`."""
    _, dA, dB = lora_qkv_bwd(
        dys, x, pieces, layouts, lora_A, lora_B, S, seeds, scalings, dropout_p, True, need_dA, need_dB, dx
    )
    return dA, dB
