"""The jobs of a persistent GEMM launch: each is somebody's, once, and all blocks end together."""

from __future__ import annotations

import heapq
from collections import defaultdict
from typing import NamedTuple

import pytest

_host = pytest.importorskip("peftkern._host")

PROJECT, MAIN, GRADIENT_B, GRADIENT_A = range(1, 5)
SHAPES = [(4096, 4096), (11008, 4096), (4096, 11008), (8, 520), (776, 1288), (1024, 2056), (1000, 8200)]


class Job(NamedTuple):
    kind: int
    tile: int
    other: int
    first: int
    steps: int
    slot: int
    earlier: int


def tiles(size: int, of: int) -> range:
    return range(-(-size // of))


def jobs_of(*problem, **options):
    jobs, *rest = _host.gemm_jobs(*problem, **options)
    return [Job(*job) for job in jobs], *rest


def slots_of(jobs) -> list[list[Job]]:
    slots = defaultdict(list)
    for job in jobs:
        if job.slot >= 0:
            slots[job.slot].append(job)
    assert sorted(slots) == list(range(len(slots)))
    return [slots[slot] for slot in range(len(slots))]


@pytest.mark.parametrize("cut", [-1, 0, 1])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("blocks", [1, 2, 7, 78, 132, 150])
@pytest.mark.parametrize(
    "needs", [(1, 1, 1), (1, 1, 0), (1, 0, 1), (0, 1, 1), (0, 0, 1), (0, 1, 0), (1, 0, 0)], ids=str
)
@pytest.mark.parametrize("M", [1, 128, 1024, 1300, 2049, 8192, 20_000])
@pytest.mark.parametrize(("N", "K"), SHAPES)
def test_every_job_is_taken_once(N, K, M, needs, blocks, masked, cut):
    """Of a backward pass; without dx and dA there is nothing to project."""
    dx, dA, dB = needs
    project = bool(dx or dA)
    jobs, parts, started, *_ = jobs_of(M, K * dx, N, project, N * dB, K * dA, blocks, masked, cut=cut)
    expected = [(PROJECT, t, 0) for t in tiles(M * project, 128)]
    expected += [(GRADIENT_B, f, part) for f in tiles(N * dB, 128) for part in range(parts)]
    expected += [(GRADIENT_A, f, part) for f in tiles(K * dA, 128) for part in range(parts)]
    assert sorted(job[:3] for job in jobs if job.kind != MAIN) == sorted(expected)
    pieces = defaultdict(list)
    for job in jobs:
        if job.kind == MAIN:
            pieces[job.tile, job.other].append((job.first, job.first + job.steps))
    assert set(pieces) == {(t, out) for t in tiles(M, 128) for out in tiles(K * dx, 256)}
    for piece in pieces.values():
        ends = [0, *(end for _, end in sorted(piece))]
        assert ends == [*(first for first, _ in sorted(piece)), len(tiles(N, 64))]
    assert 1 <= started <= min(blocks, len(jobs))
    assert 1 <= parts <= 4


@pytest.mark.parametrize("blocks", [7, 78, 132])
@pytest.mark.parametrize("M", [128, 1024, 1300, 2049, 8192, 20_000])
@pytest.mark.parametrize(("N", "K"), SHAPES)
def test_slots_wait_for_earlier_ones_only(N, K, M, blocks):
    jobs, *_ = jobs_of(M, K, N, True, N, K, blocks, cut=1)
    slots, steps = slots_of(jobs), len(tiles(N, 64))
    assert len(slots) <= blocks
    left = {}
    for number, slot in enumerate(slots):
        leaving = [job for job in slot if job.earlier < 0]
        assert len(leaving) <= 1, "what a slot leaves has one place"
        for job in slot:
            added = [left[earlier] for earlier in range(number - max(job.earlier, 0), number)]
            if job.earlier < 0:
                assert job.first + job.steps < steps
                left[number] = job
                continue
            assert job.first + job.steps == steps
            assert all((other.tile, other.other) == (job.tile, job.other) for other in added)
            assert sum(other.steps for other in added) == job.first
    for job in (job for slot in slots for job in slot):
        assert job.steps > 3, "a step that costs less than its sums"


def simulated(M, outs, depth, backward, masked, cut, blocks=132):
    """In main tiles, by times measured on an H100: when the last block ends, and if jobs could be cut at will."""
    features = (depth, outs) if backward else (0, 0)
    jobs, _, started, projecting, skinny = jobs_of(M, outs, depth, True, *features, blocks, masked, cut=cut)
    steps, tokens = len(tiles(depth, 64)), len(tiles(M, 128))
    part = -(-tokens // min(-(-M // 2048), 4))
    projects = [(job,) for job in jobs if job.kind == PROJECT]
    gradients = [(job,) for job in jobs if job.kind in (GRADIENT_A, GRADIENT_B)]
    mains = [(job,) for job in jobs if job.kind == MAIN and job.slot < 0] + slots_of(jobs)
    project_time = (0.82 if masked and not backward else 0.5) * steps
    gradient_time = {GRADIENT_B: 1.16 * part, GRADIENT_A: (1.68 if masked else 1.16) * part}
    left, ends = {}, [0.0] * started

    def end_of(work, at, together):
        for job in work:
            if job.kind == PROJECT:
                at += project_time
            elif job.kind != MAIN:
                at += gradient_time[job.kind] * (1.9 if together else 1)  # bound by memory
            elif job.earlier < 0:
                at += job.steps + 4
                left[job.slot] = at
            else:
                at = max(at + job.steps + 1, (job.tile // projecting + 1) * project_time)
                at = max([at, *(left[job.slot - i] for i in range(1, job.earlier + 1))]) + 4 * job.earlier
        return at

    queues = [iter(projects), iter(mains), iter(gradients)]
    # Draws are in the order of time, so that whoever is waited for has drawn before.
    heap = [(0.0, block) for block in range(started)]
    turns = [0 if block < projecting else 1 for block in range(started)]
    while heap:
        at, block = heapq.heappop(heap)
        order = (0, 2, 1) if block < skinny else (0, 1, 2)
        while turns[block] < 3:
            work = next(queues[order[turns[block]]], None)
            if work is not None:
                ends[block] = end_of(work, at, turns[block] == 2)
                heapq.heappush(heap, (ends[block], block))
                break
            turns[block] += 1
    total = len(tiles(outs, 256)) * tokens * (steps + 1)
    total += len(projects) * project_time + sum(gradient_time[job.kind] for (job,) in gradients)
    return max(ends) / steps, total / blocks / steps


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("M", [1024, 1300, 2048, 4096, 8192, 16384])
@pytest.mark.parametrize(
    ("N", "K"), [(4096, 4096), (11008, 4096), (4096, 11008), (2048, 5120), (14336, 4096), (28672, 8192)]
)
def test_cuts_never_take_longer(N, K, M, masked):
    for outs, depth, backward in ((N, K, False), (K, N, True)):
        whole, _ = simulated(M, outs, depth, backward, masked, 0)
        chosen, best = simulated(M, outs, depth, backward, masked, -1)
        lump = (
            20 * -(-M // 8192) / len(tiles(depth, 64)) if backward else 0
        )  # a gradient: which block gets the last one
        assert chosen < whole + 0.1 + lump / 2, (outs, depth, backward)
        if M >= 4096 and not (masked and backward):
            assert chosen < best + 0.35 + lump, (outs, depth, backward)
