"""LoRA MLP in eager PyTorch over lora_qkv: the oracle, and the backend where nothing else is present.

gate and up are one lora_qkv of x, down is one of h. `ops` is where lora_qkv's forward and backward are taken from: its
reference, or the registered ops. `gated` and `gated_backward_` are what comes between, here or in Triton.

Of the inner width only e and g are held whole; h, dh and dg are made for a block of rows at a time. Rows meet only in
dA, dB and dbias, which are sums. With dropout all rows are one block: a mask counts from its op's first row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from peftkern.ops._activations import activate, activation_backward_
from peftkern.ops._projection import LAYOUT, PIECES, LoRAProjection, as_pieces, unpack_weight
from peftkern.ops.lora_qkv import reference as lora_qkv
from peftkern.ops.lora_qkv.reference import Optionals, Tensors, apply_projection, seed_of

BLOCK_BYTES = 48 << 20  # of one matrix [rows, I]; the backward holds two of them
BLOCK_ROWS = 1024  # at least: the CUDA kernel of lora_matmul takes no fewer
ROW_STEP = 128  # blocks begin at multiples of a GEMM's tile
DECODED_BLOCKS = 3  # at most, where a block of the backward makes its weights dense again


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

    The gradients of adapters and biases are summed over the blocks in float32, or wider, and rounded once.
    """
    inner, outer = _split_weights(pieces, layouts)
    wide = torch.promote_types(dy.dtype, torch.float32)
    need_inner = need_dx or any((*need_dA[:2], *need_dB[:2], *need_dbias[:2]))
    blocks = [slice(None)]
    if seeds is None:
        decoded = any(weight is not None and weight.dtype != dy.dtype for weight in pieces[::PIECES])
        blocks = row_blocks(len(dy), lora_A[2].shape[1], dy.element_size(), most=DECODED_BLOCKS if decoded else None)
    dtypes = [t.dtype for t in (*lora_A, *lora_B)]
    if len(blocks) > 1:
        lora_A, lora_B = _widened(lora_A), _widened(lora_B)

    def backward(
        dy: torch.Tensor,
        x: torch.Tensor | None,
        e: torch.Tensor | None,
        g: torch.Tensor | None,
        S: torch.Tensor | None,
        S_down: torch.Tensor | None,
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """dx of some rows, and what they add to every dA, dB and dbias."""
        h = None
        if need_dA[2]:
            assert e is not None
            assert g is not None
            h = gated(e, g, activation)
        dh, dA_down, dB_down = ops.lora_qkv_bwd(
            [dy],
            h,
            *outer,
            lora_A[2:],
            lora_B[2:],
            S_down,
            seed_of(seeds, 2),
            scalings[2:],
            dropout_p,
            need_inner,
            need_dA[2:],
            need_dB[2:],
        )
        del h
        if need_inner:
            assert e is not None
            assert g is not None
            grads = gated_backward_(dh, e, g, activation)
        else:
            grads = dy, dy  # nothing reads them
        dx, dA, dB = ops.lora_qkv_bwd(
            grads,
            x,
            *inner,
            lora_A[:2],
            lora_B[:2],
            S,
            _inner_seeds(seeds),
            scalings[:2],
            dropout_p,
            need_dx,
            need_dA[:2],
            need_dB[:2],
        )
        dbias = [t.sum(0, dtype=wide) if n else t.new_empty(0, dtype=wide) for t, n in zip((*grads, dy), need_dbias)]
        return dx, [*dA, *dA_down, *dB, *dB_down, *dbias]

    dxs: list[torch.Tensor] = []
    sums: list[torch.Tensor] = []
    for rows in blocks:
        dx, parts = backward(dy[rows], *(None if t is None else t[rows] for t in (x, e, g, S, S_down)))
        dxs.append(dx)
        sums = [total.add_(part) for total, part in zip(sums, parts)] if sums else parts
    grads = [total.to(dtype) for total, dtype in zip(sums, dtypes)]
    return _joined(dxs), grads[:3], grads[3:], sums[6:]


def row_blocks(M: int, I: int, itemsize: int, most: int | None = None) -> list[slice]:  # noqa: E741
    """All rows in at most `most` blocks of nearly one size, BLOCK_BYTES or a little more of a matrix [M, I]."""
    count = max(1, min(-(-M * I * itemsize // BLOCK_BYTES), M // BLOCK_ROWS, M if most is None else most))
    steps = -(-M // ROW_STEP)
    bounds = [i * steps // count * ROW_STEP for i in range(count)]
    return [slice(first, end) for first, end in zip(bounds, [*bounds[1:], M])]


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _widened(adapters: Tensors) -> list[torch.Tensor]:
    """In float32 or wider, as their gradients then are."""
    return [t.to(torch.promote_types(t.dtype, torch.float32)) for t in adapters]


def _split_weights(pieces: Optionals, layouts: Sequence[int]) -> tuple[tuple, tuple]:
    """(pieces, layouts) of gate and up, and of down."""
    return (
        (pieces[: 2 * PIECES], layouts[: 2 * LAYOUT]),
        (pieces[2 * PIECES :], layouts[2 * LAYOUT :]),
    )


def _inner_seeds(seeds: torch.Tensor | None) -> torch.Tensor | None:
    return None if seeds is None else seeds[:2]
