"""Unsloth's LoRA kernels. It patches transformers, peft and bitsandbytes on import, so it runs in its own process.

Its adapters carry a bias, its bases none. In a training step it writes dx into x by default; a call that is repeated on
the same x cannot, so here it makes a tensor of its own, of x's size, as ours does.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.peers import Adapter, NotApplicable, Peer, Prepared
from benchmarks.peers.bitsandbytes import quant_state
from peftkern.ops._projection import LoRAProjection
from peftkern.ops.nf4.weight import NF4Weight
from peftkern.testing.projections import projections


def _projection(p: LoRAProjection, dtype: torch.dtype) -> tuple[Any, ...]:
    """Weight, quant state, A, B and scaling, as its functions take them."""
    if p.bias is not None:
        raise NotApplicable("its fused path has no bias of the base")
    if p.lora_A is None or p.lora_B is None:
        raise NotApplicable("its fused path has no projection without an adapter")
    if isinstance(p.weight, NF4Weight):
        return p.weight.packed, quant_state(p.weight, dtype), p.lora_A, p.lora_B, float(p.scaling)
    return p.weight, None, p.lora_A, p.lora_B, float(p.scaling)


def _batched(x: torch.Tensor) -> torch.Tensor:
    return x.view(1, *x.shape) if x.dim() == 2 else x  # its backward wants [batch, tokens, K]


def _linear(args: dict[str, Any]) -> Prepared:
    x, p = args["x"], LoRAProjection(*(args[name] for name in ("weight", "lora_A", "lora_B", "scaling", "bias")))
    projection, dropout = _projection(p, x.dtype), None if args["seed"] is None else args["dropout_p"]
    from unsloth.kernels.fast_lora import LoRA_W

    x3d = _batched(x)
    return Prepared(lambda: LoRA_W.apply(x3d, *projection, dropout), (x, args["lora_A"], args["lora_B"]))


def _group(args: dict[str, Any]) -> tuple[torch.Tensor, tuple[Any, ...], tuple[float, ...] | None, tuple[Any, ...]]:
    """x [batch, tokens, K], the three projections' arguments, the dropout, and what gets gradients."""
    x, group = args["x"], projections(args)
    if len(group) != 3:
        raise NotApplicable(f"its fused path has three projections, not {len(group)}")
    flat = tuple(argument for p in group for argument in _projection(p, x.dtype))
    dropout = None if args["seeds"] is None else (args["dropout_p"],) * 3
    return _batched(x), flat, dropout, (x, *(t for p in group for t in (p.lora_A, p.lora_B)))


def _qkv(args: dict[str, Any]) -> Prepared:
    x, flat, dropout, leaves = _group(args)
    from unsloth.kernels.fast_lora import LoRA_QKV

    return Prepared(lambda: LoRA_QKV.apply(x, *flat, False, dropout), leaves)


def _mlp(args: dict[str, Any]) -> Prepared:
    x, flat, dropout, leaves = _group(args)
    from unsloth.kernels import geglu, swiglu
    from unsloth.kernels.fast_lora import LoRA_MLP

    forward, backward = {
        "silu": (swiglu.swiglu_fg_kernel, swiglu.swiglu_DWf_DW_dfg_kernel),
        "gelu": (geglu.geglu_exact_forward_kernel, geglu.geglu_exact_backward_kernel),
        "gelu_tanh": (geglu.geglu_approx_forward_kernel, geglu.geglu_approx_backward_kernel),
    }[args["activation"]]
    return Prepared(lambda: LoRA_MLP.apply(x, *flat, forward, backward, False, dropout), leaves)


def _arm(prepare: Any) -> dict[str, Adapter]:
    return {"": Adapter(prepare, graph=False, devices=("cuda",))}


PEER = Peer(
    name="unsloth",
    module="unsloth",
    adapters={"lora_matmul": _arm(_linear), "lora_qkv": _arm(_qkv), "lora_mlp": _arm(_mlp)},
    own_process=True,
)
