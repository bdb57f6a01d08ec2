"""What paging needs of a device: three queues, memory on both sides, figures of its use. Here a CUDA device's."""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from peftkern.optim.pinned import pin
from peftkern.optim.stream import Lane, Lanes, Pairs


class Usage(NamedTuple):
    """Bytes of a device: what this process can have in all, and the most that its tensors took at a time."""

    capacity: int
    peak: int


class Device(Lanes, Protocol):
    """Lanes with memory."""

    def empty(self, nbytes: int) -> torch.Tensor:
        """Device memory, uint8. Copies must have ended when it is dropped; what is on WORK need not."""

    def pin(self, nbytes: int) -> torch.Tensor:
        """Zeros on the host that copies can run from and to.

        Raises:
            PinningError: there is none.
        """

    def capturing(self) -> bool:
        """Whether WORK is being captured into a graph."""

    def usage(self) -> Usage: ...


class CudaDevice:
    """A CUDA device, with one side stream for each direction: more of one direction share its copy engine."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._in, self._out = _side_streams(device)

    def event(self) -> torch.cuda.Event:
        return torch.cuda.Event()

    def record(self, event: torch.cuda.Event, lane: Lane) -> None:
        event.record(self._stream(lane))

    def wait(self, lane: Lane, event: torch.cuda.Event) -> None:
        self._stream(lane).wait_event(event)

    def copy(self, lane: Lane, pairs: Pairs) -> None:
        with torch.cuda.stream(self._stream(lane)):
            for host, device in pairs:
                target, source = (device, host) if lane is Lane.IN else (host, device)
                target.copy_(source, non_blocking=True)

    def work(self, function: Callable[[], None], memory: Sequence[torch.Tensor]) -> None:
        for tensor in memory:
            tensor.record_stream(self._stream(Lane.WORK))
        function()

    def synchronize(self, event: torch.cuda.Event) -> None:
        event.synchronize()

    def empty(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self._device)

    def pin(self, nbytes: int) -> torch.Tensor:
        return pin(nbytes, self._device)

    def capturing(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

    def usage(self) -> Usage:
        free, total = torch.cuda.mem_get_info(self._device)
        # Once, and as it is: torch's functions for one number each read and flatten all of them.
        stats = torch.cuda.memory_stats_as_nested_dict(self._device)
        capacity = free + stats["reserved_bytes"]["all"]["current"]
        fraction = getattr(torch.cuda, "get_per_process_memory_fraction", None)
        if fraction is not None:
            capacity = min(capacity, int(fraction(self._device) * total))
        return Usage(capacity, stats["allocated_bytes"]["all"]["peak"])

    def _stream(self, lane: Lane) -> torch.cuda.Stream:
        if lane is Lane.WORK:
            return torch.cuda.current_stream(self._device)
        return self._in if lane is Lane.IN else self._out


@functools.cache
def _side_streams(device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
    return torch.cuda.Stream(device), torch.cuda.Stream(device)


_listeners: weakref.WeakSet[Any] = weakref.WeakSet()


def on_out_of_memory(listener: Any) -> None:
    """Has `listener.out_of_memory(device_index)` called when torch's allocator is about to raise OutOfMemoryError.

    The listener is not kept alive. What it frees serves the next allocation: the one that failed raises all the same.
    """
    _attach()
    _listeners.add(listener)


@functools.cache
def _attach() -> None:
    attach = getattr(torch._C, "_cuda_attach_out_of_memory_observer", None)
    if attach is not None:
        attach(_tell)


def _tell(device: int, *_: Any) -> None:
    for listener in list(_listeners):
        try:
            listener.out_of_memory(device)
        except Exception as error:  # the allocator is in the middle of its own error
            warnings.warn(f"giving back device memory failed: {error}", RuntimeWarning, stacklevel=2)
