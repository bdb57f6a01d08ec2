"""The public function of the 8-bit AdamW step."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch

from peftkern.ops._library import backends
from peftkern.ops.adamw8bit.op import check_hyper, check_tensors, is_expanded

_ops = torch.ops.peftkern
HAS_TABLES = backends()["adamw8bit_step_"].get("CUDA") == "cuda"


@torch.no_grad()
def adamw8bit_step_(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    exp_avg: Sequence[torch.Tensor],
    exp_avg_sq: Sequence[torch.Tensor],
    exp_avg_absmax: Sequence[torch.Tensor],
    exp_avg_sq_absmax: Sequence[torch.Tensor],
    exp_avg_qmap: torch.Tensor,
    exp_avg_sq_qmap: torch.Tensor,
    *,
    lr: float | torch.Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: float | torch.Tensor,
    blocksize: int = 256,
    grad_scale: torch.Tensor | None = None,
    found_inf: torch.Tensor | None = None,
    maximize: bool = False,
    max_norm: float | None = None,
    seed: int | None = None,
    check_finite: bool = True,
) -> None:
    """One step of torch.optim.AdamW with 8-bit states, of all parameters in one call, in place.

    With g = grad / grad_scale, negated to maximize:
    m = beta1 m + (1 - beta1) g;  v = beta2 v + (1 - beta2) g^2;
    p = (1 - lr weight_decay) p - lr / (1 - beta1^step) m / (sqrt(v) / sqrt(1 - beta2^step) + eps),
    in float32, rounded once to the parameter's dtype. m and v are stored in blocks, as the block's largest magnitude
    and each element's nearest code of a code book; a v that is not zero is never stored as zero.

    A gradient that is NaN, infinite or of magnitude 2^63 and more, anywhere in the call, leaves every parameter and
    state as it was, unless `check_finite` is False.

    Args:
        params: float32, float16 or bfloat16, any strides without overlap, of one device.
        grads: one per parameter, of its shape, in any of these dtypes and any strides.
        exp_avg, exp_avg_sq: uint8 of the parameters' shapes, the codes of m and v. Blocks run over the flattened
            tensor.
        exp_avg_absmax, exp_avg_sq_absmax: float32 [ceil(numel / blocksize)], the blocks' largest magnitudes.
        exp_avg_qmap, exp_avg_sq_qmap: float32 [256], the ascending code books: bitsandbytes' signed and unsigned
            dynamic maps, or those of a checkpoint.
        lr, step: numbers, or tensors of one element. `step` counts from 1. On a GPU, tensors on its device are read
            when the step runs, so that a captured graph follows them; those on the CPU are read when it is called.
        blocksize: 64 to 4096, a power of two.
        grad_scale: float32 of one element on the parameters' device: what the gradients were multiplied with. The
            gradients themselves are left as they are.
        found_inf: float32 of one element on the parameters' device. Not zero: the call does nothing. When given, it is
            believed, and the gradients are not looked at; `adamw8bit_found_inf_` sets it.
        maximize: ascend instead of descend.
        max_norm: the gradients are scaled down together so that their Euclidean norm is at most this. A norm that is
            not finite leaves everything as it was.
        seed: rounds bfloat16 parameters stochastically, up or down with a probability of what is dropped. The random
            numbers are a function of the seed, `step` and the place of the element in the list's tensors.
        check_finite: look at the gradients before anything is written. Without, a gradient that is not finite spoils
            its parameter and the states of its block, as torch.optim.AdamW lets it, and half of a read is saved.

    Raises:
        ValueError: naming the argument that does not fit.

    Source: Dettmers et al. 2022, arXiv:2110.02861; Loshchilov and Hutter 2019, arXiv:1711.05101.
    """
    check_hyper("adamw8bit_step_", lr, beta1, beta2, eps, weight_decay)
    check_tensors(
        params,
        grads,
        (exp_avg, exp_avg_sq, exp_avg_absmax, exp_avg_sq_absmax),
        (exp_avg_qmap, exp_avg_sq_qmap),
        blocksize,
    )
    for i, param in enumerate(params):
        if is_expanded(param):
            raise ValueError(f"adamw8bit_step_: params[{i}] is expanded, its elements share memory; clone() it")
    for name, tensors in (("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        for i, tensor in enumerate(tensors):
            if not tensor.is_contiguous():
                raise ValueError(f"adamw8bit_step_: {name}[{i}] must be contiguous, got strides {tensor.stride()}")
    if max_norm is not None and not max_norm >= 0.0:
        raise ValueError(f"adamw8bit_step_: max_norm must be at least 0, got {max_norm}")
    dense, dense_grads = [param.contiguous() for param in params], [grad.contiguous() for grad in grads]
    norm = None if max_norm is None else torch.zeros((), dtype=torch.float32, device=exp_avg_qmap.device)
    if norm is not None or (found_inf is None and check_finite):
        found = torch.zeros((), dtype=torch.float32, device=exp_avg_qmap.device)
        _ops.adamw8bit_found_inf_(dense_grads, grad_scale, found, norm, [], None)
        found_inf = found if found_inf is None and check_finite else found_inf
    tables = None if torch.compiler.is_compiling() else code_tables(exp_avg_qmap, exp_avg_sq_qmap)
    _ops.adamw8bit_step_(
        dense,
        dense_grads,
        list(exp_avg),
        list(exp_avg_sq),
        list(exp_avg_absmax),
        list(exp_avg_sq_absmax),
        exp_avg_qmap,
        exp_avg_sq_qmap,
        *_number_and_tensor(lr, exp_avg_qmap.device),
        *_number_and_tensor(step, exp_avg_qmap.device),
        beta1,
        beta2,
        eps,
        weight_decay,
        blocksize,
        grad_scale,
        found_inf,
        maximize,
        0.0 if max_norm is None else max_norm,
        norm,
        seed,
        tables,
    )
    for param, updated in zip(params, dense):
        if updated is not param:
            param.copy_(updated)
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version([*params, *exp_avg, *exp_avg_sq, *exp_avg_absmax, *exp_avg_sq_absmax])


def code_tables(exp_avg_qmap: torch.Tensor, exp_avg_sq_qmap: torch.Tensor) -> torch.Tensor | None:
    """What the CUDA step makes of a pair of code books: made once, while the pair lives and nobody writes to it."""
    if not exp_avg_qmap.is_cuda or not HAS_TABLES or exp_avg_qmap.is_inference() or exp_avg_sq_qmap.is_inference():
        return None
    key = (id(exp_avg_qmap), id(exp_avg_sq_qmap))
    versions = (exp_avg_qmap._version, exp_avg_sq_qmap._version)
    known = _tables.get(key)
    if known is None or known[0]() is not exp_avg_qmap or known[1]() is not exp_avg_sq_qmap or known[2] != versions:
        if torch.cuda.is_current_stream_capturing():
            return None
        for old in [old for old, (first, second, *_) in _tables.items() if first() is None or second() is None]:
            del _tables[old]
        made = _ops.adamw8bit_code_tables(exp_avg_qmap, exp_avg_sq_qmap)
        known = _tables[key] = (weakref.ref(exp_avg_qmap), weakref.ref(exp_avg_sq_qmap), versions, made)
    return known[3]


_Tables = tuple["weakref.ref[torch.Tensor]", "weakref.ref[torch.Tensor]", tuple[int, int], torch.Tensor]
_tables: dict[tuple[int, int], _Tables] = {}


def _number_and_tensor(value: float | torch.Tensor, device: torch.device) -> tuple[float, torch.Tensor | None]:
    """How the op takes a number that may be a tensor: (number, None), or (0.0, tensor) when it is on the device."""
    if not isinstance(value, torch.Tensor):
        return float(value), None
    if value.device.type == device.type:
        return 0.0, value
    return float(value), None
