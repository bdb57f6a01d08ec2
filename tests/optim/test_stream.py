"""The ring's order, on queues that run as late as their events allow, with a race detector."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peftkern.optim.stream import Lane, Pairs, Ring
from peftkern.testing.queues import Queues, RaceError

SIZE = 64


class Load:
    def __init__(self, home: torch.Tensor, slots: list[torch.Tensor]) -> None:
        self.home, self.slots = home, slots

    def pairs(self, slot: int) -> Pairs:
        half = SIZE // 2
        return [(self.home[:half], self.slots[slot][:half]), (self.home[half:], self.slots[slot][half:])]


def build(queues: Queues, count: int, slots: int) -> tuple[Ring, list[Load], list[torch.Tensor]]:
    memory = [queues.empty(SIZE) for _ in range(slots)]
    homes = [torch.full((SIZE,), i, dtype=torch.uint8) for i in range(count)]
    return Ring(queues, slots), [Load(home, memory) for home in homes], memory


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 4), st.integers(0, 10**6), st.sampled_from([0.0, 0.5, 0.95]), st.booleans())
def test_every_segment_is_updated_once_a_step(count: int, slots: int, seed: int, eager: float, changes: bool) -> None:
    """Also where other segments take part in each step, so that they come through other slots than before."""
    queues = Queues(seed, eager=eager)
    ring, loads, memory = build(queues, count, slots)
    expected = [load.home.clone() for load in loads]
    choose = random.Random(seed)

    def update(load: Load, slot: int) -> None:
        memory[slot].mul_(3).add_(1)

    for _ in range(6):
        chosen = [i for i in range(count) if not changes or choose.random() < 0.6]
        ring.run([loads[i] for i in chosen], update)
        for i in chosen:
            expected[i].mul_(3).add_(1)
        if choose.random() < 0.3:
            ring.settle()
            ring.forget()
            for load, value in zip(loads, expected):
                queues.read(load.home)
                assert torch.equal(load.home, value)
                load.home.add_(1)
                value.add_(1)
    ring.drain()
    for load, value in zip(loads, expected):
        queues.read(load.home)
        assert torch.equal(load.home, value)


def test_the_next_step_finds_its_first_segments_fetched() -> None:
    queues = Queues()
    ring, loads, _ = build(queues, 5, 3)
    ring.run(loads, lambda load, slot: None)
    assert queues.copied == {Lane.IN: (5 + 3) * SIZE, Lane.OUT: 5 * SIZE}
    ring.run(loads, lambda load, slot: None)
    assert queues.copied == {Lane.IN: (5 + 3 + 5) * SIZE, Lane.OUT: 10 * SIZE}


def test_what_was_fetched_ahead_and_came_another_way_is_fetched_again() -> None:
    queues = Queues()
    ring, loads, memory = build(queues, 2, 2)
    for chosen in (loads, loads[1:], loads):
        ring.run(chosen, lambda load, slot: memory[slot].add_(1))
    ring.settle()
    assert [int(load.home[0]) for load in loads] == [2, 4]


class Forgetful(Queues):
    """Queues that lose one kind of wait."""

    lane: Lane

    def wait(self, lane: Lane, event: object) -> None:
        if lane is not self.lane:
            super().wait(lane, event)  # type: ignore[arg-type]


@pytest.mark.parametrize("lane", list(Lane), ids=lambda lane: lane.value)
def test_each_kind_of_wait_is_needed(lane: Lane) -> None:
    queues = type("Lossy", (Forgetful,), {"lane": lane})()
    ring, loads, _ = build(queues, 5, 2)
    with pytest.raises(RaceError, match="not ordered"):
        ring.run(loads * 2, lambda load, slot: None)


def test_reading_the_host_before_settling_is_a_race() -> None:
    queues = Queues(eager=1.0)
    ring, loads, _ = build(queues, 2, 2)
    ring.run(loads, lambda load, slot: None)
    with pytest.raises(RaceError, match="the host reads"):
        queues.read(loads[1].home)
    ring.settle()
    queues.read(loads[1].home)
