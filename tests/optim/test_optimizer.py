"""AdamW8bit and PagedAdamW8bit as torch optimizers."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import weakref
from typing import Any

import pytest
import torch

from peftkern.optim import AdamW8bit, PagedAdamW8bit
from peftkern.optim.state import is_quantized

OPTIMIZERS = (AdamW8bit, PagedAdamW8bit)
SHAPES = ((80, 64), (100,), (64, 70), ())


def parameters(device: torch.device | str = "cpu", seed: int = 0, dtype: torch.dtype = torch.float32) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(s, generator=generator).to(device, dtype)) for s in SHAPES]


def set_gradients(params: list[Any], step: int, scale: float = 1e-2) -> None:
    generator = torch.Generator().manual_seed(1000 + step)
    for p in params:
        p.grad = (torch.randn(p.shape, generator=generator) * scale).to(p.device, p.dtype)


def run(optimizer: torch.optim.Optimizer, params: list[Any], steps: range) -> None:
    for step in steps:
        set_gradients(params, step)
        optimizer.step()


def snapshot(optimizer: torch.optim.Optimizer, params: list[Any]) -> list[torch.Tensor]:
    states = [t for p in params if p in optimizer.state for t in optimizer.state[p].values()]
    return [t.detach().to("cpu", copy=True) for t in (*params, *states)]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))


@pytest.mark.parametrize("cls", OPTIMIZERS)
@pytest.mark.parametrize("options", [{}, {"maximize": True}, {"weight_decay": 0.0, "betas": (0.8, 0.95)}], ids=str)
def test_small_parameters_follow_torch(cls: type, options: dict[str, Any], device: torch.device) -> None:
    ours, theirs = parameters(device), parameters(device)
    a = cls(ours, lr=1e-2, min_8bit_size=10**9, **options)
    b = torch.optim.AdamW(theirs, lr=1e-2, **options)
    run(a, ours, range(20))
    run(b, theirs, range(20))
    for p, q in zip(ours, theirs):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


def test_first_step_follows_torch_in_8_bits(device: torch.device) -> None:
    ours, theirs = parameters(device), parameters(device)
    run(AdamW8bit(ours, lr=1e-2), ours, range(1))
    run(torch.optim.AdamW(theirs, lr=1e-2), theirs, range(1))
    for p, q in zip(ours, theirs):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_size_decides_the_state(device: torch.device) -> None:
    params = parameters(device, dtype=torch.bfloat16)
    optimizer = AdamW8bit(params)
    run(optimizer, params, range(1))
    assert [is_quantized(optimizer.state[p]) for p in params] == [True, False, True, False]
    large = optimizer.state[params[0]]
    assert large["exp_avg"].shape == params[0].shape
    assert large["exp_avg_absmax"].shape == (20,)
    assert optimizer.state[params[1]]["exp_avg"].dtype == torch.float32
    assert all(t.device == params[0].device for state in optimizer.state.values() for t in state.values())


def test_groups_keep_their_options(device: torch.device) -> None:
    """One optimizer of groups equals one optimizer per group."""
    options = [
        {"lr": 1e-2, "weight_decay": 0.0},
        {"lr": 1e-3, "betas": (0.8, 0.9), "blocksize": 64},
        {"eps": 1e-3, "maximize": True},
        {"min_8bit_size": 0},
    ]
    together, apart = parameters(device), parameters(device)
    one = AdamW8bit([{"params": [p]} | o for p, o in zip(together, options)] + [{"params": []}])
    several = [AdamW8bit([{"params": [p]} | o]) for p, o in zip(apart, options)]
    for step in range(5):
        set_gradients(together, step)
        set_gradients(apart, step)
        one.step()
        for optimizer in several:
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(together, apart))
    assert is_quantized(one.state[together[3]])


def test_parameters_without_gradient_wait(device: torch.device) -> None:
    """A parameter that now and then has no gradient is updated as if alone, its step count included."""
    waits = {0: (), 1: (2,), 2: (2, 4, 7), 3: (0, 4)}
    together, apart = parameters(device), parameters(device)
    one, several = AdamW8bit(together), [AdamW8bit([p]) for p in apart]
    for step in range(9):
        for params in (together, apart):
            set_gradients(params, step)
            for i, p in enumerate(params):
                p.grad = None if step in waits[i] else p.grad
        for optimizer in (one, *several):
            optimizer.step()
    assert [int(one.state[p]["step"]) for p in together] == [9, 8, 6, 7]
    for p, q, single in zip(together, apart, several):
        assert same([p.detach(), *one.state[p].values()], [q.detach(), *single.state[q].values()])


def test_scheduler_and_tensor_rate(device: torch.device) -> None:
    numbers, tensors = parameters(device), parameters(device)
    a = AdamW8bit(numbers, lr=1e-2)
    b = AdamW8bit(tensors, lr=torch.tensor(1e-2, dtype=torch.float64))
    schedulers = [torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=10) for o in (a, b)]
    for step in range(10):
        for params, optimizer, scheduler in zip((numbers, tensors), (a, b), schedulers):
            set_gradients(params, step)
            optimizer.step()
            scheduler.step()
    assert isinstance(b.param_groups[0]["lr"], torch.Tensor)
    for p, q in zip(numbers, tensors):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)
    assert a.param_groups[0]["lr"] < 1e-9


def test_closure_and_hooks() -> None:
    weight = torch.nn.Parameter(torch.ones(64, 64))
    optimizer = AdamW8bit([weight])
    seen = []
    optimizer.register_step_post_hook(lambda *_: seen.append(True))

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (weight * weight).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 4096
    assert seen == [True]
    assert weight[0, 0] < 1


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_copies_continue_bitwise(cls: type, device: torch.device) -> None:
    params = parameters(device)
    optimizer = cls(params, lr=1e-2)
    run(optimizer, params, range(3))
    bad = params[1].grad.clone().fill_(math.nan)
    params[1].grad = bad
    optimizer.step()
    copies = [copy.deepcopy((optimizer, params)), pickle.loads(pickle.dumps((optimizer, params)))]
    run(optimizer, params, range(3, 6))
    for other, others in copies:
        assert type(other) is cls
        assert other.skipped_steps == 1
        assert other.param_groups[0]["params"][0] is others[0]
        run(other, others, range(3, 6))
        assert same(snapshot(other, others), snapshot(optimizer, params))


def test_non_finite_gradient_skips_the_whole_step(device: torch.device) -> None:
    params = parameters(device)
    optimizer = AdamW8bit([{"params": params[:1]}, {"params": params[1:]}])
    run(optimizer, params, range(2))
    before = snapshot(optimizer, params)
    for index, value in ((0, math.nan), (1, math.inf), (2, -math.inf), (3, 1e20)):
        set_gradients(params, 5)
        params[index].grad.view(-1)[-1] = value
        optimizer.step()
        assert same(snapshot(optimizer, params), before)
        assert optimizer.skipped_steps == index + 1
    other = parameters(device)
    reference = AdamW8bit(other)
    run(reference, other, range(4))
    run(optimizer, params, range(2, 4))
    assert same(snapshot(optimizer, params), snapshot(reference, other))


def test_grad_scaler(device: torch.device) -> None:
    """The scale is undone inside the step; an overflow skips it and is counted."""
    scaled, plain = parameters(device), parameters(device)
    a, b = AdamW8bit(scaled), AdamW8bit(plain)
    scaler = torch.amp.GradScaler(device.type, init_scale=1024.0)
    for step in range(4):
        set_gradients(scaled, step)
        set_gradients(plain, step)
        scaler.scale(torch.zeros((), device=device))  # makes the scaler set up its scale
        for p in scaled:
            p.grad *= 1024.0 if step < 2 else 512.0
        if step == 1:
            scaled[0].grad[0, 0] = math.inf
        scaler.step(a)
        scaler.update()
        if step != 1:
            b.step()
    assert a.skipped_steps == 1
    assert scaler.get_scale() == 512.0
    assert same(snapshot(a, scaled), snapshot(b, plain))


def test_default_dtype_does_not_matter(device: torch.device) -> None:
    ours, others = parameters(device), parameters(device)
    a, b = AdamW8bit(ours, max_norm=0.5), AdamW8bit(others, max_norm=0.5)
    run(a, ours, range(3))
    for step in range(3):
        set_gradients(others, step)
        torch.set_default_dtype(torch.float64)
        try:
            b.step()
        finally:
            torch.set_default_dtype(torch.float32)
    assert same(snapshot(a, ours), snapshot(b, others))


def test_strided_parameters_and_gradients(device: torch.device) -> None:
    plain = [torch.nn.Parameter(torch.randn(80, 64, device=device))]
    strided = [torch.nn.Parameter(plain[0].detach().t().contiguous().t())]
    a, b = AdamW8bit(plain), AdamW8bit(strided)
    for step in range(3):
        set_gradients(plain, step)
        strided[0].grad = plain[0].grad.t().contiguous().t()
        a.step()
        b.step()
    assert strided[0].stride() == (1, 80)
    assert torch.equal(plain[0], strided[0])


def test_mixed_dtypes_in_one_group(device: torch.device) -> None:
    values = torch.randn(3, 70, 70, device=device)
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    together, apart = ([torch.nn.Parameter(v.to(d, copy=True)) for v, d in zip(values, dtypes)] for _ in range(2))
    one, several = AdamW8bit(together), [AdamW8bit([p]) for p in apart]
    for step in range(3):
        set_gradients(together, step)
        set_gradients(apart, step)
        for optimizer in (one, *several):
            optimizer.step()
    for p, q, value, dtype in zip(together, apart, values, dtypes):
        assert p.dtype == dtype
        assert torch.equal(p, q)
        assert not torch.equal(p, value.to(dtype))


def test_no_reference_to_parameters_outside_of_the_groups() -> None:
    params = parameters()
    optimizer = AdamW8bit(params)
    run(optimizer, params, range(1))
    watched = weakref.ref(params[0])
    del optimizer.state[params[0]], params[0]
    del optimizer.param_groups[0]["params"][0]
    gc.collect()
    assert watched() is None


def test_gradients_may_be_replaced_every_step() -> None:
    params = parameters()
    optimizer = AdamW8bit(params)
    for step in range(3):
        optimizer.zero_grad(set_to_none=True)
        optimizer.step()
        assert not optimizer.state
        if step == 2:
            run(optimizer, params, range(1))
    assert len(optimizer.state) == len(params)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr must be at least 0"),
        ({"betas": (1.0, 0.9)}, r"beta1 must be in \[0, 1\)"),
        ({"betas": (0.9, -1.0)}, r"beta2 must be in \[0, 1\)"),
        ({"betas": (0.9,)}, "betas must be two numbers"),
        ({"eps": -1.0}, "eps must be at least 0"),
        ({"weight_decay": -1.0}, "weight_decay must be at least 0"),
        ({"blocksize": 300}, "blocksize must be one of"),
        ({"min_8bit_size": -1}, "min_8bit_size must be at least 0"),
        ({"amsgrad": True}, "amsgrad is not offered"),
    ],
    ids=str,
)
@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_bad_options_are_named(cls: type, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{cls.__name__}: .*{message}"):
        cls(parameters(), **options)
    if options.keys() & {"amsgrad"}:
        return
    optimizer = cls(parameters())
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": parameters(seed=1)} | options)
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("dtype", [torch.int32, torch.complex64, torch.float64], ids=str)
def test_bad_parameters_are_named(dtype: torch.dtype) -> None:
    bad = torch.nn.Parameter(torch.zeros(4, 4, dtype=dtype), requires_grad=False)
    with pytest.raises(
        ValueError, match=rf"AdamW8bit: param_groups\[0\]\['params'\]\[1\] must be dense .* got {dtype}"
    ):
        AdamW8bit([torch.nn.Parameter(torch.zeros(3)), bad])
    with pytest.raises(ValueError, match=r"AdamW8bit: parameter 'model\.weight' must be dense"):
        AdamW8bit([("model.weight", bad)])


def test_shared_and_repeated_parameters_are_refused() -> None:
    shared = torch.nn.Parameter(torch.zeros(1).expand(8))
    with pytest.raises(ValueError, match="an expanded tensor"):
        AdamW8bit([shared])
    weight = torch.nn.Parameter(torch.zeros(8))
    with pytest.raises(ValueError, match="holds a parameter twice"), pytest.warns(UserWarning, match="duplicate"):
        AdamW8bit([weight, weight])


def test_sparse_gradients_are_refused_before_anything_changes() -> None:
    params = parameters()
    embedding = torch.nn.Embedding(100, 50, sparse=True)
    optimizer = AdamW8bit([*params, *embedding.parameters()])
    set_gradients(params, 0)
    before = [p.detach().clone() for p in params]
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(
        ValueError, match=r"the gradient of param_groups\[0\]\['params'\]\[4\] must be dense .*SparseAdam"
    ):
        optimizer.step()
    assert same(before, [p.detach() for p in params])
    assert not optimizer.state


@pytest.mark.parametrize("budget", ["auto", 0, 10**9])
def test_paged_equals_unpaged(budget: Any, device: torch.device) -> None:
    a, b = parameters(device), parameters(device)
    paged, plain = PagedAdamW8bit(a, 1e-2, device_budget=budget), AdamW8bit(b, 1e-2)
    assert paged.device_budget == budget
    run(paged, a, range(3))
    run(plain, b, range(3))
    assert same(snapshot(paged, a), snapshot(plain, b))
    plain.load_state_dict(paged.state_dict())
    paged.load_state_dict(plain.state_dict())
    assert paged.device_budget == budget
    assert pickle.loads(pickle.dumps(paged)).device_budget == budget


@pytest.mark.parametrize(
    ("budget", "error"), [(-1, ValueError), ("lots", TypeError), (1.5, TypeError), (True, TypeError), (None, TypeError)]
)
def test_bad_budgets_are_named(budget: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r'PagedAdamW8bit: device_budget is .*; give "auto" or a number of bytes'):
        PagedAdamW8bit(parameters(), device_budget=budget)
