"""What a call launches on the GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def launches(call: Callable[[], Any]) -> list[str]:
    """Names of the kernels, copies and fills that `call` starts on the current CUDA device."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        call()
        torch.cuda.synchronize()
    events = recorded.events() or []
    return [event.name for event in events if event.device_type == torch.autograd.DeviceType.CUDA]


def can_count_launches() -> bool:
    """Whether the profiler sees kernels here; without the rights to trace it sees none."""
    if not torch.cuda.is_available():
        return False
    x = torch.ones(8, device="cuda")
    return len(launches(lambda: x.add_(1))) == 1
