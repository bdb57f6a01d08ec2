"""What a step finds out about all gradients before it updates anything: of all devices, and of all ranks that share
a parameter. The host waits for none of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from peftkern.ops._frozen_weight import is_sharded
from peftkern.optim.sharding import agree, own_gradient, placement, sum_over_shards

if TYPE_CHECKING:
    from peftkern.optim.adamw8bit import AdamW8bit
    from peftkern.optim.update import Bucket

_ops = torch.ops.peftkern


class Verdict(NamedTuple):
    """Of a step, on one device."""

    found_inf: torch.Tensor  # float32 [], not 0 where the step must change nothing
    norm: torch.Tensor | None  # float32 [], of all gradients, where they are clipped
    max_norm: float
    grad_scale: torch.Tensor | None  # what gradients were multiplied with


def reads_gradients(optimizer: AdamW8bit) -> bool:
    """Whether a step looks at the gradients before it updates. GradScaler sets `found_inf` around step()."""
    return optimizer.max_norm is not None or (optimizer.check_finite and _known(optimizer) is None)


def scaler_numbers(optimizer: AdamW8bit, device: torch.device) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """GradScaler's flag and scale, where it has set them; its own tensors where they are float32 on this device."""
    numbers = (_known(optimizer), getattr(optimizer, "grad_scale", None))
    flag, scale = (None if n is None else n.detach().to(device, torch.float32).reshape(()) for n in numbers)
    return flag, scale


def new_verdict(optimizer: AdamW8bit, device: torch.device) -> Verdict:
    """What is known before the look."""
    known, scale = scaler_numbers(optimizer, device)
    found_inf = torch.zeros((), dtype=torch.float32, device=device) if known is None else known.clone()
    norm = None if optimizer.max_norm is None else torch.zeros_like(found_inf)
    return Verdict(found_inf, norm, optimizer.max_norm or 0.0, scale)


def look(optimizer: AdamW8bit, work: Sequence[Bucket]) -> dict[torch.device, Verdict]:
    """Looks at the gradients and counts the step, or the skipped step. Returns the verdict by device."""
    steps: dict[torch.device, dict[int, torch.Tensor]] = {}
    for bucket in work:
        steps.setdefault(bucket.step.device, {})[id(bucket.step)] = bucket.step
    verdicts = {device: new_verdict(optimizer, device) for device in steps}
    if not verdicts:
        return verdicts
    grads = _gradients(work) if reads_gradients(optimizer) else {}
    first = next(iter(verdicts))
    params = [param for bucket in work for param in bucket.params]
    seen: list[torch.Tensor] = []
    if len(verdicts) == 1 and not any(map(is_sharded, params)):
        seen = next(iter(grads.values()), [])
    elif grads or _known(optimizer) is not None:
        verdicts = _joined(verdicts, [_part(optimizer, *item) for item in grads.items()], params)
    for device, verdict in verdicts.items():
        counter = optimizer._skip_counter(device) if device == first else None
        norm = verdict.norm if seen else None  # else it is there already
        counts = list(steps[device].values())
        _ops.adamw8bit_found_inf_(seen, verdict.grad_scale, verdict.found_inf, norm, counts, counter)
    return verdicts


_Kind = tuple[torch.device, Any]  # and placement
_Part = tuple[Any, Verdict]


def _known(optimizer: AdamW8bit) -> torch.Tensor | None:
    return getattr(optimizer, "found_inf", None)


def _gradients(work: Iterable[Bucket]) -> dict[_Kind, list[torch.Tensor]]:
    """This rank's gradients, by where they are."""
    grads: dict[_Kind, list[torch.Tensor]] = {}
    for bucket in work:
        for param in bucket.params:
            grads.setdefault((param.device, placement(param)), []).append(own_gradient(param))
    return grads


def _part(optimizer: AdamW8bit, kind: _Kind, grads: list[torch.Tensor]) -> _Part:
    device, where = kind
    verdict = new_verdict(optimizer, device)
    _ops.adamw8bit_found_inf_(grads, verdict.grad_scale, verdict.found_inf, verdict.norm, [], None)
    return where, verdict


def _joined(
    verdicts: Mapping[torch.device, Verdict], parts: Sequence[_Part], params: Sequence[torch.Tensor]
) -> dict[torch.device, Verdict]:
    """One verdict of all parts and ranks, on each device."""
    first = next(iter(verdicts))
    flags = [verdict.found_inf for verdict in (*verdicts.values(), *(verdict for _, verdict in parts))]
    found_inf = torch.stack([flag.to(first) for flag in flags]).amax()
    norms = [sum_over_shards(v.norm.double().square(), where) for where, v in parts if v.norm is not None]
    norm = None
    if norms:
        norm = torch.stack([square.to(first) for square in norms]).sum().sqrt().float()
        found_inf = found_inf.maximum((~norm.isfinite()).float())
    found_inf = agree(found_inf, params)
    return {
        device: verdict._replace(found_inf=found_inf.to(device), norm=None if norm is None else norm.to(device))
        for device, verdict in verdicts.items()
    }
