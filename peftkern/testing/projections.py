"""Several LoRA projections as the flat keyword arguments that specs work with, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from peftkern.ops._projection import LoRAProjection
from peftkern.ops.nf4.function import quantize_nf4
from peftkern.testing.spec import Case

SCALINGS = (2.0, 1.5, 0.75, 1.0)
# Arguments that get gradients; those that a case lacks are passed over.
GRADS = ("x", *(f"{kind}{index}" for index in range(len(SCALINGS)) for kind in ("lora_A", "lora_B", "bias")))


def make(
    case: Case, dtype: torch.dtype, device: torch.device, seed: int, K: int, shapes: Sequence[tuple[int, int]]
) -> dict[str, Any]:
    """x [*, K] and projections with weights of the given shapes, at trained-like scales: both terms are of size 1.

    Read of the case's sizes: M, `r` (a rank for each projection, 0 for no adapter), and, where given, `batch`, `layout`
    ("transposed", "sliced" or "expanded"), `bias`, `nf4` (a bool, or one for each), `adapter_dtype`, `dropout_p`.

    Returns:
        x, weights, scalings, dropout_p, seeds, and lora_A0, lora_B0, bias0, lora_A1, ... where there are any.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, std: float = 1.0, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device).mul_(std).to(dtype)

    s = case.sizes
    M, layout = s["M"], s.get("layout")
    if layout == "transposed":
        x = normal(K, M).t()
    elif layout == "sliced":
        x = normal(M, 2 * K)[:, ::2]
    elif layout == "expanded":
        x = normal(1, K).expand(M, K)
    else:
        x = normal(*s.get("batch", (M,)), K)
    nf4 = s.get("nf4", False)
    quantized = nf4 if isinstance(nf4, tuple) else (nf4,) * len(shapes)
    adapter_dtype, dropout_p = s.get("adapter_dtype", dtype), s.get("dropout_p", 0.0)
    weights = []
    adapters: dict[str, torch.Tensor] = {}
    for index, ((N, columns), r) in enumerate(zip(shapes, s["r"])):
        weight = normal(N, columns, std=columns**-0.5)
        weights.append(quantize_nf4(weight) if quantized[index] else weight)
        if r:
            adapters[f"lora_A{index}"] = normal(r, columns, std=columns**-0.5, dtype=adapter_dtype)
            adapters[f"lora_B{index}"] = normal(N, r, std=r**-0.5 / SCALINGS[index], dtype=adapter_dtype)
        if s.get("bias"):
            adapters[f"bias{index}"] = normal(N, std=0.1)
    seeds = torch.arange(1, len(shapes) + 1, device=device) * -(2**59) - 7 * seed if dropout_p else None
    return {
        "x": x,
        "weights": tuple(weights),
        "scalings": SCALINGS[: len(shapes)],
        "dropout_p": dropout_p,
        "seeds": seeds,
        **adapters,
    }


def projections(args: Mapping[str, Any]) -> tuple[LoRAProjection, ...]:
    """The projections of what `make` returns."""
    return tuple(
        LoRAProjection(weight, args.get(f"lora_A{i}"), args.get(f"lora_B{i}"), scaling, args.get(f"bias{i}"))
        for i, (weight, scaling) in enumerate(zip(args["weights"], args["scalings"]))
    )


def weight_bytes(numel: int, dtype: torch.dtype, nf4: bool) -> int:
    """Stored bytes of a frozen weight: dense, or codes and double-quantized scales in blocks of 64."""
    return numel // 2 + numel // 64 + numel // 64 // 64 if nf4 else numel * dtype.itemsize
