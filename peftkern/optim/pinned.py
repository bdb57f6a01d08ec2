"""Page-locked host memory that goes back to the system when its last tensor does.

torch's pinned allocator rounds sizes up to a power of two and keeps what it gets; here an anonymous mapping is
registered with the driver, and unregistered and unmapped with its last view.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import sys
from pathlib import Path
from typing import Any

import torch

_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every device
_USABLE = 0.9  # of the memory that is available: the system would rather kill a process than refuse it memory


class PinningError(RuntimeError):
    """Host memory cannot be page-locked; says why."""


class _Mapping(mmap.mmap):
    pinned = 0  # bytes, of all
    address = 0
    process = 0

    def __del__(self) -> None:
        if self.process == os.getpid() and not sys.is_finalizing():  # a forked child has no use of the driver
            _cudart().cudaHostUnregister(self.address)
            _Mapping.pinned -= len(self)


def pin(nbytes: int, device: torch.device) -> torch.Tensor:
    """`nbytes` of zeros, uint8, page-locked.

    Raises:
        PinningError: the system or the driver does not give so much.
    """
    available = available_memory()
    if available is not None and nbytes > available * _USABLE:
        raise PinningError(f"{nbytes} bytes are wanted and {available} available")
    try:
        mapping = _Mapping(-1, nbytes)
    except (OSError, ValueError, OverflowError) as error:
        raise PinningError(f"mapping {nbytes} bytes failed: {error}") from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):
            mapping.madvise(mmap.MADV_HUGEPAGE)  # fewer pages to lock
    memory = torch.frombuffer(mapping, dtype=torch.uint8)
    status = int(_cudart().cudaHostRegister(memory.data_ptr(), nbytes, _PORTABLE))
    if status:
        _clear_last_error(device)
        raise PinningError(f"cudaHostRegister of {nbytes} bytes failed with error {status}")
    mapping.address, mapping.process = memory.data_ptr(), os.getpid()
    _Mapping.pinned += nbytes
    return memory


def pinned_bytes() -> int:
    """What of `pin` is page-locked now."""
    return _Mapping.pinned


def available_memory() -> int | None:
    """Bytes of host memory that can still be used: what the system has, within the control group's limit."""
    limits = [_meminfo(_read("/proc/meminfo")), _cgroup(*(_read(f"/sys/fs/cgroup/memory.{f}") for f in _CGROUP_FILES))]
    known = [limit for limit in limits if limit is not None]
    return min(known) if known else None


_CGROUP_FILES = ("max", "current", "stat")


def _meminfo(text: str) -> int | None:
    for line in text.splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _cgroup(limit: str, current: str, stat: str) -> int | None:
    """Pages of files that were not used lately are counted as current, and are given back first."""
    if not limit.strip().isdigit() or not current.strip().isdigit():
        return None
    inactive = sum(int(line.split()[1]) for line in stat.splitlines() if line.startswith("inactive_file "))
    return max(0, int(limit) - int(current) + inactive)


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _cudart() -> Any:
    return torch.cuda.cudart()


def _clear_last_error(device: torch.device) -> None:
    """A failed registration would otherwise be reported by the next kernel launch."""
    with contextlib.suppress(RuntimeError):
        torch.empty(1, device=device).fill_(0)
