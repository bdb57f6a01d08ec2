"""Merging an adapter on disk into its base on disk: what `peftkern merge` does."""

from __future__ import annotations

from pathlib import Path

import torch

from peftkern.training import output as output_directory
from peftkern.training.errors import UserError
from peftkern.training.model import load_model, load_tokenizer, read_json
from peftkern.training.settings import TrainSettings
from peftkern.training.trainer import save_trained


def merge_adapter(adapter: str, model: str | None, output: str, dtype: str | None, overwrite: bool = False) -> Path:
    """Loads the base and the adapter, merges, and saves the dense model with its tokenizer.

    Args:
        adapter: directory with adapter_config.json.
        model: the base; None takes the one that the adapter names.
        output: a new or empty directory, or any with `overwrite`.
        dtype: name of the merged weights' dtype; None keeps the base's. A QLoRA adapter is merged into the
            dequantized weights it was trained on, which are never quantized again.

    Returns:
        The output directory.

    Raises:
        UserError: a missing adapter or base, or an output that cannot be written.
        ValueError: an adapter that cannot be merged (prompt methods, adapters) or does not fit the base.
    """
    config = read_json(Path(adapter) / "adapter_config.json")
    if not isinstance(config, dict):
        raise UserError(f"--adapter {adapter} has no readable adapter_config.json; give a saved adapter")
    base = model or config.get("base_model_name_or_path")
    if not base:
        raise UserError(f"--adapter {adapter} does not name its base model; give it with --model")
    directory = output_directory.prepare(TrainSettings(model=base, output=output, overwrite=overwrite), "model")
    from peftkern.formats.adapter import load_adapter
    from peftkern.nn import merge_and_unload

    tokenizer = load_tokenizer(base)
    target = getattr(torch, dtype) if dtype else stored_dtype(base)
    # Merged in float32 and rounded once at the end.
    loaded = load_model(base, torch.float32)
    load_adapter(loaded, adapter)
    merged = merge_and_unload(loaded).to(target)
    merged.config.dtype = target
    save_trained(merged, directory, base, tokenizer)
    return directory


def stored_dtype(model: str) -> torch.dtype:
    """The dtype that the model's config says its weights have on disk; float32 when it does not say."""
    from transformers import AutoConfig

    value = getattr(AutoConfig.from_pretrained(model), "dtype", None)
    return value if isinstance(value, torch.dtype) else getattr(torch, str(value), torch.float32)
