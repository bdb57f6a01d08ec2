"""LoRA MLP in eager PyTorch over lora_qkv: the oracle, and the backend where nothing else is present.

gate and up are one lora_qkv of x, down is one of h. `ops` is where lora_qkv's forward and backward are taken from: its
reference, or the registered ops. `gated` and `gated_backward_` are what comes between, here or in Triton.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from peftkern.ops._activations import activate, activation_backward_
from peftkern.ops._projection import LAYOUT, PIECES, LoRAProjection
from peftkern.ops.lora_qkv import reference as lora_qkv
from peftkern.ops.lora_qkv.reference import Optionals, Tensors, apply_projection, seed_of


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
    """e, g = gate(x), up(x); y = down(act(e) * g)."""
    inner, outer = _split_weights(pieces, layouts)
    (e, g), S = ops.lora_qkv_fwd(
        x, *inner, lora_A[:2], lora_B[:2], biases[:2], scalings[:2], dropout_p, _inner_seeds(seeds)
    )
    h = gated(e, g, activation)
    (y,), S_down = ops.lora_qkv_fwd(
        h, *outer, lora_A[2:], lora_B[2:], biases[2:], scalings[2:], dropout_p, seed_of(seeds, 2)
    )
    return y, e, g, S, S_down


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
    """dh is down's dx; de = act'(e) * (dh * g) and dg = act(e) * dh are gate's and up's dy. h is made again for dA."""
    inner, outer = _split_weights(pieces, layouts)
    wide = torch.promote_types(dy.dtype, torch.float32)
    need_inner = need_dx or any((*need_dA[:2], *need_dB[:2], *need_dbias[:2]))

    def bias_gradients(grads: Tensors, needs: Sequence[bool]) -> list[torch.Tensor]:
        return [t.sum(0, dtype=wide) if need else t.new_empty(0, dtype=wide) for t, need in zip(grads, needs)]

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
    dbias = bias_gradients((*grads, dy), need_dbias)
    return dx, [*dA, *dA_down], [*dB, *dB_down], dbias


def _split_weights(pieces: Optionals, layouts: Sequence[int]) -> tuple[tuple, tuple]:
    """(pieces, layouts) of gate and up, and of down."""
    return (
        (pieces[: 2 * PIECES], layouts[: 2 * LAYOUT]),
        (pieces[2 * PIECES :], layouts[2 * LAYOUT :]),
    )


def _inner_seeds(seeds: torch.Tensor | None) -> torch.Tensor | None:
    return None if seeds is None else seeds[:2]
