"""PagedAdamW8bit with pages that move: on a GPU, and on the CPU over queues that run late."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from paging_cases import OnQueues, groups, on_device, on_host, parameters, run, same, set_gradients, snapshot

from peftkern.optim import AdamW8bit, PagedAdamW8bit

pytestmark = pytest.mark.usefixtures("small_segments")


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
