"""PagedAdamW8bit with pages that move: on a GPU, and on the CPU over queues that run late."""

from __future__ import annotations

import copy
import gc
import io
import math
import pickle
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from peftkern.optim import AdamW8bit, PagedAdamW8bit, pages
from peftkern.optim.pinned import pinned_bytes
from peftkern.testing.queues import Queues

# Small ones that share pages, one that is cut, one of 32 bits, one that ends within a block, one of no elements.
SHAPES = ((64, 64), (80, 64), (100,), (300, 130), (64, 70), (0, 8), (4097,), (70, 64))
SEGMENT = 20_000


class OnQueues(PagedAdamW8bit):
    """Pages tensors of the CPU."""

    seed, host, queues = 0, 1 << 40, None

    def _open(self, device: torch.device) -> Any:
        self.queues = Queues(self.seed, host=self.host)
        return self.queues

    def _apply(self, bucket: Any, grads: Any, states: Any, verdict: Any) -> None:
        super()._apply(bucket, grads, states, verdict)
        if not any(self._pagers[grads[0].device].is_paged(self.state[p]) for p in self.state):
            self.queues.touch([state[name] for state in states for name in ("exp_avg", "exp_avg_sq")])


@pytest.fixture(autouse=True)
def small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "MIN_SEGMENT", SEGMENT)
    monkeypatch.setattr(pages, "MAX_SEGMENT", SEGMENT)


@pytest.fixture(params=[0, 1])
def paged(request: pytest.FixtureRequest, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> type:
    if device.type == "cuda":
        if request.param:
            pytest.skip("seeds are the queues'")
        return PagedAdamW8bit
    monkeypatch.setattr(OnQueues, "seed", request.param)
    return OnQueues


def parameters(device: torch.device, dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(s, generator=generator).to(device, dtype)) for s in SHAPES]


def groups(params: list[Any]) -> list[dict[str, Any]]:
    return [{"params": params[:4], "weight_decay": 0.1}, {"params": []}, {"params": params[4:], "lr": 3e-3}]


def set_gradients(params: list[Any], step: int, rest: bool = False) -> None:
    generator = torch.Generator().manual_seed(1000 + step)
    for i, p in enumerate(params):
        grad = torch.randn(p.shape, generator=generator) * 10 ** (-4 * torch.rand(p.shape, generator=generator))
        p.grad = None if rest and (step + i) % 3 == 2 else grad.to(p.device, p.dtype)


def run(optimizer: Any, params: list[Any], steps: range, rest: bool = False) -> None:
    for step in steps:
        set_gradients(params, step, rest)
        optimizer.step()


def snapshot(optimizer: Any, params: list[Any]) -> list[torch.Tensor]:
    states = [t.cpu().clone() for p in params for _, t in sorted(optimizer.state.get(p, {}).items())]
    return [p.detach().cpu().clone() for p in params] + states


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b))


def on_host(optimizer: Any) -> int:
    return sum(host for _, host in optimizer.memory().values())


def on_device(optimizer: Any) -> int:
    return sum(near for near, _ in optimizer.memory().values())


@pytest.mark.parametrize("budget", ["auto", 0, 60_000, 10**9])
@pytest.mark.parametrize("rest", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_do_not_depend_on_where_pages_are(
    paged: type, budget: Any, rest: bool, dtype: torch.dtype, device: torch.device
) -> None:
    a, b = parameters(device, dtype), parameters(device, dtype)
    ours, plain = paged(groups(a), 1e-2, device_budget=budget), AdamW8bit(groups(b), 1e-2)
    for step in range(6):
        run(ours, a, range(step, step + 1), rest)
        run(plain, b, range(step, step + 1), rest)
        if step in (2, 5):
            assert same(snapshot(ours, a), snapshot(plain, b))
    near, far = on_device(ours), on_host(ours)
    assert near + far > 130_000
    if budget == 0:
        assert near == 0
    elif budget == 60_000:
        assert 30_000 < near <= budget
    else:
        assert far == 0


@pytest.mark.parametrize("budget", [0, 60_000])
@pytest.mark.parametrize(
    "options",
    [{"stochastic_rounding": True}, {"max_norm": 0.05}, {"check_finite": False}, {"maximize": True}],
    ids=lambda options: next(iter(options)),
)
def test_bits_do_not_depend_on_where_pages_are_with(
    options: dict[str, Any], budget: int, paged: type, device: torch.device
) -> None:
    a, b = parameters(device, torch.bfloat16), parameters(device, torch.bfloat16)
    ours = paged(groups(a), 1e-2, device_budget=budget, **options)
    plain = AdamW8bit(groups(b), 1e-2, **options)
    run(ours, a, range(5), rest=True)
    run(plain, b, range(5), rest=True)
    assert same(snapshot(ours, a), snapshot(plain, b))
    assert on_host(ours) > 70_000


def test_grad_scaler(paged: type, device: torch.device) -> None:
    """Its scale and its verdict pass through, with and without a look of the optimizer's own."""
    a, b = parameters(device), parameters(device)
    for check_finite in (True, False):
        ours, plain = paged(a, device_budget=0, check_finite=check_finite), AdamW8bit(b, check_finite=check_finite)
        for step in range(3):
            for optimizer, params in ((ours, a), (plain, b)):
                set_gradients(params, step)
                for p in params:
                    p.grad *= 1024
                optimizer.grad_scale = torch.tensor(1024.0, device=device)
                optimizer.found_inf = torch.tensor(float(step == 1), device=device)
                optimizer.step()
        assert (ours.skipped_steps, plain.skipped_steps) == (1, 1)
        assert same(snapshot(ours, a), snapshot(plain, b))


def test_states_are_where_they_are_said_to_be(paged: type, device: torch.device) -> None:
    params = parameters(device)
    optimizer = paged(params, device_budget=0)
    run(optimizer, params, range(2))
    states = [optimizer.state[p] for p in params]
    assert [s["exp_avg"].shape for s in states] == [p.shape for p in params]
    assert {s["step"].device.type for s in states} == {device.type}
    for state in states:
        moments = [t for name, t in state.items() if name.startswith("exp_avg") and "qmap" not in name]
        assert all(t.device.type == "cpu" for t in moments)
        if device.type == "cuda":
            assert all(t.is_pinned() for t in moments if t.numel())
    assert states[2]["exp_avg"].dtype == torch.float32


def test_non_finite_gradients_change_nothing(paged: type, device: torch.device) -> None:
    params = parameters(device)
    optimizer = paged(params, device_budget=60_000)
    run(optimizer, params, range(2))
    before = snapshot(optimizer, params)
    set_gradients(params, 5)
    params[3].grad[0, 0] = math.nan
    optimizer.step()
    assert same(snapshot(optimizer, params), before)
    assert optimizer.skipped_steps == 1


def test_strided_parameters(paged: type, device: torch.device) -> None:
    plain = [torch.nn.Parameter(torch.randn(300, 130, device=device))]
    strided = [torch.nn.Parameter(plain[0].detach().t().contiguous().t())]
    a, b = AdamW8bit(plain), paged(strided, device_budget=0)
    for step in range(3):
        set_gradients(plain, step)
        strided[0].grad = plain[0].grad.t().contiguous().t()
        a.step()
        b.step()
    assert torch.equal(plain[0], strided[0])


def through_a_file(state_dict: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("budget", [0, 60_000])
def test_checkpoints_taken_in_flight_resume_bitwise_and_paged(paged: type, budget: int, device: torch.device) -> None:
    """At each of 20 points."""
    params = parameters(device)
    optimizer = paged(groups(params), 1e-2, device_budget=budget)
    for cut in range(20):
        run(optimizer, params, range(cut, cut + 1))
        checkpoint = through_a_file(optimizer.state_dict())
        values = [torch.nn.Parameter(p.detach().clone()) for p in params]
        plain_values = [torch.nn.Parameter(p.detach().clone()) for p in params]
        resumed = paged(groups(values), 1e-2, device_budget=budget)
        plain = AdamW8bit(groups(plain_values), 1e-2)
        resumed.load_state_dict(checkpoint)
        plain.load_state_dict(checkpoint)
        run(resumed, values, range(cut + 1, cut + 3))
        run(plain, plain_values, range(cut + 1, cut + 3))
        assert same(snapshot(resumed, values), snapshot(plain, plain_values))
        assert resumed.memory() == optimizer.memory()
        assert on_host(resumed) > 70_000


def test_loading_while_pages_are_in_flight(paged: type, device: torch.device) -> None:
    """The pages that are replaced must not go before their copies have ended."""
    params, others = parameters(device), parameters(device)
    optimizer, plain = paged(params, device_budget=0), AdamW8bit(others)
    run(plain, others, range(3))
    checkpoint = through_a_file(plain.state_dict())
    for _ in range(3):
        run(optimizer, params, range(7, 9))
        optimizer.load_state_dict(checkpoint)
        with torch.no_grad():
            for p, q in zip(params, others):
                p.copy_(q)
    run(optimizer, params, range(3, 5))
    run(plain, others, range(3, 5))
    assert same(snapshot(optimizer, params), snapshot(plain, others))


@pytest.mark.parametrize("wrapped", [True, False])
def test_bitsandbytes_checkpoints(wrapped: bool, paged: type, device: torch.device) -> None:
    params = parameters(device)
    optimizer = paged(params, 1e-2, device_budget=0)
    run(optimizer, params, range(3))
    theirs = through_a_file(optimizer.bitsandbytes_state_dict())
    if not wrapped:
        for state in theirs["state"].values():
            state |= state.pop("__bnb_optimizer_quant_state__")
    values = [torch.nn.Parameter(p.detach().clone()) for p in params]
    resumed = paged(values, 1e-2, device_budget=0)
    resumed.load_state_dict(theirs)
    run(resumed, values, range(3, 5))
    run(optimizer, params, range(3, 5))
    assert same(snapshot(resumed, values), snapshot(optimizer, params))
    assert on_device(resumed) == 0


def test_copies_are_paged_on_their_own(paged: type, device: torch.device) -> None:
    params = parameters(device)
    optimizer = paged(params, 1e-2, device_budget=60_000)
    run(optimizer, params, range(2))
    copies = [copy.deepcopy((optimizer, params)), pickle.loads(pickle.dumps((optimizer, params)))]
    run(optimizer, params, range(2, 4))
    for other, others in copies:
        run(other, others, range(2, 4))
        assert same(snapshot(other, others), snapshot(optimizer, params))
        assert other.memory() == optimizer.memory()


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


def test_a_step_that_streams_is_not_captured() -> None:
    params = parameters(torch.device("cpu"))
    optimizer = OnQueues(params, device_budget=60_000)
    run(optimizer, params, range(2))
    before = snapshot(optimizer, params)
    run(optimizer, params, range(0))
    optimizer.queues.is_capturing = True
    with pytest.raises(RuntimeError, match="states are on the host, and a step that copies them cannot be captured"):
        optimizer.step()
    assert same(snapshot(optimizer, params), before)
    resident = OnQueues(params)
    run(resident, params, range(1))
    resident.queues.is_capturing = True
    run(resident, params, range(1, 2))
    resident.queues.is_capturing = False
    assert resident.give_back() == 0, "a graph holds the addresses of these pages"


def test_replaced_states_are_paged_again(paged: type, device: torch.device) -> None:
    """What code that moves optimizer states on its own does."""
    a, b = parameters(device), parameters(device)
    ours, plain = paged(a, device_budget=60_000), AdamW8bit(b)
    run(ours, a, range(2))
    for p in a[:3]:
        for name in ("exp_avg", "exp_avg_sq"):
            ours.state[p][name] = ours.state[p][name].to("cpu", copy=True)
    run(ours, a, range(2, 4))
    run(plain, b, range(4))
    assert same(snapshot(ours, a), snapshot(plain, b))
    del ours.state[a[3]], plain.state[b[3]]
    size = on_host(ours) + on_device(ours)
    a[3].grad = b[3].grad = None
    set_gradients(a[:3] + a[4:], 4)
    set_gradients(b[:3] + b[4:], 4)
    ours.step()
    plain.step()
    assert on_host(ours) + on_device(ours) < size - 70_000
    assert same(snapshot(ours, a), snapshot(plain, b))


def test_a_page_that_moves_leaves_replaced_states_alone(paged: type, device: torch.device) -> None:
    a, b = parameters(device), parameters(device)
    ours, plain = paged(a), AdamW8bit(b)
    for optimizer, params in ((ours, a), (plain, b)):
        run(optimizer, params, range(2))
        state = optimizer.state[params[0]]
        state["exp_avg"] = torch.full_like(state["exp_avg"], 130)
        if optimizer is ours:
            assert ours.give_back() > 0
        run(optimizer, params, range(2, 4))
    assert same(snapshot(ours, a), snapshot(plain, b))


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


def test_states_may_be_changed_between_steps(paged: type, device: torch.device) -> None:
    """What was fetched ahead of the change is not used."""
    a, b = parameters(device), parameters(device)
    ours, plain = paged(a, device_budget=0), AdamW8bit(b)
    for optimizer, params in ((ours, a), (plain, b)):
        run(optimizer, params, range(2))
        for p in params:
            optimizer.state[p]["exp_avg"].zero_()
        run(optimizer, params, range(2, 4))
    assert same(snapshot(ours, a), snapshot(plain, b))


def test_groups_of_other_blocksizes_and_late_ones(paged: type, device: torch.device) -> None:
    a, b = parameters(device), parameters(device)
    pair = []
    for cls, params, options in ((paged, a, {"device_budget": 0}), (AdamW8bit, b, {})):
        optimizer = cls([{"params": params[:4], "blocksize": 64}], **options)
        run(optimizer, params[:4], range(2))
        optimizer.add_param_group({"params": params[4:], "min_8bit_size": 10**9})
        run(optimizer, params, range(2, 4))
        pair.append(snapshot(optimizer, params))
    assert same(*pair)


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
    free = states + (32 << 20)  # left for others beside the states
    total = torch.cuda.mem_get_info(device)[1]
    fraction = torch.cuda.get_per_process_memory_fraction(device)
    failed = 0
    try:
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(device) + free) / total, device)
        for _ in range(2):
            try:
                held = [torch.empty(int(free * wanted / 8), dtype=torch.uint8, device=device) for _ in range(8)]
                break
            except torch.OutOfMemoryError:
                failed += 1
                held = []
        assert len(held) == 8, "the second attempt has the memory that the states had"
        assert failed == 1
    finally:
        torch.cuda.set_per_process_memory_fraction(fraction, device)
    assert on_device(ours) == 0
    del held
    for optimizer, params in pairs:
        for step in range(1, 3):
            set_gradients(params, step)
            optimizer.step()
    assert same(*(snapshot(*pair) for pair in pairs))


def test_streams_and_graph(device: torch.device) -> None:
    """Gradients come from the current stream, whichever it is; a resident optimizer is captured and replays."""
    if device.type != "cuda":
        pytest.skip("needs streams")
    a, b = parameters(device), parameters(device)
    ours, plain = PagedAdamW8bit(a, device_budget=0), AdamW8bit(b)
    streams = [torch.cuda.Stream() for _ in range(2)]
    for step in range(4):
        stream = streams[step % 2]
        stream.wait_stream(torch.cuda.current_stream())
        stream.wait_stream(streams[1 - step % 2])
        with torch.cuda.stream(stream):
            run(ours, a, range(step, step + 1))
        run(plain, b, range(step, step + 1))
    torch.cuda.synchronize()
    assert same(snapshot(ours, a), snapshot(plain, b))
    resident = PagedAdamW8bit(a)
    plain = AdamW8bit(b)
    for optimizer, params in ((resident, a), (plain, b)):
        run(optimizer, params, range(2))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        resident.step()
    for _ in range(3):
        graph.replay()
        plain.step()
    assert same(snapshot(resident, a), snapshot(plain, b))
    with pytest.raises(RuntimeError, match="cannot be captured"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        ours.step()


def test_accelerate(paged: type, device: torch.device) -> None:
    """Its wrapper loads the optimizer's own state dict, and hands over gradients and rates as any loop does."""
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=device.type == "cpu")
    a, b = parameters(device), parameters(device)
    ours, plain = paged(groups(a), 1e-2, device_budget=0), AdamW8bit(groups(b), 1e-2)
    run(ours, a, range(2))
    run(plain, b, range(2))
    schedulers = [torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=10) for o in (ours, plain)]
    prepared, scheduler = accelerator.prepare(ours, schedulers[0])
    for step in range(2, 5):
        run(prepared, a, range(step, step + 1))
        scheduler.step()
        run(plain, b, range(step, step + 1))
        schedulers[1].step()
    assert same(snapshot(ours, a), snapshot(plain, b))
    assert on_device(ours) == 0


class Regression(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = torch.nn.Linear(64, 300), torch.nn.Linear(300, 64)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": (self.second(self.first(x).relu()) - x).square().mean()}


def test_trainer_resumes_bitwise(paged: type, device: torch.device, tmp_path: Path) -> None:
    """Transformers' Trainer makes the optimizer, and saves and loads it through files."""
    transformers = pytest.importorskip("transformers")
    data = [{"x": torch.randn(64, generator=torch.Generator().manual_seed(i))} for i in range(16)]

    def train(cls: type, folder: Path, resume: Path | None = None, **options: Any) -> torch.nn.Module:
        arguments = transformers.TrainingArguments(
            output_dir=str(folder),
            max_steps=6,
            save_steps=3,
            per_device_train_batch_size=4,
            report_to=[],
            disable_tqdm=True,
            use_cpu=device.type == "cpu",
            dataloader_pin_memory=False,
        )
        kwargs = {"optimizer_cls_and_kwargs": (cls, {"lr": 1e-2} | options)}
        trainer = transformers.Trainer(Regression(), arguments, train_dataset=data, **kwargs)
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        if cls is paged:
            assert on_device(trainer.optimizer.optimizer) == 0
        return trainer.model

    whole = train(paged, tmp_path / "a", device_budget=0)
    resumed = train(paged, tmp_path / "b", tmp_path / "a" / "checkpoint-3", device_budget=0)
    plain = train(AdamW8bit, tmp_path / "c")
    for p, q, r in zip(whole.parameters(), resumed.parameters(), plain.parameters()):
        assert torch.equal(p, q)
        assert torch.equal(p, r)


def test_ring_is_sized_for_what_it_carries(paged: type, device: torch.device) -> None:
    params = parameters(device)[:1]
    optimizer = paged(params, device_budget=0)
    run(optimizer, params, range(1))
    (only,) = optimizer._pagers.values()
    assert [[t.numel() for t in slot] for slot in only._slots] == [[2 * 4096, 2 * 512]]
