"""torchao: its 8-bit AdamW, compiled as it ships."""

from __future__ import annotations

from typing import Any

from benchmarks.peers import Adapter, Peer, Prepared
from benchmarks.peers.torch_baseline import hyper, parameters


def _adamw8bit(args: dict[str, Any]) -> Prepared:
    from torchao.optim import AdamW8bit

    return Prepared(AdamW8bit(parameters(args), block_size=256, **hyper(args)).step)


PEER = Peer(name="torchao", module="torchao", adapters={"adamw8bit": {"AdamW8bit": Adapter(_adamw8bit, graph=False)}})
