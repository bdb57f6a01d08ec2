"""Launches of many tensors: every kind of chunk that a CTA may find, and more turns than it looks up at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from adamw8bit_step import assert_same_bits, step_by

from peftkern.ops.adamw8bit import reference
from peftkern.ops.adamw8bit.function import adamw8bit_step_
from peftkern.ops.adamw8bit.spec import SPECS, WRITTEN
from peftkern.testing.spec import Case

(SPEC,) = SPECS
CHUNK = 8192  # kAdamWChunk of csrc/adamw8bit/step_call.h
# Whole chunks; one that is not full of 16 and of 4 whole blocks, of 3, with a ragged end; many small tensors in a row.
SIZES = (8 * CHUNK, 21 * CHUNK + CHUNK // 2, CHUNK + 1024, 2 * CHUNK + 768, CHUNK + 1031, *range(1, 40), *[256] * 20)
ALIGNED = ("params", "grads", "exp_avg", "exp_avg_sq")


def problem(device: torch.device, dtype: torch.dtype, sizes: list[int], **more: Any) -> dict[str, Any]:
    return SPEC.make(Case("here", {"shapes": [(size,) for size in sizes], **more}), dtype, device, 11)


def moved(tensors: list[torch.Tensor], every: int) -> list[torch.Tensor]:
    """The same values, every so many of them one element behind an aligned address."""
    out = []
    for i, tensor in enumerate(tensors):
        room = torch.zeros(tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)
        out.append((room[1:] if i % every == 0 else room[:-1]).copy_(tensor))
    return out


@pytest.mark.parametrize("blocksize", [64, 256, 1024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_every_kind_of_chunk(dtype: torch.dtype, blocksize: int, device: torch.device) -> None:
    ours, theirs = (problem(device, dtype, list(SIZES), blocksize=blocksize) for _ in range(2))
    for args in (ours, theirs):
        # Whole tensors off their alignment, and scales alone.
        args |= {name: moved(args[name], 5) for name in ALIGNED}
        args |= {name: moved(args[name], 2) for name in WRITTEN[3:]}
    for _ in range(2):
        adamw8bit_step_(**ours)
        step_by(reference, theirs)
        assert_same_bits(ours, theirs)


@pytest.mark.parametrize("options", [{}, {"grad_scale": 1024.0, "max_norm": 0.5}, {"seed": 5}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_turns_and_several_launches(dtype: torch.dtype, options: dict[str, Any], device: torch.device) -> None:
    """On a GPU, at least 32 turns of each of 132 CTAs in the first of two launches."""
    sizes = [*[66 * CHUNK] * 70, *SIZES * 8] if device.type == "cuda" else list(SIZES[:3])
    ours, theirs = (problem(device, dtype, sizes, **options) for _ in range(2))
    adamw8bit_step_(**ours)
    step_by(reference, theirs)
    assert_same_bits(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_skipped_step_leaves_all_chunks(dtype: torch.dtype, device: torch.device) -> None:
    """What was fetched ahead arrives before the kernel ends."""
    args = problem(device, dtype, list(SIZES))
    before = {name: [t.clone() for t in args[name]] for name in WRITTEN}
    args["grads"][1][-1] = torch.inf
    adamw8bit_step_(**args)
    assert_same_bits(args, before)
