"""Transformers' Trainer with our optimizer and with checkpoints that hold no pickle.

A checkpoint holds the adapter (for full fine-tuning the model) in safetensors, the optimizer, scheduler and random
states in `*.safetensors` state files, and Trainer's own `trainer_state.json`, which is written last: a checkpoint that
has it is whole.
"""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Trainer, TrainingArguments

from peftkern.formats.atomic import atomic_group, saving
from peftkern.training.data import collate
from peftkern.training.errors import UserError
from peftkern.training.model import load_model, read_json
from peftkern.training.state_file import load_state, save_state

TRAINER_STATE = "trainer_state.json"
OPTIMIZER = "optimizer.safetensors"
SCHEDULER = "scheduler.safetensors"
SCALER = "scaler.safetensors"


class FinetuneTrainer(Trainer):
    """Trainer for a causal language model with a peftkern method applied, or for all its weights.

    Attributes:
        tokens_seen: tokens trained on by this process in this run, padding included.
        base: name or directory of the base model, written into saved adapters.
    """

    def __init__(self, *, base: str, **kwargs: Any) -> None:
        super().__init__(data_collator=collate, **kwargs)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise UserError("peftkern finetune runs on one device or under DDP (torchrun); switch FSDP/DeepSpeed off")
        self.base = base
        self.tokens_seen = 0

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        self.tokens_seen += inputs["input_ids"].numel()
        return super().training_step(model, inputs, num_items_in_batch)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if self.args.should_save:
            save_trained(self.model, output_dir or str(self.args.output_dir), self.base)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_trained(self.model if model is None else model, resume_from_checkpoint)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        directory = Path(str(self.args.output_dir), f"checkpoint-{self.state.global_step}")
        try:
            super()._save_checkpoint(model, trial)
        except BaseException:
            if self.args.should_save and read_json(directory / TRAINER_STATE) is None:
                shutil.rmtree(directory, ignore_errors=True)
            raise

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.args.should_save:
            assert self.optimizer is not None
            assert self.lr_scheduler is not None
            save_state(self.optimizer.state_dict(), Path(output_dir, OPTIMIZER))
            save_state(self.lr_scheduler.state_dict(), Path(output_dir, SCHEDULER))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            assert self.optimizer is not None
            assert self.lr_scheduler is not None
            self.optimizer.load_state_dict(load_state(Path(checkpoint, OPTIMIZER)))
            self.lr_scheduler.load_state_dict(load_state(Path(checkpoint, SCHEDULER)))

    def _save_scaler(self, output_dir: str) -> None:
        if self.args.should_save and self.accelerator.scaler is not None:
            save_state(self.accelerator.scaler.state_dict(), Path(output_dir, SCALER))

    def _load_scaler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(load_state(Path(checkpoint, SCALER)))

    def _rng_file(self, directory: str) -> Path:
        return Path(directory, f"rng_state_{self.args.process_index}.safetensors")

    def _save_rng_state(self, output_dir: str) -> None:
        state = {
            "python": random.getstate(),
            "numpy": np.random.get_state(),
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state(self.args.device) if self.args.device.type == "cuda" else None,
        }
        os.makedirs(output_dir, exist_ok=True)
        save_state(state, self._rng_file(output_dir))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None or not self._rng_file(checkpoint).is_file():
            return  # resumed with more processes than before
        state = load_state(self._rng_file(checkpoint))
        random.setstate(state["python"])
        np.random.set_state(state["numpy"])
        torch.set_rng_state(state["torch"])
        if state["cuda"] is not None and self.args.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda"], self.args.device)


def save_trained(model: Any, directory: str | Path, base: str, tokenizer: Any = None) -> None:
    """Saves what was trained: the adapter, or the model, with its tokenizer where one is given.

    All files change together: where one cannot be written, all stay as they were.

    Raises:
        OSError: the disk refuses, in one line with its cure.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    if getattr(model, "peftkern_config", None) is not None:
        from peftkern.formats.adapter import save_adapter

        save_adapter(model, directory, base_model_name_or_path=base)
        return
    with tempfile.TemporaryDirectory(dir=directory, prefix=".saving-") as temporary:
        with saving(directory):
            model.save_pretrained(temporary)
            if tokenizer is not None:
                tokenizer.save_pretrained(temporary)
        with atomic_group() as add:
            for file in sorted(path for path in Path(temporary).rglob("*") if path.is_file()):
                target = directory / file.relative_to(temporary)
                target.parent.mkdir(exist_ok=True)
                add(target, partial(os.replace, file))


def load_trained(model: Any, directory: str | Path) -> None:
    """Loads what `save_trained` wrote into a model that is set up alike. Raises ValueError for damaged files."""
    if getattr(model, "peftkern_config", None) is not None:
        from peftkern.formats.adapter import load_adapter

        load_adapter(model, directory)
        return
    # Through a fresh model, because names on disk and in memory may differ (tied and converted weights).
    saved = load_model(str(directory), next(model.parameters()).dtype)
    model.load_state_dict(saved.state_dict())


def last_checkpoint(directory: str | Path) -> Path | None:
    """The newest whole checkpoint in an output directory, or None. Half-written ones are passed over."""
    numbered = []
    for path in Path(directory).glob("checkpoint-*"):
        number = path.name.removeprefix("checkpoint-")
        if number.isdigit() and read_json(path / TRAINER_STATE) is not None:
            numbered.append((int(number), path))
    return max(numbered)[1] if numbered else None


def optimizer_class(name: str) -> type[torch.optim.Optimizer]:
    """The optimizer of `--optimizer`."""
    if name == "adamw":
        return torch.optim.AdamW
    from peftkern.optim import AdamW8bit, PagedAdamW8bit

    return {"adamw8bit": AdamW8bit, "paged_adamw8bit": PagedAdamW8bit}[name]


def training_arguments(settings: Any, learning_rate: float, total_steps: int, dtype: torch.dtype) -> TrainingArguments:
    """Trainer's arguments for a run of `total_steps`, without its progress bars, reports and pickles."""
    on_gpu = torch.cuda.is_available()
    arguments = TrainingArguments(
        output_dir=settings.output,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        max_steps=total_steps,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=round(settings.warmup_ratio * total_steps),
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        seed=settings.seed,
        data_seed=settings.seed,
        use_cpu=not on_gpu,
        dataloader_pin_memory=on_gpu,
        save_strategy="steps" if settings.save_steps else "no",
        save_steps=settings.save_steps or total_steps,
        save_total_limit=settings.save_total_limit,
        logging_steps=settings.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # one process, one GPU: Trainer would replicate the model over all with nn.DataParallel
    return arguments


def enable_checkpointing(model: Any) -> None:
    """Recomputes each layer's activations in the backward, in the form that does not need inputs with gradients."""
    options = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
