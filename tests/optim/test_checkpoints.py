"""Checkpoints: bitwise resume, states that are never cast, bitsandbytes' state dicts both ways, refusals."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch

from peftkern.ops._code_tables import dynamic_map
from peftkern.ops.adamw8bit import reference
from peftkern.optim import AdamW8bit, PagedAdamW8bit
from peftkern.optim.state import BNB_WRAPPER, QMAPS

OPTIMIZERS = (AdamW8bit, PagedAdamW8bit)
SHAPES = ((80, 64), (100,), (64, 70), (5, 5))
STEPS = 20


def parameters(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(s, generator=generator).to(device, dtype)) for s in SHAPES]


def build(cls: type, params: list[Any], **options: Any) -> tuple[Any, Any]:
    groups = [{"params": params[:2], "weight_decay": 0.1}, {"params": params[2:], "lr": 3e-3}]
    optimizer = cls(groups, lr=1e-2, **options)
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=STEPS)


def run(optimizer: Any, scheduler: Any, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for group in optimizer.param_groups:
            for i, p in enumerate(group["params"]):
                grad = torch.randn(p.shape, generator=generator) * 10 ** (-4 * torch.rand(p.shape, generator=generator))
                p.grad = None if (step + i) % 5 == 4 else grad.to(p.device, p.dtype)
        optimizer.step()
        scheduler.step()


def through_a_file(state_dict: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def tensors(optimizer: Any) -> list[torch.Tensor]:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return [p.detach() for p in params] + [t for p in params for _, t in sorted(optimizer.state.get(p, {}).items())]


def same(a: Any, b: Any) -> bool:
    x, y = tensors(a), tensors(b)
    return len(x) == len(y) and all(s.dtype == t.dtype and torch.equal(s, t) for s, t in zip(x, y))


@pytest.mark.parametrize("cls", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_resume_at_every_step_equals_not_stopping(cls: type, dtype: torch.dtype, device: torch.device) -> None:
    whole = build(cls, parameters(device, dtype))
    checkpoints = []
    for step in range(STEPS):
        saved = [p.detach().clone() for p in tensors(whole[0])[: len(SHAPES)]]
        checkpoints.append(
            (saved, through_a_file({"optimizer": whole[0].state_dict(), "scheduler": whole[1].state_dict()}))
        )
        run(*whole, range(step, step + 1))
    for cut, (values, checkpoint) in enumerate(checkpoints):
        resumed = build(cls, [torch.nn.Parameter(v.clone()) for v in values])
        resumed[0].load_state_dict(checkpoint["optimizer"])
        resumed[1].load_state_dict(checkpoint["scheduler"])
        run(*resumed, range(cut, STEPS))
        assert same(resumed[0], whole[0]), f"differs when resumed at step {cut}"


def test_loading_never_casts_or_aliases(device: torch.device) -> None:
    source = build(AdamW8bit, parameters(device, torch.bfloat16))
    run(*source, range(3))
    saved = source[0].state_dict()
    untouched = copy.deepcopy(saved)
    target = build(AdamW8bit, parameters(device, torch.bfloat16))
    target[0].load_state_dict(saved)
    dtypes = {name: t.dtype for name, t in target[0].state[target[0].param_groups[0]["params"][0]].items()}
    assert dtypes == {
        "step": torch.float32,
        "exp_avg": torch.uint8,
        "exp_avg_sq": torch.uint8,
        "exp_avg_absmax": torch.float32,
        "exp_avg_sq_absmax": torch.float32,
        "exp_avg_qmap": torch.float32,
        "exp_avg_sq_qmap": torch.float32,
    }
    run(*target, range(3, 6))
    for index, state in untouched["state"].items():
        for name, value in state.items():
            assert torch.equal(saved["state"][index][name], value), f"loading shares {name} with the checkpoint"


def test_parameters_at_one_count_share_it_after_loading() -> None:
    """What lets a group be updated in one call."""
    source = build(AdamW8bit, parameters())
    run(*source, range(2))
    target = build(AdamW8bit, parameters())
    target[0].load_state_dict(through_a_file(source[0].state_dict()))
    states = [target[0].state[p] for group in target[0].param_groups for p in group["params"]]
    assert states[0]["step"] is states[1]["step"]
    assert states[0]["exp_avg_qmap"] is states[2]["exp_avg_qmap"] is dynamic_map(True)


def test_hooks_see_the_checkpoint() -> None:
    source = build(AdamW8bit, parameters())
    run(*source, range(2))
    target = build(AdamW8bit, parameters())
    seen = []

    def rescale(optimizer: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        seen.append(sorted(state_dict["state"][0]))
        return state_dict | {"param_groups": [g | {"lr": 0.5} for g in state_dict["param_groups"]]}

    target[0].register_load_state_dict_pre_hook(rescale)
    target[0].register_load_state_dict_post_hook(lambda o: seen.append(o.state[o.param_groups[0]["params"][0]].keys()))
    target[0].load_state_dict(source[0].state_dict())
    assert "exp_avg_absmax" in seen[0]
    assert "exp_avg_absmax" in seen[1]
    assert [group["lr"] for group in target[0].param_groups] == [0.5, 0.5]


def test_torch_checkpoint_becomes_32_bit_state(device: torch.device) -> None:
    source = build(torch.optim.AdamW, parameters(device))
    run(*source, range(3))
    values = [p.detach().clone() for p in tensors(source[0])[: len(SHAPES)]]
    target = build(AdamW8bit, [torch.nn.Parameter(v) for v in values])
    target[0].load_state_dict(through_a_file(source[0].state_dict()))
    target[1].load_state_dict(source[1].state_dict())
    run(*source, range(3, 8))
    run(*target, range(3, 8))
    for a, b in zip(tensors(target[0])[: len(SHAPES)], tensors(source[0])):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def decoded(state: dict[str, torch.Tensor], moment: str) -> torch.Tensor:
    if state[moment].dtype != torch.uint8:
        return state[moment].flatten()
    return reference.decode(state[moment], state[f"{moment}_absmax"], state[f"{moment}_qmap"], 256)


@pytest.mark.parametrize("wrapped", [True, False])
def test_bitsandbytes_checkpoints_load(wrapped: bool) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    theirs = build(bnb.optim.AdamW8bit, parameters())
    run(*theirs, range(4))
    checkpoint = theirs[0].state_dict()
    if not wrapped:
        for state in checkpoint["state"].values():
            state |= state.pop(BNB_WRAPPER)
    values = [p.detach().clone() for p in tensors(theirs[0])[: len(SHAPES)]]
    ours = build(AdamW8bit, [torch.nn.Parameter(v) for v in values])
    ours[0].load_state_dict(through_a_file(checkpoint))
    ours[1].load_state_dict(theirs[1].state_dict())
    for (p, state), q in zip(theirs[0].state.items(), [p for g in ours[0].param_groups for p in g["params"]]):
        loaded = ours[0].state[q]
        assert int(loaded["step"]) == state["step"]
        assert torch.equal(loaded["exp_avg"], state["state1"])
        assert torch.equal(loaded["exp_avg_sq"], state["state2"])
        if p.numel() >= 4096:
            assert torch.equal(loaded["exp_avg_absmax"], state["absmax1"])
            assert torch.equal(loaded["exp_avg_sq_qmap"], state["qmap2"])
    assert ours[0].param_groups[1]["lr"] == theirs[0].param_groups[1]["lr"]
    run(*theirs, range(4, 5))
    run(*ours, range(4, 5))
    for a, b in zip(tensors(ours[0])[: len(SHAPES)], tensors(theirs[0])):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_code_books_of_a_checkpoint_are_honoured() -> None:
    """numpy's linspace gives a map that differs in last bits; another package may store a linear one."""
    source = build(AdamW8bit, parameters())
    run(*source, range(3))
    checkpoint = through_a_file(source[0].state_dict())
    books = [torch.linspace(low, 1, 256) for low in (-1.0, 0.0)]
    for state in checkpoint["state"].values():
        state |= dict(zip(QMAPS, books)) if "exp_avg_qmap" in state else {}
    target = build(AdamW8bit, parameters())
    target[0].load_state_dict(checkpoint)
    states = [target[0].state[p] for group in target[0].param_groups for p in group["params"]]
    assert torch.equal(states[0]["exp_avg_qmap"], books[0])
    assert states[0]["exp_avg_qmap"] is states[2]["exp_avg_qmap"]
    run(*target, range(3, 5))
    assert torch.equal(states[0]["exp_avg_sq_qmap"], books[1])


def test_bitsandbytes_loads_ours() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    ours = build(AdamW8bit, parameters())
    run(*ours, range(4))
    checkpoint = through_a_file(ours[0].bitsandbytes_state_dict())
    values = [p.detach().clone() for p in tensors(ours[0])[: len(SHAPES)]]
    theirs = build(bnb.optim.AdamW8bit, [torch.nn.Parameter(v) for v in values])
    expected = theirs[0].state_dict()["param_groups"][0].keys()
    theirs[0].load_state_dict(checkpoint)
    theirs[1].load_state_dict(ours[1].state_dict())
    assert expected <= theirs[0].param_groups[0].keys()
    run(*ours, range(4, 5))
    run(*theirs, range(4, 5))
    for a, b in zip(tensors(ours[0])[: len(SHAPES)], tensors(theirs[0])):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    back = build(AdamW8bit, parameters())
    back[0].load_state_dict(checkpoint)
    source = build(AdamW8bit, parameters())
    run(*source, range(4))
    assert [t for t in tensors(back[0])[4:] if t.dtype == torch.uint8]
    assert all(torch.equal(a, b) for a, b in zip(tensors(back[0])[4:], tensors(source[0])[4:]))


def test_what_bitsandbytes_cannot_hold_is_refused() -> None:
    with pytest.raises(ValueError, match="blocks of 256 only"):
        AdamW8bit(parameters(), blocksize=128).bitsandbytes_state_dict()
    with pytest.raises(ValueError, match="no maximize"):
        AdamW8bit(parameters(), maximize=True).bitsandbytes_state_dict()


def spoil(name: str, change: Any) -> Any:
    def apply(checkpoint: dict[str, Any]) -> None:
        checkpoint["state"][2][name] = change(checkpoint["state"][2][name])

    return apply


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (spoil("exp_avg", lambda t: t[:3]), r"exp_avg of shape \[3, 70\], the parameter \[64, 70\]"),
        (spoil("exp_avg", lambda t: t.to(torch.int16)), "exp_avg in torch.int16, not uint8 codes"),
        (spoil("exp_avg_sq", lambda t: t.bfloat16()), "exp_avg in torch.uint8|exp_avg_sq in torch.bfloat16"),
        (spoil("exp_avg_absmax", lambda t: t[::2]), "9 block scales in exp_avg_absmax, 18 are needed"),
        (spoil("exp_avg_absmax", lambda t: t.bfloat16()), "exp_avg_absmax in torch.bfloat16, not float32"),
        (spoil("exp_avg_sq_absmax", lambda t: -t), "negative or not finite"),
        (spoil("exp_avg_qmap", lambda t: t[:16]), "exp_avg_qmap that is no code book"),
        (spoil("exp_avg_qmap", lambda t: t.flip(0)), "exp_avg_qmap that is no code book"),
        (spoil("exp_avg_sq_qmap", lambda t: dynamic_map(True)), "exp_avg_sq_qmap that is no code book"),
        (lambda c: c["state"][2].pop("exp_avg_sq_absmax"), "no 'exp_avg_sq_absmax'"),
        (lambda c: c["state"][2].pop("step"), "lacks 'step'"),
        (lambda c: c["state"][2].update(max_exp_avg_sq=torch.zeros(1)), "AMSGrad"),
        (lambda c: c["param_groups"].pop(), r"groups of \[2\] parameters, the optimizer of \[2, 2\]"),
        (lambda c: c["param_groups"][0].update(lr=-1.0), "lr must be at least 0"),
        (lambda c: c["param_groups"][1].update(blocksize=128), "blocksize is 128, the optimizer's 256"),
        (lambda c: c["param_groups"][1].update(amsgrad=True), "AMSGrad"),
    ],
)
def test_a_checkpoint_that_does_not_fit_changes_nothing(damage: Any, message: str) -> None:
    source = build(AdamW8bit, parameters())
    run(*source, range(3))
    checkpoint = through_a_file(source[0].state_dict())
    target, untouched = build(AdamW8bit, parameters()), build(AdamW8bit, parameters())
    run(*target, range(5))
    run(*untouched, range(5))
    damage(checkpoint)
    groups = [{k: v for k, v in g.items() if k != "params"} for g in target[0].param_groups]
    with pytest.raises(ValueError, match=f"AdamW8bit.*{message}"):
        target[0].load_state_dict(checkpoint)
    assert same(target[0], untouched[0])
    assert groups == [{k: v for k, v in g.items() if k != "params"} for g in target[0].param_groups]
    run(*target, range(5, 7))
    run(*untouched, range(5, 7))
    assert same(target[0], untouched[0])


def test_blocksize_of_old_checkpoints() -> None:
    """bitsandbytes before 0.44 used blocks of 2048: the message says how to go on, and that works."""
    source = build(AdamW8bit, parameters(), blocksize=2048)
    run(*source, range(2))
    checkpoint = source[0].state_dict()
    for group in checkpoint["param_groups"]:
        del group["blocksize"]
    with pytest.raises(ValueError, match="construct AdamW8bit with the blocksize of the checkpoint"):
        build(AdamW8bit, parameters())[0].load_state_dict(checkpoint)
    target = build(AdamW8bit, parameters(), blocksize=2048)
    target[0].load_state_dict(checkpoint)
    assert all(torch.equal(a, b) for a, b in zip(tensors(target[0])[4:], tensors(source[0])[4:]))


@pytest.mark.parametrize("decades", [0, 3, 6])
def test_states_are_within_a_code_of_bitsandbytes(decades: int, device: torch.device) -> None:
    """Step by step from bitsandbytes' states. Its CPU build looks codes up in 65,536 uniform bins from -1 to 1, so
    there they may be more than one apart within a bin, where the books are finer than that. Its CUDA kernel works out
    a gradient's share, 1 - beta, in float32 from a beta that is rounded already: 1.3e-5 less for 0.999. Else a scale
    is a few roundings away from theirs, of 6e-8 each: code times scale, two products, a sum."""
    bnb = pytest.importorskip("bitsandbytes")
    generator = torch.Generator().manual_seed(0)
    spread = 10 ** (-decades * torch.rand(64, 256, generator=generator))
    start = torch.randn(64, 256, generator=generator).to(device) * 0.02
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    optimizer, other = AdamW8bit([ours], lr=1e-3), bnb.optim.AdamW8bit([theirs], lr=1e-3)
    slack = 2 / 65536 if device.type == "cpu" else 0.0
    for _ in range(6):
        ours.grad = theirs.grad = (torch.randn(64, 256, generator=generator) * 1e-3 * spread).to(device)
        optimizer.step()
        other.step()
        own, peer = optimizer.state[ours], other.state[theirs]
        for name, i, share in (("exp_avg", 1, 0.1), ("exp_avg_sq", 2, 0.001)):
            codes, others = own[name].long(), peer[f"state{i}"].long()
            book = own[f"{name}_qmap"]
            apart = (codes - others).abs()
            assert torch.all((apart <= 1) | ((book[codes] - book[others]).abs() <= slack)), name
            rounded = float(1 - torch.tensor(1 - share)) if device.type == "cuda" else share
            rtol = 1e-6 + abs(rounded / share - 1)
            torch.testing.assert_close(own[f"{name}_absmax"], peer[f"absmax{i}"], rtol=rtol, atol=0)
            own[name].copy_(peer[f"state{i}"])
            own[f"{name}_absmax"].copy_(peer[f"absmax{i}"])
        with torch.no_grad():
            ours.copy_(theirs)
