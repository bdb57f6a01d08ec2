"""How states are laid out in pages, which stay on the device, how pages are cut."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peftkern.optim import pages
from peftkern.optim.pages import Kind, Layout

kinds = st.builds(Kind, st.booleans(), st.sampled_from([64, 256, 4096]))
numels = st.lists(st.integers(0, 20_000), min_size=1, max_size=12).filter(any)


@settings(max_examples=60, deadline=None)
@given(kinds, numels)
def test_states_of_a_page_do_not_overlap_and_start_at_whole_blocks(kind: Kind, counts: list[int]) -> None:
    layout = Layout(kind, tuple(counts))
    memory = tuple(torch.zeros(n, dtype=torch.uint8) for n in layout.buffers)
    members = layout.members(memory)
    taken = {plane.dtype: torch.zeros(layout.nbytes, dtype=torch.bool) for plane in kind.planes()}
    starts = dict(zip(taken, (buffer.data_ptr() for buffer in memory)))
    for count, views in zip(counts, members):
        for plane in kind.planes():
            view = views[plane.name]
            assert view.dtype == plane.dtype
            assert view.numel() == (count if plane.per_block > 1 else math.ceil(count / kind.blocksize))
            offset = view.data_ptr() - starts[plane.dtype] if view.numel() else 0
            assert offset % (plane.dtype.itemsize * plane.per_block) == 0 or plane.per_block == 1
            run = taken[plane.dtype][offset : offset + view.numel() * view.element_size()]
            assert not run.any()
            run.fill_(True)


@settings(max_examples=60, deadline=None)
@given(kinds, numels, st.integers(1, 200_000))
def test_segments_cover_every_element_once(kind: Kind, counts: list[int], nbytes: int) -> None:
    layout = Layout(kind, tuple(counts))
    segments = layout.segments(nbytes)
    assert [s.first for s in segments] == [sum(s.blocks for s in segments[:i]) for i in range(len(segments))]
    assert sum(s.blocks for s in segments) == layout.blocks
    covered = [0] * len(counts)
    for segment in segments:
        used = 0
        for part in segment.parts:
            assert part.begin == covered[part.member]
            assert part.begin % kind.blocksize == 0
            assert part.begin < part.end
            assert part.end % kind.blocksize == 0 or part.end == counts[part.member]
            assert part.block == layout.starts[part.member] + part.begin // kind.blocksize - segment.first
            assert used <= part.block
            used = part.block + kind.blocks(part.end - part.begin)
            covered[part.member] = part.end
        assert used <= segment.blocks
        assert len(segments) == 1 or segment.blocks == 1 or segment.blocks * kind.bytes_per_block() <= nbytes
    assert covered == counts
    most = max(1, nbytes // kind.bytes_per_block())
    for segment in segments[:-1]:  # a block at most above an even share
        assert segment.blocks == math.ceil(layout.blocks / math.ceil(layout.blocks / most))


def test_a_segment_holds_what_its_page_holds() -> None:
    kind = Kind(True, 64)
    layout = Layout(kind, (1000, 64, 5, 30_000))
    home = tuple(torch.randint(0, 255, (n,), dtype=torch.uint8) for n in layout.buffers)
    planes, members = kind.carve(home, layout.blocks), layout.members(home)
    seen = 0
    for segment in layout.segments(5000):
        slot = tuple(torch.zeros(n, dtype=torch.uint8) for n in kind.buffers(segment.blocks))
        there = kind.carve(slot, segment.blocks)
        for plane in kind.planes():
            run = slice(segment.first * plane.per_block, (segment.first + segment.blocks) * plane.per_block)
            there[plane.name].copy_(planes[plane.name][run])
        for part in segment.parts:
            views = pages.take(kind, there, part.block, part.end - part.begin)
            whole = members[part.member]
            assert torch.equal(views["exp_avg"], whole["exp_avg"][part.begin : part.end])
            scales = slice(part.begin // 64, -(-part.end // 64))
            assert torch.equal(
                views["exp_avg_sq_absmax"].view(torch.int32), whole["exp_avg_sq_absmax"][scales].view(torch.int32)
            )
            seen += part.end - part.begin
    assert seen == sum(layout.numels)


def test_a_lora_set_takes_few_pages() -> None:
    """448 matrices of 65,536 and 176,128 elements, none of which would be worth a copy of its own."""
    sizes = [65_536, 65_536] * 128 + [65_536, 176_128] * 96
    kind = Kind(True, 256)
    page = pages.segment_bytes(sum(kind.nbytes(kind.blocks(n)) for n in sizes))
    pooled = pages.pool([kind.nbytes(kind.blocks(n)) for n in sizes], page)
    assert [i for indices in pooled for i in indices] == list(range(448))
    assert 16 <= len(pooled) <= 18
    for indices in pooled:
        assert Layout(kind, tuple(sizes[i] for i in indices)).nbytes <= page


def test_pooling() -> None:
    assert pages.pool([3, 3, 3, 10, 1, 9, 9], 9) == [[0, 1, 2], [3], [4], [5], [6]]
    assert pages.pool([], 9) == []
    assert pages.pool([0, 0, 9], 9) == [[0, 1, 2]]


@pytest.mark.parametrize(
    ("total", "expected"), [(0, 1 << 20), (80 << 20, 5 << 20), (2 << 30, 32 << 20), (1 << 40, 32 << 20)]
)
def test_segment_bytes(total: int, expected: int) -> None:
    assert pages.segment_bytes(total) == expected


def test_the_budget_is_filled_in_order_and_kept() -> None:
    assert pages.choose_resident([4, 4, 4], 12) == [True, True, True]
    assert pages.choose_resident([4, 4, 4], 11) == [True, True, False]
    assert pages.choose_resident([4, 9, 4, 2], 10) == [True, False, True, True]
    assert pages.choose_resident([4, 4], 0) == [False, False]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 50), max_size=10), st.integers(0, 300))
def test_no_more_is_given_back_than_is_wanted(sizes: list[int], wanted: int) -> None:
    chosen = pages.choose_given_back(sizes, wanted)
    freed = sum(sizes[i] for i in chosen)
    assert len(set(chosen)) == len(chosen)
    if sum(sizes) < wanted:
        assert freed == sum(sizes)
    else:
        assert freed >= wanted
        assert all(freed - sizes[i] < wanted for i in chosen)


def test_headroom_and_what_is_left() -> None:
    gigabyte = 1 << 30
    assert pages.headroom(4 * gigabyte) == 256 << 20
    assert pages.headroom(80 * gigabyte) == 2 * gigabyte
    assert pages.auto_budget(80 * gigabyte, 70 * gigabyte) == 8 * gigabyte
    assert pages.auto_budget(80 * gigabyte, 79 * gigabyte) == 0
    assert pages.shortfall(80 * gigabyte, 78 * gigabyte) == 0
    assert pages.shortfall(80 * gigabyte, 79 * gigabyte) == gigabyte
