"""Peak memory: resident memory of the process on the CPU, allocated memory on the GPU."""

from __future__ import annotations

import contextlib
import resource
import sys
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def resident() -> int:
    """Bytes of memory this process holds now; 0 where the platform does not say."""
    return _status("VmRSS")


def reset_peak(device: torch.device) -> None:
    """Starts measuring afresh. On platforms without Linux's /proc the CPU's peak counts from the process's start."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError):
        _CLEAR.write_text("5")  # resets VmHWM, see proc_pid_clear_refs(5)


def peak(device: torch.device) -> int:
    """Most bytes since `reset_peak`: allocated by torch on a GPU, resident in the process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _status("VmHWM") or _rusage_peak()


def _status(key: str) -> int:
    try:
        for line in _STATUS.read_text().splitlines():
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def _rusage_peak() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def megabytes(size: int) -> str:
    """E.g. "812 MB", "4.2 GB"; decimal units."""
    return f"{size / 1e9:.1f} GB" if size >= 1e10 else f"{size / 1e6:.0f} MB"
