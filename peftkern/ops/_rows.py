"""Activations as a matrix of rows, the form in which every op takes them."""

from __future__ import annotations

import torch

_MAX_LEADING_DIMENSION = 2**31 - 1  # of the GEMM libraries


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """x [*, K] as [M, K], copied only where no view can be had or a GEMM library could not address its strides."""
    rows = x.reshape(-1, x.shape[-1])
    return rows.contiguous() if max(rows.stride()) > _MAX_LEADING_DIMENSION else rows
