"""PagedAdamW8bit's memory: what is given back when, what is held, what goes with it."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from paging_cases import OnQueues, on_device, on_host, parameters, run, same, set_gradients, snapshot

from peftkern.optim import AdamW8bit, PagedAdamW8bit, pages
from peftkern.optim.pinned import pinned_bytes
from peftkern.testing.queues import Queues

pytestmark = pytest.mark.usefixtures("small_segments")


def test_pages_are_given_back_when_asked(paged: type, device: torch.device) -> None:
    a, b = parameters(device), parameters(device)
    ours, plain = paged(a, device_budget="auto"), AdamW8bit(b)
    run(ours, a, range(2))
    run(plain, b, range(2))
    resident = on_device(ours)
    freed = ours.give_back(50_000)
    assert 50_000 <= freed < 150_000
    assert (on_device(ours), on_host(ours)) == (resident - freed, freed)
    run(ours, a, range(2, 4))
    run(plain, b, range(2, 4))
    assert ours.give_back() == resident - freed
    assert ours.give_back() == 0
    run(ours, a, range(4, 6))
    run(plain, b, range(4, 6))
    assert same(snapshot(ours, a), snapshot(plain, b))


def test_a_tight_step_gives_back_what_the_next_may_lack() -> None:
    params = parameters(torch.device("cpu"))
    optimizer = OnQueues(params)
    run(optimizer, params, range(1))
    queues, resident = optimizer.queues, on_device(optimizer)
    capacity = queues.capacity = 1 << 33
    margin = pages.headroom(capacity)
    queues.peak = capacity - margin
    run(optimizer, params, range(1, 2))
    assert on_device(optimizer) == resident
    queues.peak += 40_000
    run(optimizer, params, range(2, 3))
    freed = resident - on_device(optimizer)
    assert 40_000 <= freed < 140_000
    run(optimizer, params, range(3, 5))  # torch's peak does not fall, what was resident then is known
    assert resident - on_device(optimizer) == freed
    queues.peak = capacity
    run(optimizer, params, range(5, 6))
    assert on_device(optimizer) == 0


def test_auto_takes_what_is_left() -> None:
    params = parameters(torch.device("cpu"))

    class Full(OnQueues):
        def _open(self, device: torch.device) -> Any:
            queues = Queues(capacity=1 << 33)
            queues.peak = queues.capacity - pages.headroom(queues.capacity) - 60_000
            return queues

    optimizer = Full(params)
    run(optimizer, params, range(1))
    assert 30_000 < on_device(optimizer) <= 60_000


def test_out_of_memory_gives_back_all(paged: type, device: torch.device) -> None:
    params = parameters(device)
    optimizer = paged(params)
    run(optimizer, params, range(1))
    assert on_host(optimizer) == 0
    optimizer.out_of_memory(params[0].device.index if device.type == "cuda" else None)
    assert on_device(optimizer) == 0


def test_without_pinned_memory_states_stay_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OnQueues, "host", 50_000)
    device = torch.device("cpu")
    a, b = parameters(device), parameters(device)
    ours, plain = OnQueues(a, device_budget=0), AdamW8bit(b)
    with pytest.warns(RuntimeWarning, match="OnQueues: host memory for paged states cannot be page-locked: .* bytes"):
        run(ours, a, range(1))
    run(ours, a, range(1, 3))
    run(plain, b, range(3))
    assert on_device(ours) > 0
    assert 0 < on_host(ours) <= 50_000
    assert same(snapshot(ours, a), snapshot(plain, b))
    assert ours.give_back() == 0


def test_no_memory_for_the_ring(monkeypatch: pytest.MonkeyPatch) -> None:
    """Resident pages make room for it; where there are none, the step raises and changes nothing."""
    a, b = parameters(torch.device("cpu")), parameters(torch.device("cpu"))
    ours, plain = OnQueues(a, device_budget=60_000), AdamW8bit(b)
    run(ours, a, range(2))
    run(plain, b, range(2))
    (pager,) = ours._pagers.values()
    make = pager._make_ring
    for refused in (1, 2):
        pager._drop_ring()
        left = [refused]

        def refuse(paged: Any, left: list[int] = left) -> None:
            if left[0]:
                left[0] -= 1
                raise torch.OutOfMemoryError("no memory")
            make(paged)

        monkeypatch.setattr(pager, "_make_ring", refuse)
        if refused == 2:
            before = snapshot(ours, a)
            with pytest.raises(torch.OutOfMemoryError):
                ours.step()
            assert same(snapshot(ours, a), before)
            left[0] = 0
        run(ours, a, range(1 + refused, 2 + refused))
        run(plain, b, range(1 + refused, 2 + refused))
        assert on_device(ours) == 0
    assert same(snapshot(ours, a), snapshot(plain, b))


def replace_one(optimizer: Any, params: list[Any]) -> None:
    optimizer.state[params[0]]["exp_avg"] = optimizer.state[params[0]]["exp_avg"].clone()
    optimizer._place()


@pytest.mark.parametrize(
    "change",
    [
        lambda optimizer, params: optimizer.give_back(1),
        lambda optimizer, params: optimizer.load_state_dict(optimizer.state_dict()),
        replace_one,
        lambda optimizer, params: optimizer.__setstate__(optimizer.__getstate__()),
    ],
    ids=["give back", "load", "replace", "reset"],
)
def test_memory_is_dropped_when_its_copies_have_ended(change: Any) -> None:
    params = parameters(torch.device("cpu"))
    optimizer = OnQueues(params, device_budget=60_000)
    run(optimizer, params, range(2))
    queues = optimizer.queues
    assert queues.pending() > 0
    change(optimizer, params)
    gc.collect()
    assert queues.pending() == 0
    assert not optimizer._pagers or not next(iter(optimizer._pagers.values()))._slots


def test_everything_goes_with_the_optimizer(paged: type, device: torch.device) -> None:
    params = parameters(device)
    optimizer = paged(params, device_budget=0)
    run(optimizer, params, range(2))
    kept = optimizer.state[params[0]]["exp_avg"]
    watched = [weakref.ref(optimizer), weakref.ref(next(iter(optimizer._pagers.values())))]
    queues = getattr(optimizer, "queues", None)
    run(optimizer, params, range(2, 3))
    del optimizer
    gc.collect()
    assert [ref() for ref in watched] == [None, None]
    assert queues is None or queues.pending() == 0
    assert int((kept != 127).sum()) > 4000, "a tensor that was taken from the state outlives it"


@pytest.mark.slow
def test_create_and_destroy_grows_nothing(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    if device.type != "cuda":
        pytest.skip("needs a GPU's allocator")
    monkeypatch.setattr(pages, "MIN_SEGMENT", 1 << 20)
    monkeypatch.setattr(pages, "MAX_SEGMENT", 1 << 20)
    params = [torch.nn.Parameter(torch.randn(512, 1024, device=device)) for _ in range(4)]
    set_gradients(params, 0)
    held = []
    for cycle in range(1000):
        optimizer = PagedAdamW8bit(params, device_budget=0)
        optimizer.step()
        optimizer.step()
        del optimizer
        if cycle in (10, 999):
            gc.collect()
            torch.cuda.synchronize()
            resident = int(Path("/proc/self/statm").read_text().split()[1])
            held.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved(), pinned_bytes(), resident))
    assert held[1][:3] == held[0][:3]
    assert held[1][3] - held[0][3] < 2000, "pages of host memory"


def test_states_on_the_device_take_the_plan_of_the_unpaged_step(device: torch.device) -> None:
    """Until pages move, whose memory it must not hold."""
    if device.type != "cuda":
        pytest.skip("plans are of the GPU's step")
    a, b = parameters(device), parameters(device)
    pair = []
    for cls, params in ((PagedAdamW8bit, a), (AdamW8bit, b)):
        optimizer = cls(params, 1e-2, min_8bit_size=0)
        run(optimizer, params, range(3))
        assert optimizer._plan is not None
        if cls is PagedAdamW8bit:
            before = torch.cuda.memory_allocated()
            freed = optimizer.give_back()
            assert before - torch.cuda.memory_allocated() >= freed > 100_000
            run(optimizer, params, range(3, 5))
            assert optimizer._plan is None
        else:
            run(optimizer, params, range(3, 5))
        pair.append(snapshot(optimizer, params))
    assert same(*pair)


@pytest.mark.parametrize("wanted", [1.5, 2.0])
def test_plain_allocations_that_need_the_states_memory(wanted: float, device: torch.device) -> None:
    """Of 1.5 and 2 times what is left beside the states: the second attempt has it, and no bit changes."""
    if device.type != "cuda":
        pytest.skip("needs a GPU's allocator")
    torch.multiprocessing.spawn(need_the_states_memory, (wanted,))


def need_the_states_memory(rank: int, wanted: float) -> None:
    """In a process of its own: in memory that others have left in pieces, pages may lie between what stays."""
    device = torch.device("cuda", torch.cuda.current_device())
    shapes = [(2048, 1024)] * 32
    pairs = []
    for cls in (PagedAdamW8bit, AdamW8bit):
        params = [torch.nn.Parameter(torch.full(s, 0.5, device=device, dtype=torch.bfloat16)) for s in shapes]
        optimizer = cls(params, 1e-2)
        pairs.append((optimizer, params))
        set_gradients(params, 0)
        optimizer.step()
    ours, params = pairs[0]
    states = on_device(ours)
    assert states > 100 << 20
    torch.cuda.empty_cache()
    free = states // 2  # left for others beside the states, and what the allocator holds without using it
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    total = torch.cuda.mem_get_info(device)[1]
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(device) + free) / total, device)
    # Small enough for the gaps that states leave, of 4 MB between other tensors, and not so small that they come from
    # memory of their own.
    nbytes = 1300 << 10
    count = int((free * wanted + unused) / nbytes)
    failed, held = 0, []
    for _ in range(2):
        try:
            held = [torch.empty(nbytes, dtype=torch.uint8, device=device) for _ in range(count)]
            break
        except torch.OutOfMemoryError:
            failed += 1
    assert len(held) == count, "the second attempt has the memory that the states had"
    assert failed == 1
    torch.cuda.set_per_process_memory_fraction(1.0, device)
    assert on_device(ours) == 0
    del held
    for optimizer, params in pairs:
        for step in range(1, 3):
            set_gradients(params, step)
            optimizer.step()
    assert same(*(snapshot(*pair) for pair in pairs))


def test_ring_is_sized_for_what_it_carries(paged: type, device: torch.device) -> None:
    params = parameters(device)[:1]
    optimizer = paged(params, device_budget=0)
    run(optimizer, params, range(1))
    (only,) = optimizer._pagers.values()
    assert [[t.numel() for t in slot] for slot in only._slots] == [[2 * 4096, 2 * 512]]
