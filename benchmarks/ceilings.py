"""What the device can do, measured at the start of each run: copy bandwidth and GEMM rate. Floors follow from them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch

COPY_BYTES = {"cpu": 128 << 20, "cuda": 2 << 30}
GEMM_SIZE = {"cpu": 2048, "cuda": 8192}
REPEATS = {"cpu": 5, "cuda": 15}
BUDGET_S = 5.0  # no further repeats after that: a CPU without bfloat16 units takes half a minute for one such GEMM


@dataclass(frozen=True)
class Ceilings:
    """Measured limits.

    Attributes:
        copy_bytes_per_s: of a large copy on the device, bytes read plus bytes written.
        gemm_flops_per_s: by dtype name, of a large square product through the vendor's library on random data.
    """

    copy_bytes_per_s: float
    gemm_flops_per_s: dict[str, float]

    def floor_us(self, nbytes: int, flops: int, dtype: torch.dtype) -> float:
        """The larger of the time for the bytes and the time for the FLOPs, in microseconds."""
        compute = flops / self.gemm_flops_per_s[dtype_name(dtype)] if flops else 0.0
        return max(nbytes / self.copy_bytes_per_s, compute) * 1e6


def dtype_name(dtype: torch.dtype) -> str:
    """torch.bfloat16 -> "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def measure(device: torch.device, dtypes: Iterable[torch.dtype]) -> Ceilings:
    """Measures both ceilings; takes well under a second on a GPU."""
    return Ceilings(_copy_rate(device), {dtype_name(dtype): _gemm_rate(device, dtype) for dtype in dtypes})


def _copy_rate(device: torch.device) -> float:
    source = torch.full((COPY_BYTES[device.type] // 2,), 1, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return COPY_BYTES[device.type] / _seconds(lambda: target.copy_(source), device)


def _gemm_rate(device: torch.device, dtype: torch.dtype) -> float:
    size = GEMM_SIZE[device.type]
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / _seconds(lambda: a @ b, device)


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    call()
    samples = []
    started = time.perf_counter()
    for _ in range(REPEATS[device.type]):
        if samples and time.perf_counter() - started > BUDGET_S:
            break
        if device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            end.record()
            torch.cuda.synchronize(device)
            samples.append(start.elapsed_time(end) / 1e3)
        else:
            begin = time.perf_counter()
            call()
            samples.append(time.perf_counter() - begin)
    # A shared host only ever slows a sample; a GPU's clock goes both ways.
    return float(np.median(samples)) if device.type == "cuda" else min(samples)
