"""8-bit AdamW ops: schemas, argument checks, fake kernels.

    adamw8bit_step_        one AdamW step of all tensors of a list, in place. It does not look for bad gradients: where
                           found_inf is given and not zero, or grad_norm is not finite, it does nothing.
    adamw8bit_found_inf_   looks at gradients: sets norm, where given, to that of all of them, unscaled; sets found_inf
                           to 1 if any of them, or the norm, cannot be used, and leaves it as it is otherwise. Then
                           counts: one more in `skipped` where found_inf is set, else one more in each of `steps`.
    adamw8bit_step_table_, adamw8bit_found_inf_table_  the same on CUDA for tensors of which only the pointers are
                           given, by rows of a table (`peftkern._host.OptimizerPlan`); the caller answers for them.
                           found_inf and norm need not hold anything before: found_inf becomes 1 or 0, and 1 where
                           `known` is given and not zero.
    adamw8bit_code_tables  what the CUDA step looks codes up in. It makes its own where a call brings none.

Tensors are contiguous. Lists have one entry per parameter: params and grads in float32, float16 or bfloat16 (each its
own), exp_avg and exp_avg_sq uint8 of the parameter's shape, their absmax float32 [ceil(numel / blocksize)]. The code
books, one pair per call, are float32 [256] and ascend. `lr_tensor` and `step_tensor`, of one element on the parameters'
device, take the place of the numbers `lr` and `step` where given. With `grad_norm`, gradients are multiplied by
min(1, max_norm / (grad_norm + 1e-6)) as well. With `seed`, bfloat16 parameters are rounded stochastically, by random
numbers of which each tensor takes a run: `places` says where it starts, so that a tensor may be updated in parts; it is
a multiple of 64 for each, `consecutive_places` if not given.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate

import torch

from peftkern.ops._library import define, fake

BLOCKSIZES = (64, 128, 256, 512, 1024, 2048, 4096)
FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
GRADIENT_LIMIT = 2.0**63  # from here on a squared gradient may overflow float32: treated as infinite

_OP = "adamw8bit_step_"

define(
    "adamw8bit_step_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avg, Tensor(c!)[] exp_avg_sq, "
    "Tensor(d!)[] exp_avg_absmax, Tensor(e!)[] exp_avg_sq_absmax, Tensor exp_avg_qmap, Tensor exp_avg_sq_qmap, "
    "float lr, Tensor? lr_tensor, float step, Tensor? step_tensor, float beta1, float beta2, float eps, "
    "float weight_decay, int blocksize, Tensor? grad_scale, Tensor? found_inf, bool maximize, float max_norm=0.0, "
    "Tensor? grad_norm=None, int? seed=None, Tensor? code_tables=None, int[]? places=None) -> ()"
)
define(
    "adamw8bit_found_inf_(Tensor[] grads, Tensor? grad_scale, Tensor(a!) found_inf, Tensor(b!)? norm, "
    "Tensor(c!)[] steps, Tensor(d!)? skipped) -> ()"
)
define(
    "adamw8bit_step_table_(Tensor table, int first, int count, Tensor code_tables, float lr, Tensor? lr_tensor, "
    "Tensor step, float beta1, float beta2, float eps, float weight_decay, int blocksize, Tensor? grad_scale, "
    "Tensor? found_inf, bool maximize, float max_norm, Tensor? grad_norm, int? seed) -> ()"
)
define(
    "adamw8bit_found_inf_table_(Tensor table, int count, Tensor? grad_scale, Tensor? known, Tensor(a!) found_inf, "
    "Tensor(b!)? norm, Tensor(c!)[] steps, Tensor(d!)? skipped) -> ()"
)
define("adamw8bit_code_tables(Tensor exp_avg_qmap, Tensor exp_avg_sq_qmap) -> Tensor")
PLACE = 64  # elements: kAdamWPlace of csrc/adamw8bit/step_call.h
TABLE_WORDS = 10436  # kTableSize of csrc/adamw8bit/code_tables.h


@fake("adamw8bit_step_")
def _(
    params,
    grads,
    exp_avg,
    exp_avg_sq,
    exp_avg_absmax,
    exp_avg_sq_absmax,
    exp_avg_qmap,
    exp_avg_sq_qmap,
    lr,
    lr_tensor,
    step,
    step_tensor,
    beta1,
    beta2,
    eps,
    weight_decay,
    blocksize,
    grad_scale,
    found_inf,
    maximize,
    max_norm=0.0,
    grad_norm=None,
    seed=None,
    code_tables=None,
    places=None,
):
    states = (exp_avg, exp_avg_sq, exp_avg_absmax, exp_avg_sq_absmax)
    check_tensors(params, grads, states, (exp_avg_qmap, exp_avg_sq_qmap), blocksize)


@fake("adamw8bit_found_inf_")
def _(grads, grad_scale, found_inf, norm, steps, skipped):
    return None


@fake("adamw8bit_code_tables")
def _(exp_avg_qmap, exp_avg_sq_qmap):
    return exp_avg_qmap.new_empty(TABLE_WORDS, dtype=torch.int32)


def consecutive_places(numels: Iterable[int]) -> list[int]:
    """Where tensors of these sizes start among the random numbers of a call, one after another."""
    return list(accumulate((-(-numel // PLACE) * PLACE for numel in numels), initial=0))[:-1]


def check_tensors(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    states: tuple[Sequence[torch.Tensor], Sequence[torch.Tensor], Sequence[torch.Tensor], Sequence[torch.Tensor]],
    qmaps: tuple[torch.Tensor, torch.Tensor],
    blocksize: int,
) -> None:
    """Raises ValueError, naming the argument, for tensors that `adamw8bit_step_` cannot take.

    Args:
        states: exp_avg, exp_avg_sq, exp_avg_absmax, exp_avg_sq_absmax.
        qmaps: exp_avg_qmap, exp_avg_sq_qmap.
    """
    if blocksize not in BLOCKSIZES:
        raise ValueError(f"{_OP}: blocksize must be one of {BLOCKSIZES}, got {blocksize}")
    lists = {"grads": grads, "exp_avg": states[0], "exp_avg_sq": states[1]}
    scales = {"exp_avg_absmax": states[2], "exp_avg_sq_absmax": states[3]}
    for name, tensors in (lists | scales).items():
        if len(tensors) != len(params):
            raise ValueError(f"{_OP}: {name} must have one tensor per parameter, {len(params)}, got {len(tensors)}")
    for name, qmap in zip(("exp_avg_qmap", "exp_avg_sq_qmap"), qmaps):
        if qmap.dtype != torch.float32 or qmap.shape != (256,):
            raise ValueError(f"{_OP}: {name} must be float32 [256], got {qmap.dtype} {list(qmap.shape)}")
    for i, param in enumerate(params):
        if param.dtype not in FLOAT_DTYPES:
            raise ValueError(f"{_OP}: params[{i}] must be float32, float16 or bfloat16, got {param.dtype}")
        if grads[i].dtype not in FLOAT_DTYPES or grads[i].layout != torch.strided:
            found = grads[i].dtype if grads[i].layout == torch.strided else grads[i].layout
            raise ValueError(f"{_OP}: grads[{i}] must be dense float32, float16 or bfloat16, got {found}")
        for name, tensors in lists.items():
            _check(name, i, tensors[i], param.shape, None if name == "grads" else torch.uint8, param)
        blocks = (param.numel() + blocksize - 1) // blocksize
        for name, tensors in scales.items():
            _check(name, i, tensors[i], (blocks,), torch.float32, param, f" for blocks of {blocksize}")


def _check(
    name: str,
    index: int,
    tensor: torch.Tensor,
    shape: Sequence[int],
    dtype: torch.dtype | None,
    param: torch.Tensor,
    why: str = "",
) -> None:
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{_OP}: {name}[{index}] must have shape {list(shape)}{why}, got {list(tensor.shape)}")
    if dtype is not None and tensor.dtype != dtype:
        raise ValueError(f"{_OP}: {name}[{index}] must be {dtype}, got {tensor.dtype}")
    if tensor.device != param.device:
        raise ValueError(
            f"{_OP}: {name}[{index}] is on {tensor.device} but its parameter is on {param.device}; move it"
        )


def is_expanded(tensor: torch.Tensor) -> bool:
    """Whether elements share memory, so that they cannot be written one by one."""
    return any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape))


def check_hyper(
    owner: str,
    lr: float | torch.Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """Raises ValueError, in the name of `owner`, for rates that AdamW has no meaning for. Reads no tensor's value."""
    if isinstance(lr, torch.Tensor):
        if lr.numel() != 1:
            raise ValueError(f"{owner}: lr as a tensor must hold one element, got shape {list(lr.shape)}")
    elif not lr >= 0.0:
        raise ValueError(f"{owner}: lr must be at least 0, got {lr}")
    for name, beta in (("beta1", beta1), ("beta2", beta2)):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"{owner}: {name} must be in [0, 1), got {beta}")
    for name, value in (("eps", eps), ("weight_decay", weight_decay)):
        if not value >= 0.0:
            raise ValueError(f"{owner}: {name} must be at least 0, got {value}")
