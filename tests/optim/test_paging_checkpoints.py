"""PagedAdamW8bit's checkpoints, taken while pages are in flight; and the trainers that take them."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from paging_cases import groups, on_device, on_host, parameters, run, same, snapshot

from peftkern.optim import AdamW8bit

pytestmark = pytest.mark.usefixtures("small_segments")


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
