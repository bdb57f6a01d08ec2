"""Held-out loss and samples. Neither draws from the global random state, so training is the same with and without."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch

from peftkern.training.data import IGNORED, Blocks, collate


@contextlib.contextmanager
def _inference(model: Any, dtype: torch.dtype) -> Iterator[torch.device]:
    """Eval mode without gradients, under autocast when the compute dtype is not the parameters' own."""
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    try:
        with torch.no_grad(), autocast:
            yield device
    finally:
        model.train(training)


def heldout_loss(model: Any, blocks: Blocks, batch_size: int, dtype: torch.dtype) -> float:
    """Mean negative log likelihood, in nats per counted token, summed in float64.

    The same model, blocks and batch size give the same bits on the CPU.
    """
    total = torch.zeros((), dtype=torch.float64)
    counted = 0
    with _inference(model, dtype) as device:
        for start in range(0, len(blocks), batch_size):
            batch = collate(blocks.blocks[start : start + batch_size])
            tokens = int((batch["labels"] != IGNORED).sum())
            loss = model(**{name: value.to(device) for name, value in batch.items()}, use_cache=False).loss
            total += loss.double().cpu() * tokens
            counted += tokens
    return (total / counted).item()


def perplexity(loss: float) -> float:
    """exp(loss), infinity where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


def sample(model: Any, tokenizer: Any, prompt: str, max_new_tokens: int, seed: int, dtype: torch.dtype) -> str:
    """A continuation of `prompt` at temperature 0.8, top-p 0.95, from its own seeded random state."""
    devices = [next(model.parameters()).device]
    cuda = [device for device in devices if device.type == "cuda"]
    with _inference(model, dtype) as device, torch.random.fork_rng(devices=cuda):
        torch.manual_seed(seed)
        encoded = tokenizer(prompt, return_tensors="pt").to(device)
        output = model.generate(
            input_ids=encoded["input_ids"],
            attention_mask=encoded["attention_mask"],
            max_new_tokens=max_new_tokens,
            do_sample=True,
            temperature=0.8,
            top_p=0.95,
            use_cache=True,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        )
    # Methods with virtual tokens return the prompt as it was given, so what is new starts after it.
    return tokenizer.decode(output[0, encoded["input_ids"].shape[1] :], skip_special_tokens=True)


def default_prompt(text: str, words: int = 8) -> str:
    """The first words of a text, to sample from."""
    return " ".join(text.split()[:words])
