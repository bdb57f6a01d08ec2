"""PEFT's LoRA layers over dense or bitsandbytes 4-bit bases: as they are, under autocast, and compiled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.peers import Adapter, NotApplicable, Peer, Prepared
from benchmarks.peers.bitsandbytes import linear4bit, packs_on_cpu
from peftkern.ops._activations import activate
from peftkern.ops._projection import LoRAProjection
from peftkern.ops.nf4.weight import NF4Weight
from peftkern.testing.projections import projections

Forward = Callable[[torch.Tensor], Any]


@dataclass(frozen=True)
class Block:
    """PEFT's layers with our weights in them: `forward` of x, and what gets gradients."""

    forward: Forward
    leaves: tuple[torch.Tensor, ...]


Build = Callable[[dict[str, Any], torch.dtype], Block]  # our op's arguments, dtype of the adapters


def lora_layer(p: LoRAProjection, dtype: torch.dtype, adapter_dtype: torch.dtype, dropout: float) -> torch.nn.Module:
    """PEFT's layer with our weights in it, computing in `dtype`, in training mode when dropout is on."""
    import peft

    weight, bias = p.weight, p.bias
    holder = torch.nn.Module()
    if isinstance(weight, NF4Weight):
        holder.proj = linear4bit(weight, bias, dtype)
        holder.is_loaded_in_4bit = True  # what PEFT's dispatch looks at
    else:
        holder.proj = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
        holder.proj.weight = torch.nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            holder.proj.bias = torch.nn.Parameter(bias, requires_grad=False)
    layer = holder.proj
    if p.lora_A is not None and p.lora_B is not None:
        rank = p.lora_A.shape[0]
        config = peft.LoraConfig(
            r=rank, lora_alpha=float(p.scaling) * rank, lora_dropout=dropout, target_modules=["proj"]
        )
        layer = peft.get_peft_model(holder, config).base_model.model.proj
        layer.lora_A["default"].weight = torch.nn.Parameter(p.lora_A.detach().to(adapter_dtype))
        layer.lora_B["default"].weight = torch.nn.Parameter(p.lora_B.detach().to(adapter_dtype))
    layer.train(dropout > 0)
    if isinstance(weight, NF4Weight) and not packs_on_cpu(weight):
        getattr(layer, "base_layer", layer).train()
    return layer


def _leaves(x: torch.Tensor, *layers: Any) -> tuple[torch.Tensor, ...]:
    adapted = [layer for layer in layers if hasattr(layer, "lora_A")]
    return x, *(t["default"].weight for layer in adapted for t in (layer.lora_A, layer.lora_B))


def _linear(args: dict[str, Any], adapter_dtype: torch.dtype) -> Block:
    p = LoRAProjection(*(args[name] for name in ("weight", "lora_A", "lora_B", "scaling", "bias")))
    layer = lora_layer(p, args["x"].dtype, adapter_dtype, args["dropout_p"] if args["seed"] is not None else 0.0)
    return Block(layer, _leaves(args["x"], layer))


def _layers(args: dict[str, Any], adapter_dtype: torch.dtype) -> list[torch.nn.Module]:
    dropout = args["dropout_p"] if args["seeds"] is not None else 0.0
    return [lora_layer(p, args["x"].dtype, adapter_dtype, dropout) for p in projections(args)]


def _qkv(args: dict[str, Any], adapter_dtype: torch.dtype) -> Block:
    layers = _layers(args, adapter_dtype)
    return Block(lambda x: tuple(layer(x) for layer in layers), _leaves(args["x"], *layers))


def _mlp(args: dict[str, Any], adapter_dtype: torch.dtype) -> Block:
    layers, activation = _layers(args, adapter_dtype), args["activation"]
    gate, up, down = layers
    return Block(lambda x: down(activate(gate(x), activation) * up(x)), _leaves(args["x"], *layers))


def _plain(build: Build) -> Callable[[dict[str, Any]], Prepared]:
    def prepare(args: dict[str, Any]) -> Prepared:
        x = args["x"]
        block = build(args, x.dtype)
        return Prepared(lambda: block.forward(x), block.leaves)

    return prepare


def _autocast(build: Build) -> Callable[[dict[str, Any]], Prepared]:
    """Adapters in float32 under autocast: what PEFT's Trainer set-up does by default."""

    def prepare(args: dict[str, Any]) -> Prepared:
        x = args["x"]
        if x.dtype not in (torch.bfloat16, torch.float16):
            raise NotApplicable(f"autocast means nothing for {x.dtype}")
        block = build(args, torch.float32)

        def call() -> Any:
            with torch.autocast(x.device.type, dtype=x.dtype):
                return block.forward(x)

        return Prepared(call, block.leaves)

    return prepare


def _compiled(build: Build) -> Callable[[dict[str, Any]], Prepared]:
    def prepare(args: dict[str, Any]) -> Prepared:
        x = args["x"]
        block = build(args, x.dtype)
        compiled: Forward = torch.compile(block.forward)
        return Prepared(lambda: compiled(x), block.leaves)

    return prepare


def _arms(build: Build) -> dict[str, Adapter]:
    return {
        "": Adapter(_plain(build)),
        "autocast": Adapter(_autocast(build)),
        "compiled": Adapter(_compiled(build), graph=False, devices=("cuda",)),
    }


PEER = Peer(
    name="peft",
    module="peft",
    adapters={
        "lora_matmul": _arms(_linear),
        "lora_few_tokens": _arms(_linear),
        "lora_qkv": _arms(_qkv),
        "lora_mlp": _arms(_mlp),
    },
)
