"""Unsloth's LoRA kernels. It patches transformers, peft and bitsandbytes on import, so it runs in its own process."""

from __future__ import annotations

from typing import Any

from benchmarks.peers import Adapter, NotApplicable, Peer, Prepared
from benchmarks.peers.bitsandbytes import quant_state
from peftkern.ops.nf4.weight import NF4Weight


def _lora(args: dict[str, Any]) -> Prepared:
    if args["seed"] is not None:
        raise NotApplicable("its fused path has no dropout")
    if args["bias"] is not None:
        raise NotApplicable("its fused path has no bias")
    from unsloth.kernels.fast_lora import LoRA_W

    x, weight = args["x"], args["weight"]
    A, B, scaling = args["lora_A"], args["lora_B"], float(args["scaling"])
    state = None
    if isinstance(weight, NF4Weight):
        weight, state = weight.packed, quant_state(weight, x.dtype)
    x3d = x.view(1, *x.shape) if x.dim() == 2 else x  # its backward wants [batch, tokens, K]
    return Prepared(lambda: LoRA_W.apply(x3d, weight, state, A, B, scaling), (x, A, B))


PEER = Peer(
    name="unsloth",
    module="unsloth",
    adapters={"lora_matmul": {"": Adapter(_lora, graph=False, devices=("cuda",))}},
    own_process=True,
)
