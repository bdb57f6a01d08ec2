"""The error rule: float64 is the truth, and a kernel may err at most as much as the same formula in eager PyTorch."""

from __future__ import annotations

from typing import Any

import torch

ALLOWANCE = 1.5  # times eager's largest error, plus one rounding of the output


def to_float64(value: Any) -> Any:
    """Float tensors as float64, everything else as it is; walks dicts, lists and tuples."""
    if isinstance(value, torch.Tensor):
        if not value.is_floating_point():
            return value
        return value.detach().double().requires_grad_(value.requires_grad)
    if isinstance(value, dict):
        return {key: to_float64(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(to_float64(item) for item in value)
    return value


def error_bound(eager: torch.Tensor, truth: torch.Tensor) -> float:
    """The largest error allowed: ALLOWANCE times eager's own, plus one rounding of the largest output."""
    if truth.numel() == 0:
        return 0.0
    eager_error = (eager.double() - truth).abs().max().item()
    return ALLOWANCE * eager_error + torch.finfo(eager.dtype).eps * truth.abs().max().item()


def assert_within(got: torch.Tensor, eager: torch.Tensor, truth: torch.Tensor, what: str = "output") -> None:
    """Raises AssertionError unless `got` is as close to the float64 `truth` as the rule asks, and free of NaN."""
    assert got.shape == truth.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(truth.shape)}"
    assert got.dtype == eager.dtype, f"{what}: dtype {got.dtype}, expected {eager.dtype}"
    if truth.numel() == 0:
        return
    error = (got.double() - truth).abs().max().item()
    bound = error_bound(eager, truth)
    assert error <= bound, (
        f"{what}: max error {error:.3e} over the bound {bound:.3e} (truth up to {truth.abs().max():.3e})"
    )
