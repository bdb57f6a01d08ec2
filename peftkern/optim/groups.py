"""What an optimizer's groups, parameters and gradients must be, with errors that name them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from peftkern.ops._frozen_weight import is_sharded
from peftkern.ops.adamw8bit.op import BLOCKSIZES, FLOAT_DTYPES, check_hyper, is_expanded
from peftkern.optim.sharding import local, unfit


def parameter_name(group: Mapping[str, Any], index: int, i: int) -> str:
    """How messages call the group's i-th parameter; `index` is the group's."""
    names: Iterable[str] | None = group.get("param_names")
    return f"parameter {list(names)[i]!r}" if names else f"param_groups[{index}]['params'][{i}]"


def check_group(owner: str, index: int, group: Mapping[str, Any]) -> None:
    """Raises ValueError, in the name of `owner`, for options out of range and parameters that cannot be updated."""
    if len(group["betas"]) != 2:
        raise ValueError(f"{owner}: betas must be two numbers, got {group['betas']}")
    beta1, beta2 = group["betas"]
    check_hyper(owner, group["lr"], beta1, beta2, group["eps"], group["weight_decay"])
    if group["blocksize"] not in BLOCKSIZES:
        raise ValueError(f"{owner}: blocksize must be one of {BLOCKSIZES}, got {group['blocksize']}")
    if group["min_8bit_size"] < 0:
        raise ValueError(f"{owner}: min_8bit_size must be at least 0, got {group['min_8bit_size']}")
    if len(set(group["params"])) != len(group["params"]):
        raise ValueError(f"{owner}: param_groups[{index}] holds a parameter twice; list each parameter once")
    for i, param in enumerate(group["params"]):
        which = parameter_name(group, index, i)
        found = None
        if param.layout != torch.strided:
            found = str(param.layout)
        elif is_expanded(local(param)):
            found = "an expanded tensor, whose elements share memory"
        elif param.dtype not in FLOAT_DTYPES:
            found = str(param.dtype)
        if found:
            raise ValueError(f"{owner}: {which} must be dense float32, float16 or bfloat16, got {found}")
        quantized = param.numel() >= group["min_8bit_size"]
        if quantized and is_sharded(param) and (why := unfit(param, group["blocksize"])):
            raise ValueError(
                f"{owner}: 8-bit states of {which} cannot be sharded: {why}; give its group a min_8bit_size above its "
                "size, which keeps its states in 32 bits"
            )


def check_gradients(owner: str, index: int, group: Mapping[str, Any]) -> None:
    """Raises ValueError, in the name of `owner`, for a gradient that is sparse or of another dtype."""
    for i, param in enumerate(group["params"]):
        grad = param.grad
        if grad is None or (grad.layout == torch.strided and grad.dtype in FLOAT_DTYPES):
            continue
        found = grad.dtype if grad.layout == torch.strided else grad.layout
        cure = "use torch.optim.SparseAdam, or a layer with sparse=False" if grad.is_sparse else "cast it"
        raise ValueError(
            f"{owner}: the gradient of {parameter_name(group, index, i)} must be dense float32, float16 or bfloat16, "
            f"got {found}; {cure}"
        )
