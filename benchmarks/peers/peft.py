"""PEFT's LoRA layer over a dense or a bitsandbytes 4-bit base: as it is, under autocast, and compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.peers import Adapter, NotApplicable, Peer, Prepared
from benchmarks.peers.bitsandbytes import linear4bit, packs_on_cpu
from peftkern.ops.nf4.weight import NF4Weight


def lora_layer(args: dict[str, Any], adapter_dtype: torch.dtype) -> torch.nn.Module:
    """PEFT's layer with our weights in it, in training mode when dropout is on."""
    import peft

    x, weight, bias = args["x"], args["weight"], args["bias"]
    holder = torch.nn.Module()
    if isinstance(weight, NF4Weight):
        holder.proj = linear4bit(weight, bias, x.dtype)
        holder.is_loaded_in_4bit = True  # what PEFT's dispatch looks at
    else:
        holder.proj = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
        holder.proj.weight = torch.nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            holder.proj.bias = torch.nn.Parameter(bias, requires_grad=False)
    rank = args["lora_A"].shape[0]
    dropout = args["dropout_p"] if args["seed"] is not None else 0.0
    config = peft.LoraConfig(
        r=rank, lora_alpha=float(args["scaling"]) * rank, lora_dropout=dropout, target_modules=["proj"]
    )
    layer = peft.get_peft_model(holder, config).base_model.model.proj
    layer.lora_A["default"].weight = torch.nn.Parameter(args["lora_A"].detach().to(adapter_dtype))
    layer.lora_B["default"].weight = torch.nn.Parameter(args["lora_B"].detach().to(adapter_dtype))
    layer.train(dropout > 0)
    if isinstance(weight, NF4Weight) and not packs_on_cpu(weight):
        layer.base_layer.train()
    return layer


def _leaves(layer: torch.nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return x, layer.lora_A["default"].weight, layer.lora_B["default"].weight  # type: ignore[index]


def _plain(args: dict[str, Any]) -> Prepared:
    x = args["x"]
    layer = lora_layer(args, x.dtype)
    return Prepared(lambda: layer(x), _leaves(layer, x))


def _autocast(args: dict[str, Any]) -> Prepared:
    """Adapters in float32 under autocast: what PEFT's Trainer set-up does by default."""
    x = args["x"]
    if x.dtype not in (torch.bfloat16, torch.float16):
        raise NotApplicable(f"autocast means nothing for {x.dtype}")
    layer = lora_layer(args, torch.float32)

    def call() -> torch.Tensor:
        with torch.autocast(x.device.type, dtype=x.dtype):
            return layer(x)

    return Prepared(call, _leaves(layer, x))


def _compiled(args: dict[str, Any]) -> Prepared:
    x = args["x"]
    layer = lora_layer(args, x.dtype)
    compiled: Callable[..., torch.Tensor] = torch.compile(layer)
    return Prepared(lambda: compiled(x), _leaves(layer, x))


PEER = Peer(
    name="peft",
    module="peft",
    adapters={
        "lora_matmul": {
            "": Adapter(_plain),
            "autocast": Adapter(_autocast),
            "compiled": Adapter(_compiled, graph=False, devices=("cuda",)),
        },
    },
)
