"""peftkern's own optimizer around its op: what `step()` costs from Python, every object of it read anew."""

from __future__ import annotations

from typing import Any

from benchmarks.peers import Adapter, Peer, Prepared
from benchmarks.peers.torch_baseline import hyper, parameters
from peftkern.optim import AdamW8bit


def _adamw8bit(args: dict[str, Any]) -> Prepared:
    return Prepared(AdamW8bit(parameters(args), **hyper(args)).step)


PEER = Peer(name="peftkern", module="peftkern", adapters={"adamw8bit": {"AdamW8bit": Adapter(_adamw8bit, graph=False)}})
