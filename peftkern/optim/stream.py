"""The ring: states that live on the host pass through a few slots on the device while they are updated.

Three queues of one device run beside each other, IN and OUT (a copy engine each) and WORK (the current stream). For the
i-th segment, in slot i mod slots:

    IN    waits until the slot's last segment has left; copies in;    records `arrived`
    WORK  waits for `arrived`;                          updates;      records `updated`
    OUT   waits for `updated`;                          copies out;   records `left`

When the last update is queued, the first segments of the next step are fetched, each behind what leaves its slot. Every
slot that was used is fetched into then, and IN is in order: all that it does later is behind all that left before, and
a segment may come back through any slot. Nothing on WORK waits for OUT.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum
from functools import partial
from typing import Any, Protocol

import torch

Pairs = Sequence[tuple[torch.Tensor, torch.Tensor]]  # (on the host, on the device)


class Lane(Enum):
    IN = "in"
    OUT = "out"
    WORK = "work"


class Lanes(Protocol):
    """Queues of a device. All but `synchronize` returns at once; what a queue holds runs in order."""

    def event(self) -> Any: ...

    def record(self, event: Any, lane: Lane) -> None:
        """The event now stands for all that the lane holds so far."""

    def wait(self, lane: Lane, event: Any) -> None:
        """What the lane is given from now on runs after what the event stands for now."""

    def copy(self, lane: Lane, pairs: Pairs) -> None:
        """IN copies to the device, OUT to the host."""

    def work(self, function: Callable[[], None], memory: Sequence[torch.Tensor]) -> None:
        """Calls a function that puts kernels on WORK, whatever stream that is now. They use `memory`."""

    def synchronize(self, event: Any) -> None:
        """Lets the host wait for what the event stands for; at once if it stands for nothing yet."""


class Load(Protocol):
    """A segment, as the ring sees it."""

    def pairs(self, slot: int) -> Pairs:
        """Its bytes on the host, and where they go in a slot."""


class _Slot:
    def __init__(self, lanes: Lanes) -> None:
        self.arrived, self.updated, self.left = lanes.event(), lanes.event(), lanes.event()
        self.holds: Load | None = None  # fetched, and not updated since


class Ring:
    """Sends segments through slots. It owns the order of things, not the memory."""

    def __init__(self, lanes: Lanes, slots: int) -> None:
        self._lanes = lanes
        self._slots = [_Slot(lanes) for _ in range(slots)]

    def start(self, loads: Sequence[Load]) -> None:
        """Fetches the first segments, unless they are there or on their way."""
        for index, load in enumerate(loads[: len(self._slots)]):
            self._fetch(index, load)

    def run(self, loads: Sequence[Load], update: Callable[[Any, int], None]) -> None:
        """Calls `update(load, slot)` for all segments in order; afterwards fetches the first of the next step."""
        self.start(loads)
        try:
            self._run(loads, update)
        except BaseException:
            self.drain()
            self.forget()
            raise
        self.start(loads)

    def _run(self, loads: Sequence[Load], update: Callable[[Any, int], None]) -> None:
        count = len(self._slots)
        for index, load in enumerate(loads):
            number = index % count
            slot = self._slots[number]
            self._lanes.wait(Lane.WORK, slot.arrived)
            self._lanes.work(partial(update, load, number), [device for _, device in load.pairs(number)])
            self._lanes.record(slot.updated, Lane.WORK)
            slot.holds = None
            self._lanes.wait(Lane.OUT, slot.updated)
            self._lanes.copy(Lane.OUT, load.pairs(number))
            self._lanes.record(slot.left, Lane.OUT)
            if index + count < len(loads):
                self._fetch(number, loads[index + count])

    def forget(self) -> None:
        """What was fetched ahead is not used: what is on the host may have changed."""
        for slot in self._slots:
            slot.holds = None

    def settle(self) -> None:
        """Waits until all that was updated is on the host."""
        for slot in self._slots:
            self._lanes.synchronize(slot.left)

    def drain(self) -> None:
        """Waits until no copy is on its way: the memory of both sides may go."""
        self.settle()
        for slot in self._slots:
            self._lanes.synchronize(slot.arrived)

    def _fetch(self, number: int, load: Load) -> None:
        slot = self._slots[number]
        if slot.holds is load:
            return
        for other in self._slots:
            if other.holds is load:
                other.holds = None  # it is updated here, and would be out of date there
        self._lanes.wait(Lane.IN, slot.left)
        self._lanes.copy(Lane.IN, load.pairs(number))
        self._lanes.record(slot.arrived, Lane.IN)
        slot.holds = load
