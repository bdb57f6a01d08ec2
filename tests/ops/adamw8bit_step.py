"""One step of 8-bit AdamW by a given backend, as `adamw8bit_step_` makes it."""

from __future__ import annotations

from typing import Any

import torch

from peftkern.ops.adamw8bit.spec import WRITTEN


def step_by(backend: Any, args: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The look, then the update, in place. Returns the flag and the norm."""
    params, device = args["params"], args["exp_avg_qmap"].device
    flag = torch.zeros((), device=device)
    norm = torch.zeros((), device=device) if args["max_norm"] is not None else None
    looked = args["grads"] if args["check_finite"] or norm is not None else []
    backend.found_inf_(looked, args["grad_scale"], flag, norm)
    states = (args[name] for name in WRITTEN[1:])
    rates = (args["beta1"], args["beta2"], args["eps"], args["weight_decay"], args["blocksize"])
    backend.step_(
        params,
        args["grads"],
        *states,
        args["exp_avg_qmap"],
        args["exp_avg_sq_qmap"],
        args["lr"],
        None,
        args["step"],
        None,
        *rates,
        args["grad_scale"],
        flag,
        args["maximize"],
        args["max_norm"] or 0.0,
        norm,
        args["seed"],
    )
    return flag, norm


def assert_same_bits(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Everything that a step writes."""
    for name in WRITTEN:
        for i, (got, want) in enumerate(zip(ours[name], theirs[name])):
            bits = (t.reshape(-1).view(torch.uint8) for t in (got, want))
            assert torch.equal(*bits), f"{name}[{i}], of {list(got.shape)}"
