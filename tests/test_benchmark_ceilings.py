"""Ceilings: read again after an op on a GPU, and not repeated for minutes on a slow CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import __main__ as cli
from benchmarks import ceilings, runner
from benchmarks.ceilings import Ceilings

CEILINGS = Ceilings(1e10, {"float32": 1e11})


def _settings(device: str) -> runner.Settings:
    return runner.Settings(torch.device(device), (torch.float32,), ("eager",))


def test_a_gpus_ceilings_are_measured_again_after_an_op(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli.ceilings, "measure", lambda device, dtypes: CEILINGS)
    document: dict[str, Any] = {}
    cli.add_drift(document, _settings("cpu"))
    assert document == {}
    cli.add_drift(document, _settings("cuda"))
    assert document == {"ceilings_after": {"copy_bytes_per_s": 1e10, "gemm_flops_per_s": CEILINGS.gemm_flops_per_s}}


def test_a_ceiling_that_takes_long_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "BUDGET_S", 0.0)
    count: list[int] = []
    ceilings._seconds(lambda: count.append(1), torch.device("cpu"))
    assert len(count) == 2  # one to warm up
