"""Whole trainings: every method learns, saves, and gives the same held-out loss after loading from disk."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console

from peftkern.training import run
from peftkern.training.errors import UserError
from peftkern.training.evaluate import heldout_loss, sample
from peftkern.training.model import load_model, load_tokenizer
from peftkern.training.run import finetune
from peftkern.training.settings import FinetuneSettings

Make = Callable[..., FinetuneSettings]


def text_of(console: Console) -> str:
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("method", ["full", "lora", "qlora", "adapter", "prompt", "ptuning_v2"])
def test_every_method(method: str, make_settings: Make, console: Console) -> None:
    settings = make_settings(method=method, sample_tokens=6, warmup_ratio=0.1, epochs=3.0, max_steps=None)
    report = finetune(settings, console)
    heldout = report["heldout"]
    assert heldout["loss_after"] < heldout["loss_before"]
    assert heldout["loss_reloaded"] == heldout["loss_after"]
    assert heldout["reloaded_bitwise_equal"]
    assert heldout["perplexity_after"] == math.exp(heldout["loss_after"])
    assert report["steps"] == 12  # 32 blocks by 8, three times
    assert report["tokens"] == 3 * 32 * 32  # padding of the last block included
    assert report["history"][0]["step"] == 1
    assert report["peak_memory_bytes"] >= report["memory_before_model_bytes"] > 0
    assert report["trainable_parameters"] <= report["total_parameters"]
    directory = Path(str(settings.output))
    assert json.loads((directory / "report.json").read_text())["heldout"] == heldout
    weights = "model.safetensors" if method == "full" else "adapter_model.safetensors"
    assert (directory / weights).is_file()
    text = text_of(console)
    assert f"trainable params: {report['trainable_parameters']:,} || all params: " in text
    assert "--- sample after ---" in text
    assert "the held-out loss is the same (bitwise)" in text


def test_the_same_seed_gives_the_same_bits_with_and_without_samples(make_settings: Make, console: Console) -> None:
    losses = [
        finetune(make_settings(method="lora", lora_dropout=0.1, overwrite=True, **options), console)["heldout"][
            "loss_after"
        ]
        for options in ({"sample_tokens": 0}, {"sample_tokens": 8}, {"seed": 1})
    ]
    assert losses[0] == losses[1] != losses[2]


def test_a_damaged_save_is_noticed(make_settings: Make, console: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    from peftkern.formats import adapter

    load = adapter.load_adapter

    def lossy(model: torch.nn.Module, directory: Path) -> torch.nn.Module:
        load(model, directory)
        next(p for name, p in model.named_parameters() if "lora_B" in name).data += 0.1
        return model

    monkeypatch.setattr(adapter, "load_adapter", lossy)
    with pytest.raises(RuntimeError, match=r"gives a held-out loss of .* after loading, not"):
        finetune(make_settings(method="lora"), console)


@pytest.mark.parametrize("failing", ["model", "tokenizer"])
def test_a_full_disk_keeps_the_earlier_model_whole(
    failing: str, make_settings: Make, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import PreTrainedModel
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

    settings = make_settings(method="full", max_steps=2)
    finetune(settings, console)
    directory = Path(str(settings.output))

    def results() -> dict[str, bytes]:
        return {p.name: p.read_bytes() for p in directory.iterdir() if p.name not in ("settings.json", "report.json")}

    before = results()
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= set(before)

    def full_disk(self: object, where: str, **kwargs: object) -> None:
        Path(where, "tokenizer.json").write_text("{")
        raise OSError(28, "No space left on device")

    cls = PreTrainedModel if failing == "model" else PreTrainedTokenizerBase
    monkeypatch.setattr(cls, "save_pretrained", full_disk)
    with pytest.raises(OSError, match=r"No space left on device; what it held is untouched; free space or pick"):
        finetune(make_settings(method="full", max_steps=3, overwrite=True), console)
    assert results() == before


def test_divergence_is_an_error(make_settings: Make, console: Console) -> None:
    settings = make_settings(method="full", learning_rate=1e30, max_grad_norm=0.0, optimizer="adamw")
    with pytest.raises(UserError, match=r"diverged.*lower --learning-rate"):
        finetune(settings, console)
    assert not (Path(str(settings.output)) / "model.safetensors").exists()


def test_gradient_accumulation_equals_a_larger_batch(make_settings: Make, console: Console) -> None:
    shared = {"method": "full", "optimizer": "adamw", "overwrite": True, "max_steps": 4}
    whole = finetune(make_settings(batch_size=8, **shared), console)
    parts = finetune(make_settings(batch_size=2, gradient_accumulation=4, **shared), console)
    assert parts["heldout"]["loss_after"] == pytest.approx(whole["heldout"]["loss_after"], rel=1e-4)


def test_bfloat16_on_the_cpu(make_settings: Make, console: Console) -> None:
    report = finetune(make_settings(method="qlora", dtype="bfloat16"), console)
    assert report["heldout"]["loss_after"] < report["heldout"]["loss_before"]
    assert report["heldout"]["reloaded_bitwise_equal"]


def test_warnings_and_method_options(make_settings: Make, console: Console) -> None:
    finetune(
        make_settings(
            method="lora", rank=4, target_modules=["up_proj"], warmup_ratio=0.0, method_options={"use_rslora": True}
        ),
        console,
    )
    text = text_of(console)
    assert "warning: rank 4 is low" in text
    assert "warning: no attention projection is a target" in text
    assert "warning: no warm-up" in text
    with pytest.raises(ValueError, match=r"unknown field 'rslora'"):
        finetune(make_settings(method="lora", method_options={"rslora": True}, overwrite=True), console)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_length": 65}, "--max-length 65 exceed the 64 positions"),
        ({"method": "prompt", "max_length": 50}, "20 virtual tokens exceed .* use --max-length 44 or less"),
        ({"dtype": "float16"}, "--dtype float16 needs a GPU"),
        ({"method": "lora", "target_modules": ["q_prj"]}, "q_proj"),
    ],
)
def test_settings_that_do_not_fit_the_model(fields: dict, message: str, make_settings: Make, console: Console) -> None:
    if torch.cuda.is_available() and "dtype" in fields:
        pytest.skip("a GPU takes float16")
    with pytest.raises(ValueError, match=message):
        finetune(make_settings(**fields), console)


def test_block_length_by_default_fits_the_model(make_settings: Make) -> None:
    assert run.block_length(make_settings(max_length=None)) == 64 - 20
    assert run.block_length(make_settings(max_length=None, num_tokens=4, method="prompt")) == 60
    assert run.block_length(make_settings(max_length=64, method="lora")) == 64


def test_heldout_loss_is_the_mean_over_tokens(make_settings: Make) -> None:
    settings = make_settings()
    tokenizer = load_tokenizer(str(settings.model))
    corpus = run._corpus(settings, tokenizer)
    model = load_model(str(settings.model), torch.float32).double()
    total = count = 0.0
    for block in corpus.heldout:
        logits = model(block["input_ids"][None]).logits[0, :-1]
        losses = torch.nn.functional.cross_entropy(logits, block["labels"][1:], reduction="none")
        total, count = total + losses.sum().item(), count + losses.numel()
    assert corpus.heldout.counted_tokens == count
    for batch_size in (1, 3):
        assert heldout_loss(model, corpus.heldout, batch_size, torch.float32) == pytest.approx(
            total / count, rel=1e-6
        )  # Transformers' loss is float32


def test_samples_are_seeded_and_leave_the_random_state_alone(base: Path) -> None:
    model, tokenizer = load_model(str(base), torch.float32), load_tokenizer(str(base))
    state = torch.get_rng_state()
    first, again, other = (sample(model, tokenizer, "the value", 12, seed, torch.float32) for seed in (1, 1, 2))
    assert first == again != other
    assert torch.equal(torch.get_rng_state(), state)
