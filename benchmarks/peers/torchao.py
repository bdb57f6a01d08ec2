"""torchao: its 8-bit AdamW, compiled as it ships, and its optimizer that steps on the CPU."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.peers import Adapter, Peer, Prepared
from benchmarks.peers.torch_baseline import hyper, parameters


def _adamw8bit(args: dict[str, Any]) -> Prepared:
    from torchao.optim import AdamW8bit

    return Prepared(AdamW8bit(parameters(args), block_size=256, **hyper(args)).step)


def _offloaded(args: dict[str, Any]) -> Prepared:
    """torch's fused AdamW on copies in host memory. Gradients leave as backward makes them."""
    from torchao.optim import CPUOffloadOptimizer

    params = parameters(args)
    grads = [param.grad for param in params]
    optimizer = CPUOffloadOptimizer(params, torch.optim.AdamW, **hyper(args))

    def call() -> None:
        for param in params:
            param.grad = None
        torch.autograd.backward(params, grads)
        optimizer.step()

    return Prepared(call)


PEER = Peer(
    name="torchao",
    module="torchao",
    adapters={
        "adamw8bit": {"AdamW8bit": Adapter(_adamw8bit, graph=False)},
        "paged_adamw8bit": {"CPUOffloadOptimizer": Adapter(_offloaded, graph=False, devices=("cuda",))},
    },
)
