"""A device for paging that needs none: queues on the CPU that run late, in any order that their events allow.

Copies happen in halves, at random moments between being queued and being waited for. Beside that every access is
checked as a race detector does: two that overlap, one of them writing, must be ordered by queues and events, or by the
host having waited in between.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from peftkern.optim.device import Usage
from peftkern.optim.pinned import PinningError
from peftkern.optim.stream import Lane, Pairs

Clock = dict[Lane, int]
Span = tuple[int, int]  # addresses


class RaceError(AssertionError):
    """Two accesses of the same bytes that nothing orders."""


@dataclass
class Event:
    clock: Clock = field(default_factory=dict)


@dataclass
class _Access:
    lane: Lane
    number: int
    span: Span
    writes: bool
    what: str


class Queues:
    """Lanes of no device. Memory on either side is the CPU's."""

    def __init__(self, seed: int = 0, capacity: int = 1 << 40, host: int = 1 << 40, eager: float = 0.3) -> None:
        """
        Args:
            capacity: bytes that the device claims to have.
            host: bytes of pinned memory that there are.
            eager: how much of what could run does so at once; the rest waits until it must.
        """
        self.capacity, self.peak, self.host = capacity, 0, host
        self.is_capturing = False
        self.copied = {Lane.IN: 0, Lane.OUT: 0}
        self._random, self._eager = random.Random(seed), eager
        self._queues: dict[Lane, list[Callable[[], None] | Clock]] = {lane: [] for lane in Lane}
        self._given: Clock = dict.fromkeys(Lane, 0)
        self._done: Clock = dict.fromkeys(Lane, 0)
        self._clocks: dict[Lane, Clock] = {lane: {} for lane in Lane}
        self._host_clock: Clock = {}
        self._accesses: list[_Access] = []

    def event(self) -> Event:
        return Event()

    def record(self, event: Event, lane: Lane) -> None:
        event.clock = self._clocks[lane] | {lane: self._given[lane]}

    def wait(self, lane: Lane, event: Event) -> None:
        if event.clock:
            self._queues[lane].append(dict(event.clock))
            self._given[lane] += 1
            _merge(self._clocks[lane], event.clock)

    def copy(self, lane: Lane, pairs: Pairs) -> None:
        for host, device in pairs:
            target, source = (device, host) if lane is Lane.IN else (host, device)
            assert (target.dtype, target.shape) == (source.dtype, source.shape)
            self.copied[lane] += source.numel() * source.element_size()
            middle = self._random.randrange(source.numel() + 1)
            for half in (slice(0, middle), slice(middle, None)):
                self._give(lane, _copy(target[half], source[half]))
            self._check(lane, source, False, f"copy {lane.value}")
            self._check(lane, target, True, f"copy {lane.value}")
        self._run_some()

    def work(self, function: Callable[[], None], memory: Sequence[torch.Tensor]) -> None:
        self._give(Lane.WORK, function)
        for tensor in memory:
            self._check(Lane.WORK, tensor, True, "update")
        self._run_until({Lane.WORK: self._given[Lane.WORK]})

    def synchronize(self, event: Event) -> None:
        self._run_until(event.clock)
        _merge(self._host_clock, event.clock)

    def empty(self, nbytes: int) -> torch.Tensor:
        return torch.full((nbytes,), 0xA5, dtype=torch.uint8)

    def pin(self, nbytes: int) -> torch.Tensor:
        if nbytes > self.host:
            raise PinningError(f"{nbytes} bytes are wanted and {self.host} available")
        self.host -= nbytes
        return torch.zeros(nbytes, dtype=torch.uint8)

    def capturing(self) -> bool:
        return self.is_capturing

    def usage(self) -> Usage:
        return Usage(self.capacity, self.peak)

    def touch(self, memory: Sequence[torch.Tensor]) -> None:
        """WORK updates the memory, and has done so when this returns."""
        self._given[Lane.WORK] += 1
        self._done[Lane.WORK] += 1
        for tensor in memory:
            self._check(Lane.WORK, tensor, True, "update")

    def pending(self) -> int:
        """How much the host has not waited for, of what was queued to be copied."""
        return sum(
            self._given[lane] - self._host_clock.get(lane, 0) for lane in (Lane.IN, Lane.OUT) if self.copied[lane]
        )

    def read(self, tensor: torch.Tensor) -> None:
        """The host looks at the tensor: no copy of it may be under way."""
        for access in self._overlapping(tensor):
            if access.writes and access.number > self._host_clock.get(access.lane, 0):
                raise RaceError(f"the host reads what a {access.what} may still write")

    def _give(self, lane: Lane, function: Callable[[], None]) -> None:
        self._queues[lane].append(function)
        self._given[lane] += 1

    def _check(self, lane: Lane, tensor: torch.Tensor, writes: bool, what: str) -> None:
        """Against all earlier accesses that overlap; those that this one is ordered behind and covers are dropped."""
        clock = _merged(self._clocks[lane], self._host_clock)
        new = _Access(lane, self._given[lane], _span(tensor), writes, what)
        for old in self._overlapping(tensor):
            ordered = old.lane is lane or old.number <= clock.get(old.lane, 0)
            if (old.writes or writes) and not ordered:
                raise RaceError(f"a {what} and an earlier {old.what} of the same bytes are not ordered")
            if writes and ordered and new.span[0] <= old.span[0] and old.span[1] <= new.span[1]:
                self._accesses.remove(old)
        self._accesses.append(new)

    def _overlapping(self, tensor: torch.Tensor) -> list[_Access]:
        begin, end = _span(tensor)
        return [access for access in self._accesses if access.span[0] < end and begin < access.span[1]]

    def _run_some(self) -> None:
        while self._random.random() < self._eager and self._run_one():
            pass

    def _run_until(self, clock: Clock) -> None:
        while any(self._done[lane] < count for lane, count in clock.items()):
            assert self._run_one(), "the queues wait for each other"

    def _run_one(self) -> bool:
        ready = [lane for lane, queue in self._queues.items() if queue and self._may_run(queue[0])]
        if not ready:
            return False
        lane = self._random.choice(ready)
        item = self._queues[lane].pop(0)
        if not isinstance(item, dict):
            item()
        self._done[lane] += 1
        return True

    def _may_run(self, item: Callable[[], None] | Clock) -> bool:
        return not isinstance(item, dict) or all(self._done[lane] >= count for lane, count in item.items())


def _copy(target: torch.Tensor, source: torch.Tensor) -> Callable[[], None]:
    def run() -> None:
        target.copy_(source)

    return run


def _span(tensor: torch.Tensor) -> Span:
    return tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size()


def _merge(clock: Clock, other: Clock) -> None:
    for lane, count in other.items():
        clock[lane] = max(clock.get(lane, 0), count)


def _merged(clock: Clock, other: Clock) -> Clock:
    both = dict(clock)
    _merge(both, other)
    return both
