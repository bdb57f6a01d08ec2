"""Pages of optimizer state: how they are laid out, which stay on the device, how they are cut for the way there. Pure.

A page holds the states of whole parameters, small ones pooled, a large one alone, and lies in one memory: the device's
or the host's. It is a buffer per dtype (torch.save refuses views of several dtypes of one) with a plane per state
tensor:

    8-bit    exp_avg codes | exp_avg_sq codes,   exp_avg_absmax | exp_avg_sq_absmax
    32-bit   exp_avg | exp_avg_sq

A parameter takes a run of whole blocks, the same in every plane, so that each of its state tensors is one contiguous
view. What goes to the device at a time is a segment: a run of blocks of one page. A segment that is a whole page is one
copy per buffer, another one per plane; in its slot of the ring it has the layout of a page of its size.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from peftkern.optim.state import MOMENTS, SCALES

SLOTS = 4  # one on its way in, one being updated, one on its way out, one between them
MIN_SEGMENT, MAX_SEGMENT = 1 << 20, 32 << 20
SEGMENTS = 16  # of a step, where that is between the bounds: filling and draining the ring costs one each
PLANE_ALIGNMENT = 512
BLOCK_32BIT = 64  # 32-bit states have no blocks; this aligns them
MIN_HEADROOM, MAX_HEADROOM = 256 << 20, 2 << 30


Memory = tuple[torch.Tensor, ...]  # buffers of bytes


class Plane(NamedTuple):
    """One state tensor's part of every block."""

    name: str
    dtype: torch.dtype
    per_block: int


@dataclass(frozen=True)
class Kind:
    """What the states of one page have in common."""

    quantized: bool
    blocksize: int

    def planes(self) -> tuple[Plane, ...]:
        codes = torch.uint8 if self.quantized else torch.float32
        planes = [Plane(name, codes, self.blocksize) for name in MOMENTS]
        scales = [Plane(name, torch.float32, 1) for name in SCALES] if self.quantized else []
        return (*planes, *scales)

    def blocks(self, numel: int) -> int:
        return -(-numel // self.blocksize)

    def bytes_per_block(self) -> int:
        return sum(plane.dtype.itemsize * plane.per_block for plane in self.planes())

    def buffers(self, blocks: int) -> tuple[int, ...]:
        """Bytes of each buffer of a page or slot of so many blocks."""
        sizes: dict[torch.dtype, int] = {}
        for plane in self.planes():
            size = _aligned(plane.dtype.itemsize * plane.per_block * blocks)
            sizes[plane.dtype] = sizes.get(plane.dtype, 0) + size
        return tuple(sizes.values())

    def nbytes(self, blocks: int) -> int:
        return sum(self.buffers(blocks))

    def carve(self, memory: Memory, blocks: int) -> dict[str, torch.Tensor]:
        """The planes of a page of `blocks` blocks, as flat views of its buffers' bytes."""
        views = {}
        offsets = dict.fromkeys((plane.dtype for plane in self.planes()), 0)
        buffers = dict(zip(offsets, memory))
        for plane in self.planes():
            begin, size = offsets[plane.dtype], plane.dtype.itemsize * plane.per_block * blocks
            views[plane.name] = buffers[plane.dtype][begin : begin + size].view(plane.dtype)
            offsets[plane.dtype] += _aligned(size)
        return views


class Part(NamedTuple):
    """Elements [begin, end) of a page's parameter; `block` is where they start in their segment."""

    member: int
    begin: int
    end: int
    block: int


class Segment(NamedTuple):
    """Blocks [first, first + blocks) of a page."""

    first: int
    blocks: int
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Layout:
    """Where a page's parameters lie: each from block `starts[i]` on."""

    kind: Kind
    numels: tuple[int, ...]

    @property
    def starts(self) -> tuple[int, ...]:
        return tuple(itertools.accumulate((self.kind.blocks(n) for n in self.numels[:-1]), initial=0))

    @property
    def blocks(self) -> int:
        return sum(self.kind.blocks(n) for n in self.numels)

    @property
    def buffers(self) -> tuple[int, ...]:
        return self.kind.buffers(self.blocks)

    @property
    def nbytes(self) -> int:
        return sum(self.buffers)

    def members(self, memory: Memory) -> list[dict[str, torch.Tensor]]:
        """Each parameter's state tensors, as flat views of the page's buffers."""
        planes = self.kind.carve(memory, self.blocks)
        return [take(self.kind, planes, start, numel) for start, numel in zip(self.starts, self.numels)]

    def segments(self, nbytes: int) -> list[Segment]:
        """Cuts the page into segments of about one size, at most `nbytes`, and at least a block."""
        step = max(1, self.blocks)
        if self.nbytes > nbytes:
            most = max(1, nbytes // self.kind.bytes_per_block())
            step = -(-self.blocks // -(-self.blocks // most))
        size, starts = self.kind.blocksize, self.starts
        cut, member = [], 0
        for first in range(0, self.blocks, step):
            blocks = min(step, self.blocks - first)
            parts = []
            while member < len(self.numels) and starts[member] < first + blocks:
                begin = max(0, first - starts[member]) * size
                end = min(self.numels[member], (first + blocks - starts[member]) * size)
                if begin < end:
                    parts.append(Part(member, begin, end, starts[member] + begin // size - first))
                if starts[member] + self.kind.blocks(self.numels[member]) > first + blocks:
                    break
                member += 1
            cut.append(Segment(first, blocks, tuple(parts)))
        return cut


def take(kind: Kind, planes: dict[str, torch.Tensor], block: int, numel: int) -> dict[str, torch.Tensor]:
    """The state tensors of `numel` elements from a block on."""
    taken = {}
    for plane in kind.planes():
        count = numel if plane.per_block > 1 else kind.blocks(numel)
        taken[plane.name] = planes[plane.name].narrow(0, block * plane.per_block, count)
    return taken


def segment_bytes(total: int) -> int:
    """Bytes of a segment, and of a pooled page, where states of `total` bytes are placed at once."""
    return min(MAX_SEGMENT, max(MIN_SEGMENT, total // SEGMENTS))


def pool(sizes: Sequence[int], page: int) -> list[list[int]]:
    """Indices of neighbours that share a page: as many as `page` bytes hold, or one that is larger alone."""
    pages: list[list[int]] = []
    room = 0
    for index, size in enumerate(sizes):
        if not pages or size > room:
            pages.append([])
            room = page
        pages[-1].append(index)
        room -= size
    return pages


def choose_resident(sizes: Sequence[int], budget: int) -> list[bool]:
    """Which pages stay on the device: in order, each that still fits the budget."""
    chosen = []
    for size in sizes:
        chosen.append(size <= budget)
        budget -= size if chosen[-1] else 0
    return chosen


def choose_given_back(sizes: Sequence[int], wanted: int) -> list[int]:
    """Which resident pages leave the device to free `wanted` bytes: from the last on, and none that is not needed."""
    chosen: list[int] = []
    excess = -wanted
    for index in reversed(range(len(sizes))):
        if excess >= 0:
            break
        chosen.append(index)
        excess += sizes[index]
    for index in list(chosen):
        if sizes[index] <= excess:
            chosen.remove(index)
            excess -= sizes[index]
    return chosen


def headroom(capacity: int) -> int:
    """Device memory that resident pages leave free at the peak of a training step."""
    return min(MAX_HEADROOM, max(MIN_HEADROOM, capacity // 32))


def auto_budget(capacity: int, peak: int) -> int:
    """Bytes for new resident pages: what the peak of this process's allocations leaves of its memory."""
    return max(0, capacity - peak - headroom(capacity))


def shortfall(capacity: int, peak: int) -> int:
    """Bytes that resident pages must give back for the headroom to be there at the next such peak."""
    return max(0, peak + headroom(capacity) - capacity)


def _aligned(size: int) -> int:
    return -(-size // PLANE_ALIGNMENT) * PLANE_ALIGNMENT
