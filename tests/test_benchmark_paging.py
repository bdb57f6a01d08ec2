"""The benchmark of paging, with small sizes."""

from __future__ import annotations

import pytest
import torch

from benchmarks import paging, report
from benchmarks.ceilings import Ceilings
from benchmarks.peers import Adapter, Peer, Prepared
from benchmarks.peers.torch_baseline import hyper, parameters
from benchmarks.runner import Settings


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("LARGE", {"67M": 1}), ("TRAINING_S", 0.02), ("CYCLES", 20), ("LINK_BYTES", 64 << 20)):
        monkeypatch.setattr(paging, name, value)
    settings = Settings(torch.device("cuda"), (torch.bfloat16,), ("eager",), budget_s=0.01)
    lines: list[str] = []
    other = Adapter(lambda args: Prepared(torch.optim.AdamW(parameters(args), **hyper(args)).step))
    peers = [Peer("torch", "torch", {paging.OP: {"AdamW": other}})]
    document = paging.run(settings, peers, Ceilings(1e12, {}), lines.append)
    assert document["checks"]["passed"]
    rows = document["measurements"]
    assert {row["case"] for row in rows} == {"67M", "LoRA set beside 300 ms"}
    assert {row["arm"] for row in rows if row["case"] == "67M"} == {"peftkern", "AdamW8bit", "torch AdamW"}
    assert all(row["median_us"] > 0 for row in rows)
    assert any("link" in line for line in report.terminal(document))
    assert report.table(document)
