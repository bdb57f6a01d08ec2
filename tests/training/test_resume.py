"""An interrupted and resumed training ends with the same bits as an uninterrupted one, and no pickle is involved."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from peftkern.training.errors import Interrupted, UserError
from peftkern.training.output import recall
from peftkern.training.run import finetune
from peftkern.training.settings import FinetuneSettings, build
from peftkern.training.state_file import load_state
from peftkern.training.trainer import FinetuneTrainer, last_checkpoint

Make = Callable[..., FinetuneSettings]


@pytest.fixture
def interrupt_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sends this process Ctrl-C while it trains the given step."""
    step = FinetuneTrainer.training_step
    pending: list[int] = []

    def training_step(self: FinetuneTrainer, *args: object) -> torch.Tensor:
        if pending and self.state.global_step + 1 == pending[0]:
            pending.clear()
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, *args)

    monkeypatch.setattr(FinetuneTrainer, "training_step", training_step)
    return pending.append


def assert_same(one: Any, other: Any, where: str) -> None:
    """Equal types, values and bits; dicts in any order."""
    assert type(one) is type(other), where
    if isinstance(one, (torch.Tensor, np.ndarray)):
        one, other = torch.as_tensor(one), torch.as_tensor(other)
        assert one.dtype == other.dtype, where
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for index, items in enumerate(zip(one, other, strict=True)):
            assert_same(*items, f"{where}.{index}")
    else:
        assert one == other, where


def assert_same_checkpoints(one: Path, other: Path) -> None:
    states = ["optimizer.safetensors", "scheduler.safetensors", "rng_state_0.safetensors"]
    names = sorted(p.name for p in one.glob("*.safetensors"))
    assert len(names) == 4
    assert names == sorted(p.name for p in other.glob("*.safetensors"))
    for name in names:
        read = load_state if name in states else load_file
        assert_same(read(one / name), read(other / name), name)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("full", {"optimizer": "adamw8bit"}),
        ("qlora", {"lora_dropout": 0.2, "optimizer": "paged_adamw8bit"}),
        ("adapter", {"gradient_checkpointing": True}),
        ("ptuning_v2", {"method_options": {"projection": True, "projection_dim": 64, "dropout": 0.2}}),
    ],
)
def test_resumed_equals_uninterrupted(
    method: str,
    options: dict,
    make_settings: Make,
    console: Console,
    tmp_path: Path,
    interrupt_at: Callable[[int], None],
) -> None:
    common = {"method": method, "save_steps": 8, "gradient_accumulation": 2, "batch_size": 3, **options}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    expected = finetune(make_settings(output=str(whole), **common), console)

    interrupt_at(7)  # in the second pass over the data
    with pytest.raises(Interrupted, match=r"after step 7 of 8.*--resume --output"):
        finetune(make_settings(output=str(parts), **common), console)
    assert last_checkpoint(parts) == parts / "checkpoint-7"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    resumed = finetune(build(FinetuneSettings, recall({"output": str(parts)})), console)
    assert resumed["resumed_from_step"] == 7
    assert resumed["heldout"]["loss_after"] == expected["heldout"]["loss_after"]
    assert resumed["heldout"]["loss_after"] != expected["heldout"]["loss_before"]
    assert_same_checkpoints(whole / "checkpoint-8", parts / "checkpoint-8")
    (name,) = (path.name for path in whole.glob("*.safetensors"))
    assert_same(load_file(whole / name), load_file(parts / name), name)


def test_checkpoints_hold_no_pickle(make_settings: Make, console: Console) -> None:
    settings = make_settings(save_steps=4)
    finetune(settings, console)
    files = [p.name for p in Path(str(settings.output)).rglob("*") if p.is_file()]
    assert {name.rsplit(".", 1)[1] for name in files} == {"safetensors", "json"}
    assert (Path(str(settings.output)) / "checkpoint-8").is_dir()


def test_second_ctrl_c_stops_at_once(make_settings: Make, console: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    def training_step(self: FinetuneTrainer, *args: object) -> torch.Tensor:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("still training")

    monkeypatch.setattr(FinetuneTrainer, "training_step", training_step)
    with pytest.raises(KeyboardInterrupt):
        finetune(make_settings(), console)


def test_ctrl_c_that_is_ignored_stays_ignored(
    make_settings: Make, console: Console, interrupt_at: Callable[[int], None]
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as under nohup; the fixture of all tests puts it back
    interrupt_at(2)
    assert finetune(make_settings(max_steps=3), console)["steps"] == 3
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_resume_of_a_finished_run_trains_no_further(make_settings: Make, console: Console) -> None:
    settings = make_settings(save_steps=8)
    expected = finetune(settings, console)
    again = finetune(build(FinetuneSettings, recall({"output": settings.output})), console)
    assert again["tokens"] == 0
    assert again["heldout"]["loss_after"] == expected["heldout"]["loss_after"]


def test_half_written_checkpoints_are_passed_over(tmp_path: Path) -> None:
    for name, text in (("checkpoint-2", "{}"), ("checkpoint-10", "{"), ("checkpoint-x", "{}")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "trainer_state.json").write_text(text)
    (tmp_path / "checkpoint-30").mkdir()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-2"


def test_failed_checkpoint_is_removed_and_the_older_kept(
    make_settings: Make, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = FinetuneTrainer._save_rng_state

    def full_disk(self: FinetuneTrainer, directory: str) -> None:
        if self.state.global_step == 6:
            raise OSError(28, "No space left on device")
        save(self, directory)

    monkeypatch.setattr(FinetuneTrainer, "_save_rng_state", full_disk)
    settings = make_settings(save_steps=3)
    with pytest.raises(OSError, match="No space left"):
        finetune(settings, console)
    assert [p.name for p in Path(str(settings.output)).glob("checkpoint-*")] == ["checkpoint-3"]
    assert last_checkpoint(str(settings.output)) is not None


def test_resume_refuses_another_training(make_settings: Make, console: Console, tmp_path: Path) -> None:
    settings = make_settings()
    finetune(settings, console)
    with pytest.raises(UserError, match=r"had --rank 16, not 8"):
        recall({"output": settings.output, "rank": 8})
    assert recall({"output": settings.output, "rank": 16, "save_steps": 3})["save_steps"] == 3
    with pytest.raises(UserError, match="holds no run to go on with"):
        recall({"output": str(tmp_path / "nothing")})
    with pytest.raises(UserError, match="needs --output"):
        recall({})
    with pytest.raises(UserError, match="holds no whole checkpoint"):
        finetune(build(FinetuneSettings, recall({"output": settings.output})), console)
