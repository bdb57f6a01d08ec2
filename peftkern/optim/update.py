"""The update of a bucket of parameters: by the op where states are 8-bit, in eager PyTorch where they are 32-bit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from peftkern.ops.adamw8bit import reference
from peftkern.ops.adamw8bit.function import code_tables
from peftkern.ops.adamw8bit.op import consecutive_places
from peftkern.optim.sharding import contiguous, first_element, local, own_gradient
from peftkern.optim.state import MOMENTS, QMAPS, SCALES, is_quantized
from peftkern.optim.verdict import Verdict

_ops = torch.ops.peftkern
_SEED_STEP = 0x9E3779B97F4A7C15


class Bucket(NamedTuple):
    """Parameters that one call updates: they share a group, the count of steps and the code books."""

    group: Mapping[str, Any]
    step: torch.Tensor
    params: Sequence[torch.Tensor]
    seed: int | None  # of the stochastic rounding
    places: Sequence[int] | None  # of each parameter among the random numbers

    def part(self, indices: Sequence[int], begins: Sequence[int] | None = None) -> Bucket:
        """Those of its parameters with these indices; where `begins` is given, from these elements of theirs on."""
        places = self.places
        if places is not None:
            places = [places[i] + begin for i, begin in zip(indices, begins or [0] * len(indices))]
        return self._replace(params=[self.params[i] for i in indices], places=places)


def rounding_seed(group: Mapping[str, Any], number: int) -> int | None:
    """The seed of the stochastic rounding in a step's bucket of this number: each has its own."""
    return (group["seed"] + number * _SEED_STEP) % 2**63 if group["stochastic_rounding"] else None


def make_bucket(group: Mapping[str, Any], step: torch.Tensor, params: Sequence[torch.Tensor], number: int) -> Bucket:
    """The step's bucket of this number. Where an element is among the random numbers does not depend on sharding."""
    seed = rounding_seed(group, number)
    if seed is None:
        return Bucket(group, step, params, None, None)
    starts = consecutive_places(param.numel() for param in params)
    return Bucket(group, step, params, seed, [start + first_element(p) for start, p in zip(starts, params)])


def gradients(params: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """This rank's gradients, contiguous."""
    return [own_gradient(param) for param in params]


def dense_parts(params: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """This rank's parts of the parameters, contiguous: `write_back` is to follow."""
    return [contiguous(local(param)) for param in params]


def write_back(params: Sequence[torch.Tensor], dense: Sequence[torch.Tensor]) -> None:
    """Ends an update of `dense`, the parameters' own parts made contiguous."""
    for param, updated in zip(params, dense):
        part = local(param)
        if updated.data_ptr() != part.data_ptr():
            part.copy_(updated)
    torch.autograd.graph.increment_version(params)


def update(
    bucket: Bucket,
    grads: Sequence[torch.Tensor],
    states: Sequence[Mapping[str, torch.Tensor]],
    verdict: Verdict,
) -> None:
    """Updates the bucket's parameters, which are contiguous, or parts of parameters: runs of whole blocks."""
    call = _update_8bit if is_quantized(states[0]) else _update_32bit
    call(bucket, grads, states, verdict)


def _update_8bit(
    bucket: Bucket,
    grads: Sequence[torch.Tensor],
    states: Sequence[Mapping[str, torch.Tensor]],
    verdict: Verdict,
) -> None:
    group, step, params, seed, places = bucket
    lr = group["lr"]
    on_device = isinstance(lr, torch.Tensor) and lr.device == step.device
    books = tuple(states[0][name] for name in QMAPS)
    _ops.adamw8bit_step_(
        params,
        grads,
        *([local(state[name]) for state in states] for name in MOMENTS),
        *([local(state[name]).view(-1) for state in states] for name in SCALES),
        *books,
        0.0 if on_device else float(lr),
        lr if on_device else None,
        0.0,
        step,
        *group["betas"],
        group["eps"],
        group["weight_decay"],
        group["blocksize"],
        verdict.grad_scale,
        verdict.found_inf,
        group["maximize"],
        verdict.max_norm,
        verdict.norm,
        seed,
        code_tables(*books),
        places,
    )


def _update_32bit(
    bucket: Bucket,
    grads: Sequence[torch.Tensor],
    states: Sequence[Mapping[str, torch.Tensor]],
    verdict: Verdict,
) -> None:
    group, step, params, seed, places = bucket
    if not verdict.found_inf.is_cuda and verdict.found_inf:
        return
    lr, (beta1, beta2) = group["lr"], group["betas"]
    numbers = reference.numbers(
        lr if isinstance(lr, torch.Tensor) and lr.device == step.device else float(lr),
        step,
        beta1,
        beta2,
        group["eps"],
        group["weight_decay"],
        verdict.grad_scale,
        group["maximize"],
        clip=reference.clip_factor(verdict.max_norm, verdict.norm),
    )
    for i, (param, grad, state) in enumerate(zip(params, grads, states)):
        m, v = (local(state[name]) for name in MOMENTS)
        new, *moments = reference.update(param, grad, m * beta1, v * beta2, numbers)
        if seed is not None and places is not None and param.dtype == torch.bfloat16:
            new = reference.round_stochastically(new.reshape(-1), places[i], seed, step).view(param.shape)
        reference.assign((param, m, v), (new, *moments), verdict.found_inf)
