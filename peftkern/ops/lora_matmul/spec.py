"""LoRA matmul's specs: cases, oracle, floor, and PEFT's formula as the baseline.

lora_few_tokens is the same function with an NF4 weight and as many tokens as generation has, forward.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch.nn import functional

from peftkern.ops._frozen_weight import FrozenWeight, dense_weight, split_weight
from peftkern.ops.lora_matmul import reference
from peftkern.ops.lora_matmul.function import lora_matmul_seeded
from peftkern.ops.nf4.function import quantize_nf4
from peftkern.testing.spec import Case, Spec

SCALING = 2.0
GPU_SHAPES = tuple(
    (K, N, r) for K, N in ((4096, 4096), (4096, 11008), (11008, 4096), (8192, 28672)) for r in (16, 64)
)  # (K, N, r)
GPU_TOKENS = 8192
CPU_SHAPES = ((1024, 1024, 16), (1024, 4096, 16), (4096, 1024, 64))
CPU_TOKENS = 512
FEW_TOKENS = (1, 8, 16, 32, 64)  # over an NF4 weight as it is stored
FEW_TOKENS_SHAPES = tuple((K, N, r) for K, N in ((4096, 4096), (4096, 11008), (8192, 28672)) for r in (16, 64))


def _case(name: str, M: int, N: int, K: int, r: int, **more: Any) -> Case:
    flags = {key: more.pop(key) for key in ("bench", "devices", "slow") if key in more}
    return Case(name, {"M": M, "N": N, "K": K, "r": r, **more}, **flags)


def _cases() -> tuple[Case, ...]:
    cases = [
        _case("one-token", 1, 48, 64, 4),
        _case("few-tokens", 5, 48, 64, 8, bias=True),
        _case("rank1", 17, 33, 65, 1),
        _case("rank3-bias", 33, 37, 101, 3, bias=True),
        _case("rank7-dropout", 34, 41, 131, 7, dropout_p=0.3),
        _case("rank16", 64, 96, 128, 16),
        _case("rank16-bias-dropout", 130, 136, 320, 16, bias=True, dropout_p=0.1),
        _case("rank-over-both-sides", 9, 6, 5, 19, dropout_p=0.5),
        _case("K-of-one", 4, 3, 1, 2, dropout_p=0.5),
        _case("N-of-one", 7, 1, 96, 3),
        _case("float32-adapters", 40, 56, 72, 8, adapter_dtype=torch.float32, dropout_p=0.05),
        _case("three-dimensional", 6, 40, 64, 4, batch=(2, 3), bias=True, dropout_p=0.2),
        _case("transposed-x", 21, 40, 64, 4, layout="transposed", dropout_p=0.2),
        _case("every-other-column", 21, 40, 63, 4, layout="sliced"),
        _case("expanded-x", 8, 40, 64, 4, layout="expanded", dropout_p=0.2),
        _case("no-tokens", 0, 16, 64, 4, bias=True, dropout_p=0.1),
        _case("nf4", 19, 48, 128, 8, nf4=True),
        _case("nf4-ragged-bias-dropout", 35, 37, 101, 7, nf4=True, bias=True, dropout_p=0.1),
        # More than one tile of the CPU's dropout and of its low-rank sums.
        _case("many-tiles", 300, 48, 4104, 16, dropout_p=0.1),
        _case("many-columns", 300, 4104, 48, 16, bias=True, dropout_p=0.1),
    ]
    for tokens, shapes, device in ((GPU_TOKENS, GPU_SHAPES, "cuda"), (CPU_TOKENS, CPU_SHAPES, "cpu")):
        for K, N, r in shapes:
            for dropout_p, nf4 in itertools.product((0.0, 0.05), (False, True)):
                if device == "cuda" and r != 16 and (nf4 or dropout_p):
                    continue  # nothing new: 20 cases take six minutes with all peers
                name = f"{K}->{N} r{r}" + " nf4" * nf4 + f" p={dropout_p}" * (dropout_p > 0)
                more = {"dropout_p": dropout_p, "nf4": nf4, "bench": True, "devices": (device,)}
                cases.append(_case(name, tokens, N, K, r, **more))
    return tuple(cases)


def _few_tokens_cases() -> tuple[Case, ...]:
    """Around the tiles of both CUDA kernels, what neither takes, then the shapes to time."""
    shapes = [
        (1, 64, 64, 16),
        (2, 33, 128, 1),
        (7, 100, 192, 3),
        (8, 48, 320, 64),
        (9, 264, 576, 5),
        (16, 200, 2304, 100),
        (16, 136, 4160, 256),
        (17, 72, 320, 8),
        (20, 37, 128, 12),
        (24, 264, 576, 30),
        (32, 520, 1024, 130),
        (33, 200, 320, 7),
        (48, 37, 128, 4),
        (64, 264, 4160, 16),
        (5, 37, 101, 7),
        (40, 37, 101, 8),
        (6, 40, 128, 300),
    ]
    cases = [
        _case(
            f"M{M}-N{N}-K{K}-r{r}",
            M,
            N,
            K,
            r,
            nf4=True,
            bias=i % 2 == 0,
            **{"adapter_dtype": torch.float32} if i % 3 == 0 else {},
        )
        for i, (M, N, K, r) in enumerate(shapes)
    ]
    for K, N, r in FEW_TOKENS_SHAPES:
        for M in FEW_TOKENS:
            devices = ("cpu", "cuda") if (N, r, M) == (4096, 16, 1) else ("cuda",)
            cases.append(_case(f"{K}->{N} r{r} M={M}", M, N, K, r, nf4=True, bench=True, devices=devices))
    return tuple(cases)


def _make(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> dict[str, Any]:
    """Trained-like scales: the base and the low-rank term are both of size 1."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, std: float = 1.0, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device).mul_(std).to(dtype)

    s = case.sizes
    M, N, K, r = s["M"], s["N"], s["K"], s["r"]
    layout = s.get("layout")
    if layout == "transposed":
        x = normal(K, M).t()
    elif layout == "sliced":
        x = normal(M, 2 * K)[:, ::2]
    elif layout == "expanded":
        x = normal(1, K).expand(M, K)
    else:
        x = normal(*s.get("batch", (M,)), K)
    weight = normal(N, K, std=K**-0.5)
    adapter_dtype = s.get("adapter_dtype", dtype)
    dropout_p = s.get("dropout_p", 0.0)
    return {
        "x": x,
        "weight": quantize_nf4(weight) if s.get("nf4") else weight,
        "lora_A": normal(r, K, std=K**-0.5, dtype=adapter_dtype),
        "lora_B": normal(N, r, std=r**-0.5 / SCALING, dtype=adapter_dtype),
        "scaling": SCALING,
        "bias": normal(N, std=0.1) if s.get("bias") else None,
        "dropout_p": dropout_p,
        "seed": torch.tensor([-(2**61) - 7 * seed - 1], device=device) if dropout_p else None,
    }


def _reference_backend(
    x: torch.Tensor,
    weight: FrozenWeight,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: float,
    bias: torch.Tensor | None,
    dropout_p: float,
    seed: torch.Tensor | None,
) -> torch.Tensor:
    dense = dense_weight(*split_weight(weight), x.dtype)
    flat = x.reshape(-1, x.shape[-1])
    y, _ = reference.lora_matmul_fwd(flat, dense, lora_A, lora_B, bias, scaling, dropout_p, seed)
    return y.view(*x.shape[:-1], y.shape[-1])


def _peft(
    x: torch.Tensor,
    weight: FrozenWeight,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: float,
    bias: torch.Tensor | None,
    dropout_p: float,
    seed: torch.Tensor | None,
) -> torch.Tensor:
    """What a PEFT layer computes, with torch's own dropout."""
    base = functional.linear(x, dense_weight(*split_weight(weight), x.dtype), bias)
    dropped = functional.dropout(x, dropout_p)
    return base + functional.linear(functional.linear(dropped, lora_A.to(x.dtype)), lora_B.to(x.dtype)) * scaling


def _weight_bytes(case: Case, dtype: torch.dtype) -> int:
    """Stored bytes of the frozen weight: dense, or codes and double-quantized scales in blocks of 64."""
    numel = case.sizes["N"] * case.sizes["K"]
    return numel // 2 + numel // 64 + numel // 64 // 64 if case.sizes.get("nf4") else numel * dtype.itemsize


def _adapter_elements(case: Case) -> int:
    return case.sizes["r"] * (case.sizes["N"] + case.sizes["K"])


def _bytes(case: Case, dtype: torch.dtype) -> int:
    """x, weight and adapter in, y out, once each."""
    s = case.sizes
    return _weight_bytes(case, dtype) + (s["M"] * (s["N"] + s["K"]) + _adapter_elements(case)) * dtype.itemsize


def _train_bytes(case: Case, dtype: torch.dtype) -> int:
    """The forward's, S out and in again; dy, x, weight and adapter in, dx and the adapter's gradients out."""
    s = case.sizes
    backward = s["M"] * (s["N"] + 2 * s["K"] + 2 * s["r"]) + 2 * _adapter_elements(case)
    return _bytes(case, dtype) + _weight_bytes(case, dtype) + backward * dtype.itemsize


def _flops(case: Case, dtype: torch.dtype) -> int:
    s = case.sizes
    return 2 * s["M"] * (s["N"] * s["K"] + _adapter_elements(case))


def _train_flops(case: Case, dtype: torch.dtype) -> int:
    """Two large products, forward and dX, and six skinny ones."""
    s = case.sizes
    return 2 * s["M"] * (2 * s["N"] * s["K"] + 3 * _adapter_elements(case))


def _is_short(case: Case) -> bool:
    """Whether a step takes no longer than its launches, so that more than its sum is worth a look."""
    return case.sizes["M"] < GPU_TOKENS


SPECS = (
    Spec(
        op="lora_matmul",
        cases=_cases(),
        make=_make,
        run=lora_matmul_seeded,
        reference=reference.formula,
        bytes=_bytes,
        flops=_flops,
        grads=("x", "lora_A", "lora_B", "bias"),
        backends={"reference": _reference_backend},
        baselines={"eager": _peft},
        train_bytes=_train_bytes,
        train_flops=_train_flops,
        times_forward=_is_short,
        times_baselines=_is_short,  # PEFT itself is timed
    ),
    Spec(
        op="lora_few_tokens",
        cases=_few_tokens_cases(),
        make=_make,
        run=lora_matmul_seeded,
        reference=reference.formula,
        bytes=_bytes,
        flops=_flops,
        grads=("x", "lora_A", "lora_B", "bias"),
        backends={"reference": _reference_backend},
        baselines={"eager": _peft},
        times_baselines=lambda case: case.sizes["N"] == case.sizes["K"] and case.sizes["M"] == 1,
    ),
)
