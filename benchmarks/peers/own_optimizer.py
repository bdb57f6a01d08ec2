"""More of peftkern's own: its optimizer around the op, that is what `step()` costs from Python, every object of it read
anew; and the op without its look at the gradients, which other fused kernels do not take either."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.peers import Adapter, Peer, Prepared
from benchmarks.peers.torch_baseline import hyper, parameters
from peftkern.ops.adamw8bit.function import adamw8bit_step_
from peftkern.optim import AdamW8bit


def _adamw8bit(args: dict[str, Any]) -> Prepared:
    return Prepared(AdamW8bit(parameters(args), **hyper(args)).step)


def _found_inf_given(args: dict[str, Any]) -> Prepared:
    found_inf = torch.zeros((), device=args["exp_avg_qmap"].device)
    return Prepared(lambda: adamw8bit_step_(**args, found_inf=found_inf))


PEER = Peer(
    name="peftkern",
    module="peftkern",
    adapters={
        "adamw8bit": {
            "AdamW8bit": Adapter(_adamw8bit, graph=False),
            "found_inf given": Adapter(_found_inf_given),
        }
    },
)
