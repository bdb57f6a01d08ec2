"""Fixtures of the tests of paging."""

from __future__ import annotations

import pytest
import torch
from paging_cases import SEGMENT, OnQueues

from peftkern.optim import PagedAdamW8bit, pages


@pytest.fixture
def small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "MIN_SEGMENT", SEGMENT)
    monkeypatch.setattr(pages, "MAX_SEGMENT", SEGMENT)


@pytest.fixture(params=[0, 1])
def paged(request: pytest.FixtureRequest, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> type:
    if device.type == "cuda":
        if request.param:
            pytest.skip("seeds are the queues'")
        return PagedAdamW8bit
    monkeypatch.setattr(OnQueues, "seed", request.param)
    return OnQueues
