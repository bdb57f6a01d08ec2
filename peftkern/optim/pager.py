"""The pages of one device: which states are where, how they get there, and how those on the host are updated."""

from __future__ import annotations

import itertools
import sys
import warnings
from collections.abc import Callable, Container, Iterable, Sequence

import torch

from peftkern.optim.device import Device
from peftkern.optim.pages import (
    BLOCK_32BIT,
    SLOTS,
    Kind,
    Layout,
    Memory,
    Part,
    Segment,
    auto_budget,
    choose_given_back,
    choose_resident,
    pool,
    segment_bytes,
    shortfall,
    take,
)
from peftkern.optim.pinned import PinningError
from peftkern.optim.sharding import local, rewrap
from peftkern.optim.state import MOMENTS, ZERO_CODES, State, is_quantized
from peftkern.optim.stream import Lane, Pairs, Ring

Entry = tuple[State, int]  # a parameter's state, and the blocksize of its group
Piece = tuple[State, Part, dict[str, torch.Tensor]]  # whose, which elements, and their state on the device


class Page:
    """States in memory of the device or the host. The states' tensors are views of it."""

    def __init__(self, layout: Layout, entries: list[State], memory: Memory, resident: bool) -> None:
        self.layout, self.entries, self.memory, self.resident = layout, entries, memory, resident
        self.nbytes = layout.nbytes
        self.shapes = [local(entry[MOMENTS[0]]).shape for entry in entries]
        self.loads: list[PageLoad] = []
        self._views: list[dict[str, torch.Tensor]] = []

    def bind(self) -> None:
        """Makes the states' tensors views of the page; when it has moved, those that were not replaced since."""
        ours = [bool(entry) and self.holds(member) for member, entry in enumerate(self.entries)]
        self._views = self.layout.members(self.memory)
        for entry, views, is_ours in zip(self.entries, self._views, ours):
            for name in views if is_ours else ():
                entry[name] = views[name] = rewrap(entry[name], views[name].view(local(entry[name]).shape))

    def fill(self) -> None:
        """Copies the states in; those on the meta device are new, zero."""
        planes = self.layout.kind.carve(self.memory, self.layout.blocks)
        for name, zero in zip(MOMENTS, ZERO_CODES):
            planes[name].fill_(zero if self.layout.kind.quantized else 0)
        for name in planes.keys() - MOMENTS:
            planes[name].zero_()
        for entry, views in zip(self.entries, self.layout.members(self.memory)):
            for name, view in views.items():
                if not entry[name].is_meta:
                    view.copy_(local(entry[name]).reshape(-1))

    def holds(self, member: int) -> bool:
        """Whether the state's tensors still are the page's, and have not been replaced."""
        entry = self.entries[member]
        return not self._views or all(entry.get(name) is view for name, view in self._views[member].items())


class PageLoad:
    """A segment of a page on the host, with its views in the ring's slots."""

    def __init__(self, page: Page, segment: Segment, slots: list[Memory]) -> None:
        kind = page.layout.kind
        self._pairs: list[Pairs] = []
        self._pieces: list[list[Piece]] = []
        home = kind.carve(page.memory, page.layout.blocks)
        for slot in slots:
            planes = kind.carve(slot, segment.blocks)
            if segment.blocks == page.layout.blocks:
                self._pairs.append([(buffer, room[: buffer.numel()]) for buffer, room in zip(page.memory, slot)])
            else:
                spans = {p.name: (segment.first * p.per_block, segment.blocks * p.per_block) for p in kind.planes()}
                self._pairs.append([(home[name].narrow(0, *spans[name]), planes[name]) for name in planes])
            pieces = []
            for part in segment.parts:
                views = take(kind, planes, part.block, part.end - part.begin)
                if part.end - part.begin == page.layout.numels[part.member]:
                    views |= {n: views[n].view(page.shapes[part.member]) for n in MOMENTS}
                pieces.append((page.entries[part.member], part, views))
            self._pieces.append(pieces)

    def pairs(self, slot: int) -> Pairs:
        return self._pairs[slot]

    def pieces(self, slot: int) -> list[Piece]:
        return self._pieces[slot]

    def touches(self, active: Container[int]) -> bool:
        """Whether any of its states' ids is among `active`."""
        return any(id(entry) in active for entry, _, _ in self._pieces[0])


class Pager:
    """Pages on one device, within a budget that shrinks when memory gets tight."""

    def __init__(self, owner: str, device: Device, budget: int | None) -> None:
        """`budget`: bytes for resident pages; None takes what the device has to spare."""
        self._owner, self._device, self._budget = owner, device, budget
        self._pages: list[Page] = []
        self._member: dict[int, tuple[Page, int]] = {}
        self._ring: Ring | None = None
        self._slots: list[Memory] = []
        self._done = device.event()  # of the last step, on WORK
        self._pinnable = True
        self._pinned_down = False
        self._highest = (0, 0)  # the highest peak seen, and what was resident then

    def __del__(self) -> None:
        if not sys.is_finalizing():
            self._drop_ring()

    def has(self, entry: State) -> bool:
        """Whether the state lies in a page."""
        page, member = self._member.get(id(entry), (None, 0))
        return page is not None and page.entries[member] is entry and page.holds(member)

    def add(self, entries: Iterable[Entry]) -> None:
        """Places states in new pages: on the device what fits the budget, the rest on the host.

        Raises:
            RuntimeError: WORK is being captured.
        """
        entries = list(entries)
        if not entries:
            return
        if self._device.capturing():
            raise RuntimeError(f"{self._owner}: states cannot be made while a CUDA graph is captured; do a step before")
        self._drop_ring()
        kinds: dict[Kind, list[State]] = {}
        for entry, blocksize in entries:
            kind = Kind(is_quantized(entry), blocksize if is_quantized(entry) else BLOCK_32BIT)
            kinds.setdefault(kind, []).append(entry)
        numels = {kind: [local(entry[MOMENTS[0]]).numel() for entry in members] for kind, members in kinds.items()}
        sizes = {kind: [kind.nbytes(kind.blocks(n)) for n in counts] for kind, counts in numels.items()}
        page_bytes = segment_bytes(sum(itertools.chain.from_iterable(sizes.values())))
        plans = []
        for kind, members in kinds.items():
            for indices in pool(sizes[kind], page_bytes):
                layout = Layout(kind, tuple(numels[kind][i] for i in indices))
                plans.append((layout, [members[i] for i in indices]))
        resident = choose_resident([layout.nbytes for layout, _ in plans], self._room())
        for (layout, members), stays in zip(plans, resident):
            page = Page(layout, members, *self._memory(layout, stays))
            page.fill()
            page.bind()
            self._pages.append(page)
            self._member |= {id(entry): (page, i) for i, entry in enumerate(members)}
        self._device.record(self._done, Lane.WORK)

    def keep_only(self, ids: Container[int]) -> None:
        """Lets go of states whose ids are not among these; a page goes with the last of its states."""
        gone = [key for key in self._member if key not in ids]
        if not gone:
            return
        self._drop_ring()
        for key in gone:
            page, member = self._member.pop(key)
            page.entries[member] = {}
        self._pages = [page for page in self._pages if any(page.entries)]

    @property
    def streams(self) -> bool:
        """Whether any page is on the host."""
        return not all(page.resident for page in self._pages)

    def prepare(self) -> None:
        """Before a step changes anything: gets the ring, if it is needed.

        Raises:
            RuntimeError: the step is captured, and pages are on the host.
        """
        paged = [page for page in self._pages if not page.resident]
        if self._device.capturing():
            if paged:
                raise RuntimeError(
                    f"{self._owner}: {sum(page.nbytes for page in paged)} bytes of states are on the host, and "
                    "a step that copies them cannot be captured into a CUDA graph; capture forward and backward only, "
                    "or give a device_budget that holds all states"
                )
            self._pinned_down = True
        if not paged:
            return
        if self._ring is None:
            try:
                self._make_ring(paged)
            except torch.OutOfMemoryError:
                if not self.give_back(self._resident_bytes()):
                    raise
                self._make_ring([page for page in self._pages if not page.resident])

    def start(self, active: Container[int]) -> None:
        """Fetches the first segments of a step of the states with these ids, if they are not there yet."""
        if self._ring is not None:
            self._ring.start(self._loads(active))

    def run(self, active: Container[int], update: Callable[[list[Piece]], None]) -> None:
        """Has `update` called for all states on the host whose ids are in `active`, a segment at a time."""
        if self._ring is not None:
            self._ring.run(self._loads(active), lambda load, slot: update(load.pieces(slot)))

    def finish(self) -> int:
        """After a step: notes it on WORK. Returns what should be given back, as the next step may lack it."""
        if self._pinned_down:
            return 0
        self._device.record(self._done, Lane.WORK)
        resident = self._resident_bytes()
        if not resident:
            return 0
        capacity, peak = self._device.usage()
        if peak != self._highest[0]:
            self._highest = (peak, resident)
        return shortfall(capacity, peak - self._highest[1] + resident)

    def is_paged(self, entry: State) -> bool:
        """Whether the state lies on the host."""
        page, _ = self._member.get(id(entry), (None, 0))
        return page is not None and not page.resident

    def give_back(self, wanted: int) -> int:
        """Moves resident pages of at least `wanted` bytes, or all, to the host. Returns how many bytes moved.

        It waits for the copies: the device memory is free when it returns.
        """
        if self._pinned_down:
            return 0
        resident = [page for page in self._pages if page.resident and page.nbytes]
        chosen = choose_given_back([page.nbytes for page in resident], wanted)
        moves: list[tuple[Page, Memory]] = []
        for index in chosen:
            host = self._pin(resident[index].layout)
            if host is not None:
                moves.append((resident[index], host))
        if not moves:
            return 0
        copied = self._device.event()
        self._device.wait(Lane.OUT, self._done)
        self._device.copy(Lane.OUT, [pair for page, host in moves for pair in zip(host, page.memory)])
        self._device.record(copied, Lane.OUT)
        self._device.synchronize(copied)
        for page, host in moves:
            page.memory, page.resident = host, False
            page.bind()
        self._drop_ring()
        return sum(page.nbytes for page, _ in moves)

    def settle(self) -> None:
        """Waits until the states on the host are those of the last step. They may be changed before the next."""
        if self._ring is not None:
            self._ring.settle()
            self._ring.forget()

    def sizes(self) -> tuple[int, int]:
        """Bytes of pages on the device, and on the host."""
        resident = self._resident_bytes()
        return resident, sum(page.nbytes for page in self._pages) - resident

    def _resident_bytes(self) -> int:
        return sum(page.nbytes for page in self._pages if page.resident)

    def _room(self) -> int:
        if self._budget is None:
            return auto_budget(*self._device.usage())
        return max(0, self._budget - self._resident_bytes())

    def _memory(self, layout: Layout, resident: bool) -> tuple[Memory, bool]:
        """Memory for a page, and whether it is the device's."""
        if resident:
            try:
                return self._empty(layout.buffers), True
            except torch.OutOfMemoryError:
                pass
        host = self._pin(layout)
        return (self._empty(layout.buffers), True) if host is None else (host, False)

    def _empty(self, sizes: Sequence[int]) -> Memory:
        return tuple(self._device.empty(size) for size in sizes)

    def _pin(self, layout: Layout) -> Memory | None:
        if not self._pinnable:
            return None
        try:
            return tuple(self._device.pin(size) for size in layout.buffers)
        except PinningError as error:
            self._pinnable = False
            warnings.warn(
                f"{self._owner}: host memory for paged states cannot be page-locked: {error}. States that are not on "
                "the host yet stay on the device, whatever device_budget says",
                RuntimeWarning,
                stacklevel=2,
            )
            return None

    def _make_ring(self, paged: Sequence[Page]) -> None:
        nbytes = segment_bytes(sum(page.nbytes for page in paged))
        nbytes = max(nbytes, max((page.nbytes for page in paged if len(page.entries) > 1), default=0))
        cuts = [(page, segment) for page in paged for segment in page.layout.segments(nbytes)]
        needs = [page.layout.kind.buffers(segment.blocks) for page, segment in cuts]
        sizes = [max(column) for column in itertools.zip_longest(*needs, fillvalue=0)]
        self._slots = [self._empty(sizes) for _ in range(min(SLOTS, len(cuts)))]
        self._ring = Ring(self._device, len(self._slots))
        for page, segment in cuts:
            page.loads.append(PageLoad(page, segment, self._slots))

    def _drop_ring(self) -> None:
        if self._ring is None:
            return
        self._ring.drain()
        self._ring, self._slots = None, []
        for page in self._pages:
            page.loads = []

    def _loads(self, active: Container[int]) -> list[PageLoad]:
        loads = itertools.chain.from_iterable(page.loads for page in self._pages if not page.resident)
        return [load for load in loads if load.touches(active)]
