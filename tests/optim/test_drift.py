"""How far the parameters of a fixed problem are from 32-bit AdamW's after 10,000 steps."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from peftkern.optim import AdamW8bit

STEPS = 10_000
INPUTS, OUTPUTS, BATCH, BATCHES = 64, 8, 16, 256
DECADES = 3  # between the scales of the inputs, as activations have them: six between the second moments of a block


def train(cls: type, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Linear regression on noisy minibatches with a cosine schedule. Returns the first and the last weight."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(INPUTS, OUTPUTS, generator=generator) / 8
    target = torch.randn(INPUTS, OUTPUTS, generator=generator)
    scales = 10 ** (-DECADES * torch.rand(INPUTS, generator=generator))
    inputs = torch.randn(BATCHES, BATCH, INPUTS, generator=generator) * scales
    labels = inputs @ target + 0.1 * torch.randn(BATCHES, BATCH, OUTPUTS, generator=generator)
    weight = torch.nn.Parameter(start.clone())
    optimizer = cls([weight], lr=1e-3, weight_decay=1e-2, **options)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = 5e-4 * (1 + math.cos(math.pi * step / STEPS)) + 1e-5
        x, y = inputs[step % BATCHES], labels[step % BATCHES]
        with torch.no_grad():
            weight.grad = x.T @ (x @ weight - y) / BATCH
        optimizer.step()
    return start, weight.detach()


@pytest.mark.slow
def test_closer_to_32_bits_than_bitsandbytes() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    start, exact = train(torch.optim.AdamW)

    def drift(cls: type) -> float:
        return ((train(cls, min_8bit_size=256)[1] - exact).norm() / (exact - start).norm()).item()

    ours, theirs = drift(AdamW8bit), drift(bnb.optim.AdamW8bit)
    assert ours < theirs
    # Measured 0.087, and 0.44 where a second moment may be rounded to zero.
    assert ours < 0.12
