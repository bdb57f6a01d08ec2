"""LoRA MLP in eager PyTorch over lora_qkv: the oracle, and the backend where nothing else is present.

gate and up are one lora_qkv of x, down is one of h. `ops` is where lora_qkv's forward and backward are taken from: its
reference, or the registered ops. `gated` and `gated_backward_` are what comes between, here or in Triton.

Of the inner width only e and g are held whole. The forward makes h for a block of rows at a time, which need nothing of
each other. The backward makes h, dh and dg for a chunk of columns at a time: so each element of a weight is read, or
decoded, once, and dB of gate and up and dA of down come in pieces; only dx and dA of gate and up are sums over chunks.
With dropout all is one: a mask counts from the first row and column of its op's input.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from peftkern.ops._activations import activate, activation_backward_
from peftkern.ops._projection import LAYOUT, PIECES, LoRAProjection, as_pieces, slice_weights, take_kept, unpack_weight
from peftkern.ops.lora_qkv import reference as lora_qkv
from peftkern.ops.lora_qkv.reference import Optionals, Tensors, apply_projection, seed_of

BLOCK_BYTES = 48 << 20  # of one matrix [rows, I] or [M, columns]; the backward holds two of them
BLOCK_ROWS = 1024  # at least: the CUDA kernel of lora_matmul takes no fewer
CHUNK_COLUMNS = 1024  # at least: each chunk adds to all of dx
ROW_STEP, COLUMN_STEP = 128, 256  # they begin at multiples of a GEMM's tile

_Weights = tuple[Optionals, Sequence[int]]  # pieces and layouts


def formula(
    x: torch.Tensor,
    gate: LoRAProjection,
    up: LoRAProjection,
    down: LoRAProjection,
    activation: str = "silu",
    dropout_p: float = 0.0,
    seeds: torch.Tensor | None = None,
) -> torch.Tensor:
    """The equation as a PEFT model computes it, every step rounded to x's dtype. Differentiable by plain autograd.

    Evaluated in float64 it is the truth; in x's dtype its error is the allowance.
    """
    e = apply_projection(x, gate, dropout_p, seed_of(seeds, 0))
    g = apply_projection(x, up, dropout_p, seed_of(seeds, 1))
    return apply_projection(activate(e, activation) * g, down, dropout_p, seed_of(seeds, 2))


def gated(e: torch.Tensor, g: torch.Tensor, activation: str) -> torch.Tensor:
    """h = act(e) * g."""
    return activate(e, activation).mul_(g)


def gated_backward_(
    dh: torch.Tensor, e: torch.Tensor, g: torch.Tensor, activation: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """(de, dg) of h = act(e) * g; de in dh's place."""
    dg = activate(e, activation).mul_(dh)
    return activation_backward_(dh.mul_(g), e, activation), dg


def lora_mlp_fwd(
    x: torch.Tensor,
    pieces: Optionals,
    layouts: Sequence[int],
    lora_A: Tensors,
    lora_B: Tensors,
    biases: Optionals,
    scalings: Sequence[float],
    dropout_p: float,
    seeds: torch.Tensor | None,
    activation: str,
    ops: Any = lora_qkv,
    gated: Callable[..., torch.Tensor] = gated,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """e, g = gate(x), up(x); y = down(act(e) * g), a block of rows at a time."""
    inner, (pieces, layouts) = _split_weights(pieces, layouts)
    (e, g), S = ops.lora_qkv_fwd(
        x, *inner, lora_A[:2], lora_B[:2], biases[:2], scalings[:2], dropout_p, _inner_seeds(seeds)
    )
    blocks = row_blocks(len(e), e.shape[1], e.element_size()) if seeds is None else [slice(None)]
    outer = as_pieces(unpack_weight(pieces, layouts, 0, x.dtype, forward=True).to(x.dtype))  # once for all blocks
    ys, parts = [], []
    for rows in blocks:
        (y,), S_down = ops.lora_qkv_fwd(
            gated(e[rows], g[rows], activation),
            *outer,
            lora_A[2:],
            lora_B[2:],
            biases[2:],
            scalings[2:],
            dropout_p,
            seed_of(seeds, 2),
        )
        ys.append(y)
        parts.append(S_down)
    del outer
    return _joined(ys), e, g, S, _joined(parts)


def lora_mlp_bwd(
    dy: torch.Tensor,
    x: torch.Tensor | None,
    e: torch.Tensor | None,
    g: torch.Tensor | None,
    pieces: Optionals,
    layouts: Sequence[int],
    lora_A: Tensors,
    lora_B: Tensors,
    S: torch.Tensor | None,
    S_down: torch.Tensor | None,
    seeds: torch.Tensor | None,
    scalings: Sequence[float],
    dropout_p: float,
    activation: str,
    need_dx: bool,
    need_dA: Sequence[bool],
    need_dB: Sequence[bool],
    need_dbias: Sequence[bool],
    ops: Any = lora_qkv,
    gated: Callable[..., torch.Tensor] = gated,
    gated_backward_: Callable[..., tuple[torch.Tensor, torch.Tensor]] = gated_backward_,
) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    """dh is down's dx; de = act'(e) * (dh * g) and dg = act(e) * dh are gate's and up's dy. h is made again for dA.

    dx is a sum over the chunks in its own dtype; dA of gate and up are sums in float32, or wider, rounded once.
    """
    chunks = [slice(None)]
    if seeds is None and e is not None:
        chunks = column_chunks(len(dy), e.shape[1], dy.element_size())
    whole = len(chunks) == 1
    inner_A = lora_A[:2]
    if not whole:
        pieces, layouts = take_kept(pieces, layouts, dy.dtype)
        inner_A = _widened(inner_A)
    inner, outer = _split_weights(pieces, layouts)
    wide = torch.promote_types(dy.dtype, torch.float32)
    need_inner = need_dx or any((*need_dA[:2], *need_dB[:2], *need_dbias[:2]))

    def bias_grads(grads: Sequence[torch.Tensor], needed: Sequence[bool]) -> list[torch.Tensor]:
        return [t.sum(0, dtype=wide) if need else t.new_empty(0, dtype=wide) for t, need in zip(grads, needed)]

    def backward(columns: slice, dx: torch.Tensor | None) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
        """dx of the chunks so far, and of this one every dA and dB, dbias of gate and up; dB of down of the first."""
        first = columns is chunks[0]
        e_c, g_c = (None if t is None else t[:, columns] for t in (e, g))
        h = None
        if need_dA[2]:
            assert e_c is not None
            assert g_c is not None
            h = gated(e_c, g_c, activation)
        dh, dA_down, dB_down = ops.lora_qkv_bwd(
            [dy],
            h,
            *(outer if whole else slice_weights(*outer, dy.dtype, columns=columns)),
            [lora_A[2][:, columns]],
            lora_B[2:],
            S_down,
            seed_of(seeds, 2),
            scalings[2:],
            dropout_p,
            need_inner,
            need_dA[2:],
            [need_dB[2] and first],
        )
        del h
        if need_inner:
            assert e_c is not None
            assert g_c is not None
            grads = gated_backward_(dh, e_c, g_c, activation)
        else:
            grads = dy, dy  # nothing reads them
        operands = (
            grads,
            x,
            *(inner if whole else slice_weights(*inner, dy.dtype, rows=columns)),
            inner_A,
            [B[columns] for B in lora_B[:2]],
            S,
            _inner_seeds(seeds),
            scalings[:2],
            dropout_p,
        )
        if need_dx and dx is not None:
            dA, dB = ops.lora_qkv_bwd_add(*operands, need_dA[:2], need_dB[:2], dx)
        else:
            dx, dA, dB = ops.lora_qkv_bwd(*operands, need_dx, need_dA[:2], need_dB[:2])
        return dx, [*dA, *dA_down, *dB, *dB_down, *bias_grads(grads, need_dbias[:2])]

    dx: torch.Tensor | None = None
    runs = []
    for columns in chunks:
        dx, own = backward(columns, dx)
        runs.append(own)
    assert dx is not None
    parts = list(zip(*runs))
    sums = [functools.reduce(torch.add, own).to(A.dtype) for own, A in zip(parts[:2], lora_A)]
    dB_gate, dB_up, dbias_gate, dbias_up = (_joined(parts[i]) for i in (3, 4, 6, 7))
    return (
        dx,
        [*sums, _joined(parts[2], dim=-1)],
        [dB_gate, dB_up, parts[5][0]],
        [dbias_gate, dbias_up, *bias_grads([dy], need_dbias[2:])],
    )


def column_chunks(M: int, I: int, itemsize: int) -> list[slice]:  # noqa: E741
    """All columns in chunks of nearly one size, BLOCK_BYTES or a little more of a matrix [M, I]."""
    return _cut(I, COLUMN_STEP, min(-(-M * I * itemsize // BLOCK_BYTES), I // CHUNK_COLUMNS))


def row_blocks(M: int, I: int, itemsize: int) -> list[slice]:  # noqa: E741
    """All rows in blocks of nearly one size, BLOCK_BYTES or a little more of a matrix [M, I]."""
    return _cut(M, ROW_STEP, min(-(-M * I * itemsize // BLOCK_BYTES), M // BLOCK_ROWS))


def _cut(size: int, step: int, count: int) -> list[slice]:
    """`count` parts of nearly one size that begin at multiples of `step`; one at least."""
    count, steps = max(1, count), -(-size // step)
    bounds = [i * steps // count * step for i in range(count)]
    return [slice(first, end) for first, end in zip(bounds, [*bounds[1:], size])]


def _joined(parts: Sequence[torch.Tensor], dim: int = 0) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(tuple(parts), dim)


def _widened(adapters: Tensors) -> list[torch.Tensor]:
    """In float32 or wider, as their gradients then are."""
    return [t.to(torch.promote_types(t.dtype, torch.float32)) for t in adapters]


def _split_weights(pieces: Optionals, layouts: Sequence[int]) -> tuple[_Weights, _Weights]:
    """(pieces, layouts) of gate and up, and of down."""
    return (
        (pieces[: 2 * PIECES], layouts[: 2 * LAYOUT]),
        (pieces[2 * PIECES :], layouts[2 * LAYOUT :]),
    )


def _inner_seeds(seeds: torch.Tensor | None) -> torch.Tensor | None:
    return None if seeds is None else seeds[:2]
