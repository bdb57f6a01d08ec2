"""The plan of a step like the last one: when it fits, and that it changes nothing."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from peftkern.optim import AdamW8bit
from peftkern.optim.plan import StepPlan
from peftkern.optim.state import MOMENTS, SCALES

host = pytest.importorskip("peftkern._host")

SHAPES = ((80, 64), (64, 70), (3,), (16, 16))


def prepared(device: torch.device, **options: Any) -> tuple[list[Any], AdamW8bit]:
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(s, generator=generator).to(device)) for s in SHAPES]
    options = {"min_8bit_size": 0, "lr": 1e-2} | options
    optimizer = AdamW8bit([{"params": params[:2]}, {"params": params[2:], "lr": 1e-3}], **options)
    return params, optimizer


def set_gradients(params: list[Any], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in params:
        p.grad = (torch.randn(p.shape, generator=generator) * 1e-2).to(p.device, p.dtype)


class Plan:
    """A host plan over all parameters of an optimizer."""

    def __init__(self, optimizer: AdamW8bit, rows: list[Any]) -> None:
        self.optimizer = optimizer
        self.table = torch.zeros((len(rows), 8), dtype=torch.int64)
        pairs = [(p, optimizer.state[p]) for p in rows]
        names = (*MOMENTS, *SCALES)
        self.host = host.OptimizerPlan(self.lists(), optimizer.state, pairs, names, self.table.data_ptr())

    def lists(self) -> list[list[Any]]:
        return [group["params"] for group in self.optimizer.param_groups]

    def fits(self) -> bool:
        return self.host.refresh(self.lists(), self.optimizer.state)


def test_table_holds_the_pointers(device: torch.device) -> None:
    params, optimizer = prepared(device)
    set_gradients(params, 0)
    optimizer.step()
    plan = Plan(optimizer, params)
    for step in range(3):
        set_gradients(params, step)
        assert plan.fits()
        for row, p in zip(plan.table.tolist(), params):
            state = optimizer.state[p]
            assert row[:2] == [p.data_ptr(), p.grad.data_ptr()]
            assert row[2:6] == [state[name].data_ptr() for name in (*MOMENTS, *SCALES)]
            assert row[6:] == [p.numel(), 0]


def test_whoever_moves_states_gets_their_memory(device: torch.device) -> None:
    params, optimizer = prepared(device)
    set_gradients(params, 0)
    optimizer.step()
    optimizer.step()
    plan = Plan(optimizer, params)
    assert plan.fits()
    gone = [weakref.ref(optimizer.state[p][name]) for p in params for name in (*MOMENTS, *SCALES)]
    for p in params[:2]:
        optimizer.state[p] = dict(optimizer.state[p])
    for p in params:
        for name in (*MOMENTS, *SCALES):
            optimizer.state[p][name] = optimizer.state[p][name].clone()
    gc.collect()
    assert not any(ref() is not None for ref in gone)
    assert not plan.fits()


def _replace_state(params: list[Any], optimizer: AdamW8bit) -> None:
    optimizer.state[params[1]]["exp_avg"] = optimizer.state[params[1]]["exp_avg"].clone()


def _move_state(params: list[Any], optimizer: AdamW8bit) -> None:
    state = optimizer.state[params[1]]["exp_avg_sq_absmax"]
    state.data = state.data.clone()


def _move_parameter(params: list[Any], optimizer: AdamW8bit) -> None:
    params[2].data = params[2].data.clone()


def _transpose_parameter(params: list[Any], optimizer: AdamW8bit) -> None:
    params[3].data = params[3].data.t()


def _no_gradient(params: list[Any], optimizer: AdamW8bit) -> None:
    params[0].grad = None


def _strided_gradient(params: list[Any], optimizer: AdamW8bit) -> None:
    params[0].grad = torch.zeros(64, 80, device=params[0].device).t()


def _sparse_gradient(params: list[Any], optimizer: AdamW8bit) -> None:
    params[0].grad = torch.zeros(80, 64, device=params[0].device).to_sparse()


class OwnTensor(torch.Tensor):
    """Of a class whose memory may be elsewhere."""


def _gradient_of_a_subclass(params: list[Any], optimizer: AdamW8bit) -> None:
    params[0].grad = params[0].grad.as_subclass(OwnTensor)


def _state_of_a_subclass(params: list[Any], optimizer: AdamW8bit) -> None:
    optimizer.state[params[1]]["exp_avg"] = optimizer.state[params[1]]["exp_avg"].as_subclass(OwnTensor)


def _state_of_another_dtype(params: list[Any], optimizer: AdamW8bit) -> None:
    optimizer.state[params[1]]["exp_avg"] = optimizer.state[params[1]]["exp_avg"].view(torch.int8)


def _freed_state(params: list[Any], optimizer: AdamW8bit) -> None:
    optimizer.state[params[1]]["exp_avg"].data = torch.empty(0, dtype=torch.uint8, device=params[0].device)


def _another_group(params: list[Any], optimizer: AdamW8bit) -> None:
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(5, device=params[0].device))]})


def _another_parameter(params: list[Any], optimizer: AdamW8bit) -> None:
    optimizer.param_groups[1]["params"].append(torch.nn.Parameter(torch.zeros(5, device=params[0].device)))


def _without_a_parameter(params: list[Any], optimizer: AdamW8bit) -> None:
    del optimizer.param_groups[1]["params"][0]


def _other_order(params: list[Any], optimizer: AdamW8bit) -> None:
    optimizer.param_groups[0]["params"].reverse()


def _without_a_state(params: list[Any], optimizer: AdamW8bit) -> None:
    del optimizer.state[params[1]]


def _loaded(params: list[Any], optimizer: AdamW8bit) -> None:
    optimizer.load_state_dict(optimizer.state_dict())


CHANGES = [
    _replace_state,
    _move_state,
    _move_parameter,
    _transpose_parameter,
    _no_gradient,
    _strided_gradient,
    _sparse_gradient,
    _gradient_of_a_subclass,
    _state_of_a_subclass,
    _state_of_another_dtype,
    _freed_state,
    _another_group,
    _another_parameter,
    _without_a_parameter,
    _other_order,
    _without_a_state,
    _loaded,
]


def test_parameters_of_a_subclass_have_no_plan(device: torch.device) -> None:
    params, optimizer = prepared(device)
    set_gradients(params, 0)
    optimizer.step()
    own = params[0].data.as_subclass(OwnTensor).requires_grad_()
    table = torch.zeros((1, 8), dtype=torch.int64)
    rows = [(own, optimizer.state[params[0]])]
    with pytest.raises(ValueError, match="tensor type of its own"):
        host.OptimizerPlan([[own]], optimizer.state, rows, (*MOMENTS, *SCALES), table.data_ptr())


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_any_change_ends_it(change: Callable[..., None], device: torch.device) -> None:
    params, optimizer = prepared(device)
    set_gradients(params, 0)
    optimizer.step()
    plan = Plan(optimizer, params)
    assert plan.fits()
    change(params, optimizer)
    assert not plan.fits()


def test_a_parameter_that_waits_is_part_of_it(device: torch.device) -> None:
    params, optimizer = prepared(device)
    set_gradients(params, 0)
    params[1].grad = None
    optimizer.step()
    plan = Plan(optimizer, [params[0], *params[2:]])
    assert plan.fits()
    set_gradients(params, 1)
    assert not plan.fits()


def test_it_holds_no_parameter() -> None:
    params, optimizer = prepared(torch.device("cpu"))
    set_gradients(params, 0)
    optimizer.step()
    plan = Plan(optimizer, params)
    watched = weakref.ref(params[0])
    del optimizer.state[params[0]], params[0], optimizer.param_groups[0]["params"][0]
    gc.collect()
    assert watched() is None
    assert not plan.fits()


@pytest.mark.parametrize(
    "options",
    [{}, {"max_norm": 0.05}, {"stochastic_rounding": True}, {"check_finite": False}, {"maximize": True}],
    ids=str,
)
def test_steps_are_the_same_with_and_without(
    options: dict[str, Any], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_plan, without = prepared(device, **options), prepared(device, **options)
    planned = 0
    for step in range(8):
        for params, optimizer in (with_plan, without):
            set_gradients(params, step)
            if step == 2 and optimizer.check_finite:
                params[1].grad[3, 3] = torch.nan
            if step in (4, 5):
                params[2].grad = None
            if step >= 6:
                optimizer.found_inf = torch.tensor(float(step == 6), device=device)  # as GradScaler sets it
            planned += optimizer._plan is not None
            torch.ones((), device=device)  # so that memory for the next flag does not hold zero
            optimizer.step()
            assert step < 6 or optimizer.found_inf == float(step == 6)
            if optimizer is without[1]:
                optimizer._plan = None
    assert planned > 3 or device.type != "cuda"
    (a, first), (b, second) = with_plan, without
    assert first.skipped_steps == second.skipped_steps
    for p, q in zip(a, b):
        assert torch.equal(p, q)
        for x, y in zip(first.state[p].values(), second.state[q].values()):
            assert torch.equal(x, y)


def test_none_where_the_op_takes_no_table() -> None:
    params, optimizer = prepared(torch.device("cpu"))
    set_gradients(params, 0)
    optimizer.step()
    assert optimizer._plan is None
    assert StepPlan.of(optimizer, []) is None
