"""One fine-tuning, from settings to saved results: what `peftkern finetune` does."""

from __future__ import annotations

import json
import math
import os
import platform
import shlex
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from peftkern.formats.atomic import atomic_write_text
from peftkern.training import memory, output
from peftkern.training.data import Corpus, load_corpus, steps_per_epoch
from peftkern.training.defaults import default_learning_rate, method_config, warnings_for
from peftkern.training.errors import Interrupted, UserError
from peftkern.training.evaluate import default_prompt, heldout_loss, perplexity, sample
from peftkern.training.model import (
    check_tokenizer_fits,
    compute_dtype,
    context_length,
    default_device,
    load_model,
    load_tokenizer,
    parameter_count,
)
from peftkern.training.settings import FinetuneSettings

# On a GPU, sums may be ordered differently in another process's memory layout; on the CPU they are not.
GPU_RELOAD_TOLERANCE = 1e-3
DEFAULT_LENGTH = 512


def finetune(settings: FinetuneSettings, console: Console) -> dict[str, Any]:
    """Trains, evaluates before and after, saves, reloads from disk and compares.

    Args:
        settings: validated.
        console: where the person reads along.

    Returns:
        The report that is also saved as `report.json` in the output directory.

    Raises:
        UserError: input that cannot be used, or a training that diverged.
        Interrupted: Ctrl-C; a checkpoint was saved.
        RuntimeError: the reloaded adapter does not give the trained model's held-out loss.
    """
    started = time.perf_counter()
    main = int(os.environ.get("RANK", "0")) == 0
    if not main:
        console.quiet = True
    settings.output = settings.output or f"runs/{settings.method}"
    kind = "model" if settings.method == "full" else "adapter"
    directory = output.prepare(settings, kind, settings.resume) if main else Path(settings.output)
    device = default_device()
    dtype = compute_dtype(settings.dtype, device)
    if dtype == torch.float16 and device.type == "cpu":
        raise UserError("--dtype float16 needs a GPU; use float32 or bfloat16 on the CPU")

    from peftkern.training.trainer import last_checkpoint

    checkpoint = last_checkpoint(directory) if settings.resume else None
    if settings.resume and checkpoint is None:
        raise UserError(f"--resume: {directory} holds no whole checkpoint; start anew with --overwrite")
    assert settings.model is not None
    tokenizer = load_tokenizer(settings.model)
    settings.max_length = block_length(settings)
    corpus = _corpus(settings, tokenizer)
    idle = memory.resident()
    base_dtype = torch.float32 if settings.method == "full" else dtype
    model = load_model(settings.model, base_dtype).to(device)
    check_tokenizer_fits(model, tokenizer, settings.model)
    base_parameters = parameter_count(model)
    learning_rate = settings.learning_rate or default_learning_rate(settings.method, base_parameters)
    _describe(settings, corpus, base_parameters, learning_rate, dtype, device, console)

    prompt = settings.prompt or default_prompt(corpus.first_text)
    before = heldout_loss(model, corpus.heldout, settings.batch_size, dtype)
    sample_before = _sample(settings, model, tokenizer, prompt, dtype)
    trainable, total = _apply(settings, model, tokenizer, learning_rate, base_parameters, console)

    if main:
        if settings.overwrite:
            output.discard_checkpoints(directory)
        output.remember(settings, directory)
    trained = _train(settings, model, corpus, learning_rate, dtype, checkpoint, console)
    peak = memory.peak(device)

    model.eval()
    after = heldout_loss(model, corpus.heldout, settings.batch_size, dtype)
    if not math.isfinite(after):
        raise UserError(f"training diverged: the held-out loss is {after}; lower --learning-rate")
    sample_after = _sample(settings, model, tokenizer, prompt, dtype)
    report = {
        "method": settings.method,
        "model": settings.model,
        "learning_rate": learning_rate,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "trainable_parameters": trainable,
        "total_parameters": total,
        **trained,
        "peak_memory_bytes": peak,
        "memory_before_model_bytes": idle if device.type == "cpu" else 0,
        "heldout": {
            "tokens": corpus.heldout.counted_tokens,
            "loss_before": before,
            "loss_after": after,
            "perplexity_before": perplexity(before),
            "perplexity_after": perplexity(after),
        },
        "sample": {"prompt": prompt, "before": sample_before, "after": sample_after},
        "versions": _versions(),
        "settings": asdict(settings),
    }
    if main:
        _save_and_verify(settings, model, tokenizer, corpus, base_dtype, dtype, after, directory, report, console)
        report["wall_seconds"] = time.perf_counter() - started
        atomic_write_text(directory / output.REPORT, json.dumps(report, indent=2) + "\n")
        _summarize(report, directory, console)
    return report


def _corpus(settings: FinetuneSettings, tokenizer: Any) -> Corpus:
    assert settings.data is not None
    assert settings.max_length is not None
    return load_corpus(
        settings.data,
        settings.eval_data,
        settings.eval_fraction,
        settings.text_field,
        tokenizer,
        settings.max_length,
        settings.seed,
    )


def block_length(settings: FinetuneSettings) -> int:
    """The block length: what was asked for, else 512 tokens or what fits the model beside the virtual tokens.

    The default leaves room for virtual tokens whatever the method, so that every method gets the same blocks.

    Raises:
        UserError: blocks and virtual tokens that exceed the model's positions.
    """
    assert settings.model is not None
    limit = context_length(settings.model)
    if settings.max_length is None:
        return DEFAULT_LENGTH if limit is None else max(2, min(DEFAULT_LENGTH, limit - settings.num_tokens))
    virtual = settings.num_tokens if settings.method in ("prompt", "ptuning_v2") else 0
    if limit is not None and settings.max_length + virtual > limit:
        raise UserError(
            f"--max-length {settings.max_length}{f' and {virtual} virtual tokens' if virtual else ''} exceed the "
            f"{limit} positions of {settings.model}; use --max-length {limit - virtual} or less"
        )
    return settings.max_length


def _describe(
    settings: FinetuneSettings,
    corpus: Corpus,
    parameters: int,
    learning_rate: float,
    dtype: torch.dtype,
    device: torch.device,
    console: Console,
) -> None:
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    console.print(
        f"{settings.method} of {settings.model}: {parameters / 1e6:,.1f} M parameters, learning rate "
        f"{learning_rate:g}, {settings.optimizer}, {str(dtype).removeprefix('torch.')} on {where}",
        highlight=False,
    )
    console.print(
        f"{settings.data}: {len(corpus.train):,} blocks of {settings.max_length} tokens to train on, "
        f"{corpus.heldout.counted_tokens:,} held-out tokens",
        highlight=False,
    )
    for note in corpus.notes:
        console.print(f"note: {note}", highlight=False)
    if torch.cuda.device_count() > 1 and "WORLD_SIZE" not in os.environ:
        console.print(
            f"note: training on one of {torch.cuda.device_count()} GPUs; for all of them: "
            "torchrun --nproc-per-node gpu -m peftkern finetune ...",
            highlight=False,
        )


def _sample(settings: FinetuneSettings, model: Any, tokenizer: Any, prompt: str, dtype: torch.dtype) -> str | None:
    if not settings.sample_tokens:
        return None
    return sample(model, tokenizer, prompt, settings.sample_tokens, settings.seed, dtype)


def _apply(
    settings: FinetuneSettings,
    model: Any,
    tokenizer: Any,
    learning_rate: float,
    base_parameters: int,
    console: Console,
) -> tuple[int, int]:
    """Applies the method, prints the trainable-parameters line and the warnings; returns (trainable, total)."""
    from peftkern.nn import LoRALinear, apply, trainable_parameters

    # The random values of a method's weights must not depend on what was sampled or evaluated before.
    torch.manual_seed(settings.seed)
    config = method_config(settings.method, settings, settings.method_options)
    attention = _attention_projections(model)
    targets: list[str] = []
    if config is not None:
        apply(model, config, tokenizer)
        targets = [name for name, module in model.named_modules() if isinstance(module, LoRALinear)]
    else:
        model.requires_grad_(True)
    if settings.gradient_checkpointing:
        from peftkern.training.trainer import enable_checkpointing

        enable_checkpointing(model)
    trainable, total = trainable_parameters(model)
    console.print(
        f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / total:.4f}",
        highlight=False,
    )
    for line in warnings_for(
        settings.method, config, learning_rate, base_parameters, settings.warmup_ratio, targets, attention
    ):
        console.print(f"warning: {line}", style="yellow", highlight=False)
    return trainable, total


def _attention_projections(model: Any) -> list[str]:
    from peftkern.nn.targets import match_modules

    try:
        return match_modules(model, "recommended")
    except ValueError:
        return []  # an architecture without a preset; the warning is left out


def _train(
    settings: FinetuneSettings,
    model: Any,
    corpus: Corpus,
    learning_rate: float,
    dtype: torch.dtype,
    checkpoint: Path | None,
    console: Console,
) -> dict[str, Any]:
    """Trains and returns the report's figures of it. Raises Interrupted after Ctrl-C."""
    from transformers import PrinterCallback

    from peftkern.training.progress import InterruptCallback, ProgressCallback
    from peftkern.training.trainer import FinetuneTrainer, optimizer_class, training_arguments

    processes = int(os.environ.get("WORLD_SIZE", "1"))
    per_epoch = steps_per_epoch(len(corpus.train), settings.batch_size, settings.gradient_accumulation, processes)
    steps = settings.max_steps or max(1, math.ceil(settings.epochs * per_epoch))
    progress, interrupt = ProgressCallback(console), InterruptCallback(console)
    assert settings.model is not None
    trainer = FinetuneTrainer(
        model=model,
        args=training_arguments(settings, learning_rate, steps, dtype),
        train_dataset=corpus.train,
        callbacks=[progress, interrupt],
        optimizer_cls_and_kwargs=(optimizer_class(settings.optimizer), {"lr": learning_rate}),
        base=settings.model,
    )
    trainer.remove_callback(PrinterCallback)
    progress.trainer = trainer
    memory.reset_peak(trainer.args.device)
    done = int(checkpoint.name.removeprefix("checkpoint-")) if checkpoint is not None else 0
    if checkpoint is not None:
        console.print(f"resuming from {checkpoint}", highlight=False)
    if checkpoint is not None and done >= steps:
        trainer._load_from_checkpoint(str(checkpoint))  # it was finished; Trainer would add a step
    else:
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint is not None else None)
        finally:
            progress.stop()
            interrupt.restore()
    if interrupt.interrupted and trainer.state.global_step < steps:
        again = f"peftkern finetune --resume --output {shlex.quote(str(settings.output))}"
        raise Interrupted(f"stopped after step {trainer.state.global_step} of {steps}; go on with: {again}")
    history = [
        {"step": log["step"], "loss": log["loss"], "learning_rate": log["learning_rate"]}
        for log in trainer.state.log_history
        if "loss" in log
    ]
    tokens = trainer.tokens_seen * processes
    return {
        "steps": steps,
        "resumed_from_step": done or None,
        "tokens": tokens,
        "seconds": progress.seconds,
        "tokens_per_second": tokens / progress.seconds if tokens else 0.0,
        "history": history,
    }


def _save_and_verify(
    settings: FinetuneSettings,
    model: Any,
    tokenizer: Any,
    corpus: Corpus,
    base_dtype: torch.dtype,
    dtype: torch.dtype,
    loss: float,
    directory: Path,
    report: dict[str, Any],
    console: Console,
) -> None:
    """Saves, then evaluates what was saved, loaded into a fresh base. Raises RuntimeError when the loss differs."""
    from peftkern.training.trainer import save_trained

    assert settings.model is not None
    save_trained(model, directory, settings.model, tokenizer if settings.method == "full" else None)
    device = next(model.parameters()).device
    del model
    if settings.method == "full":
        fresh = load_model(str(directory), base_dtype)
    else:
        from peftkern.formats.adapter import load_adapter

        fresh = load_model(settings.model, base_dtype)
        load_adapter(fresh, directory)
    reloaded = heldout_loss(fresh.to(device).eval(), corpus.heldout, settings.batch_size, dtype)
    identical = reloaded == loss
    report["heldout"]["loss_reloaded"] = reloaded
    report["heldout"]["reloaded_bitwise_equal"] = identical
    if not identical and (device.type == "cpu" or not abs(reloaded - loss) <= GPU_RELOAD_TOLERANCE * abs(loss)):
        raise RuntimeError(
            f"what was saved in {directory} gives a held-out loss of {reloaded!r} after loading, not {loss!r}: "
            "do not use it, and please report this"
        )


def _summarize(report: dict[str, Any], directory: Path, console: Console) -> None:
    heldout, texts = report["heldout"], report["sample"]
    console.print(
        f"trained {report['steps']} steps, {report['tokens']:,} tokens in {report['seconds']:.1f} s: "
        f"{report['tokens_per_second']:,.0f} tokens/s, peak memory {memory.megabytes(report['peak_memory_bytes'])}",
        highlight=False,
    )
    console.print(
        f"held-out perplexity {heldout['perplexity_before']:.2f} -> {heldout['perplexity_after']:.2f} "
        f"(loss {heldout['loss_before']:.4f} -> {heldout['loss_after']:.4f})",
        highlight=False,
    )
    if texts["before"] is not None:
        for when in ("before", "after"):
            console.print(f"--- sample {when} ---", highlight=False)
            console.print(texts["prompt"] + texts[when], markup=False, highlight=False)
    same = "bitwise" if heldout["reloaded_bitwise_equal"] else f"within {GPU_RELOAD_TOLERANCE:g}"
    console.print(
        f"saved in {directory}; loaded back from disk into a fresh base, the held-out loss is the same ({same})",
        highlight=False,
    )


def _versions() -> dict[str, str]:
    import transformers

    import peftkern

    return {
        "peftkern": peftkern.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
