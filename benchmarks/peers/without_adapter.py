"""The frozen layer alone, by our own kernels: what is left over is what an adapter costs."""

from __future__ import annotations

from typing import Any

from benchmarks.peers import Adapter, Peer, Prepared
from peftkern.ops.nf4.function import nf4_matmul


def _nf4_matmul(args: dict[str, Any]) -> Prepared:
    x, weight, bias = args["x"], args["weight"], args["bias"]
    return Prepared(lambda: nf4_matmul(x, weight, bias))


PEER = Peer(name="without", module="peftkern", adapters={"lora_few_tokens": {"adapter": Adapter(_nf4_matmul)}})
