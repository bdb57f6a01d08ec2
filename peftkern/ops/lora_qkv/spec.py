"""LoRA QKV's spec: cases, oracle, floor, and PEFT's formula as the baseline."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from peftkern.ops._frozen_weight import dense_weight, split_weight
from peftkern.ops._projection import pack
from peftkern.ops.lora_qkv import reference
from peftkern.ops.lora_qkv.function import lora_qkv_seeded
from peftkern.testing import projections
from peftkern.testing.spec import Case, Spec

# K, then N of query, key and value.
SHAPES = ((4096, (4096, 4096, 4096)), (4096, (4096, 1024, 1024)))
GPU_TOKENS = 8192
CPU_SHAPES = ((1024, (1024, 1024, 1024)), (1024, (1024, 256, 256)))
CPU_TOKENS = 512


def _case(name: str, M: int, K: int, N: tuple[int, ...], r: tuple[int, ...], **more: Any) -> Case:
    flags = {key: more.pop(key) for key in ("bench", "devices", "slow") if key in more}
    return Case(name, {"M": M, "K": K, "N": N, "r": r, **more}, **flags)


def _cases() -> tuple[Case, ...]:
    cases = [
        _case("one-token", 1, 512, (256, 256, 256), (16, 16, 16)),
        _case("grouped-query", 65, 101, (192, 48, 48), (16, 16, 16), bias=True),
        _case("grouped-query-dropout", 66, 128, (192, 48, 48), (16, 16, 16), dropout_p=0.1),
        _case("odd-ranks", 17, 65, (33, 37, 41), (1, 3, 7), bias=True),
        _case("odd-ranks-dropout", 35, 131, (33, 37, 41), (7, 1, 19), dropout_p=0.3),
        _case("one-projection", 20, 48, (40,), (4,), bias=True, dropout_p=0.2),
        _case("two-projections", 20, 48, (40, 56), (4, 8)),
        _case("four-projections", 96, 128, (96, 112, 104, 88), (8, 16, 5, 7), dropout_p=0.2),
        _case("key-without-adapter", 24, 64, (48, 32, 32), (4, 0, 4), bias=True),
        _case("key-without-adapter-dropout", 24, 64, (48, 32, 32), (4, 0, 4), dropout_p=0.2),
        _case("no-adapters", 24, 64, (48, 32, 32), (0, 0, 0)),
        _case("float32-adapters", 64, 96, (56, 56, 56), (16, 16, 16), adapter_dtype=torch.float32, dropout_p=0.05),
        _case("three-dimensional", 6, 64, (40, 48, 48), (8, 8, 8), batch=(2, 3), bias=True, dropout_p=0.2),
        _case("transposed-x", 21, 64, (40, 48, 48), (8, 8, 8), layout="transposed", dropout_p=0.2),
        _case("every-other-column", 21, 63, (40, 48, 48), (8, 8, 8), layout="sliced"),
        _case("expanded-x", 32, 64, (40, 48, 48), (8, 8, 8), layout="expanded", dropout_p=0.2),
        _case("no-tokens", 0, 64, (16, 8, 8), (4, 4, 4), bias=True, dropout_p=0.1),
        _case("nf4", 19, 128, (48, 24, 24), (8, 8, 8), nf4=True),
        _case("nf4-ragged-bias-dropout", 35, 101, (37, 41, 43), (7, 3, 5), nf4=True, bias=True, dropout_p=0.1),
        _case("nf4-and-dense", 19, 128, (48, 24, 24), (8, 0, 8), nf4=(True, False, True)),
    ]
    for tokens, shapes, device in ((GPU_TOKENS, SHAPES, "cuda"), (CPU_TOKENS, CPU_SHAPES, "cpu")):
        for K, N in shapes:
            for dropout_p in (0.0, 0.05):
                for nf4 in (False, True):
                    q, k, _ = N
                    name = f"{K}->{q}+2x{k} r16" + " nf4" * nf4 + f" p={dropout_p}" * (dropout_p > 0)
                    more = {"dropout_p": dropout_p, "nf4": nf4, "bench": True, "devices": (device,)}
                    cases.append(_case(name, tokens, K, N, (16, 16, 16), **more))
    return tuple(cases)


def _make(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> dict[str, Any]:
    K = case.sizes["K"]
    return projections.make(case, dtype, device, seed, K, [(N, K) for N in case.sizes["N"]])


def _run(x: torch.Tensor, dropout_p: float, seeds: torch.Tensor | None, **args: Any) -> tuple[torch.Tensor, ...]:
    return lora_qkv_seeded(x, projections.projections(args), dropout_p=dropout_p, seeds=seeds)


def _formula(x: torch.Tensor, dropout_p: float, seeds: torch.Tensor | None, **args: Any) -> tuple[torch.Tensor, ...]:
    return reference.formula(x, projections.projections(args), dropout_p, seeds)


def _reference_backend(
    x: torch.Tensor, dropout_p: float, seeds: torch.Tensor | None, **args: Any
) -> tuple[torch.Tensor, ...]:
    lora_A, lora_B, biases, scalings, pieces, layouts = pack(projections.projections(args), x)
    flat = x.reshape(-1, x.shape[-1])
    ys, _ = reference.lora_qkv_fwd(flat, pieces, layouts, lora_A, lora_B, biases, scalings, dropout_p, seeds)
    return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in ys)


def _peft(x: torch.Tensor, dropout_p: float, seeds: torch.Tensor | None, **args: Any) -> tuple[torch.Tensor, ...]:
    """What PEFT's layers compute one after the other, with torch's own dropout."""
    ys = []
    for p in projections.projections(args):
        y = functional.linear(x, dense_weight(*split_weight(p.weight), x.dtype), p.bias)
        if p.lora_A is not None and p.lora_B is not None:
            S = functional.linear(functional.dropout(x, dropout_p), p.lora_A.to(x.dtype))
            y = y + functional.linear(S, p.lora_B.to(x.dtype)) * p.scaling
        ys.append(y)
    return tuple(ys)


def _weight_bytes(case: Case, dtype: torch.dtype) -> int:
    numel = case.sizes["K"] * sum(case.sizes["N"])
    return projections.weight_bytes(numel, dtype, case.sizes.get("nf4") is True)


def _adapter_elements(case: Case) -> int:
    return sum(r * (N + case.sizes["K"]) for N, r in zip(case.sizes["N"], case.sizes["r"]))


def _bytes(case: Case, dtype: torch.dtype) -> int:
    """x, weights and adapters in, every y out, once each."""
    s = case.sizes
    return _weight_bytes(case, dtype) + (s["M"] * (sum(s["N"]) + s["K"]) + _adapter_elements(case)) * dtype.itemsize


def _train_bytes(case: Case, dtype: torch.dtype) -> int:
    """The forward's, S out and in again; every dy, x, weights and adapters in, dx and the adapters' gradients out."""
    s = case.sizes
    backward = s["M"] * (sum(s["N"]) + 2 * s["K"] + 2 * sum(s["r"])) + 2 * _adapter_elements(case)
    return _bytes(case, dtype) + _weight_bytes(case, dtype) + backward * dtype.itemsize


def _flops(case: Case, dtype: torch.dtype) -> int:
    s = case.sizes
    return 2 * s["M"] * (sum(s["N"]) * s["K"] + _adapter_elements(case))


def _train_flops(case: Case, dtype: torch.dtype) -> int:
    """Per projection two large products, forward and dX, and six skinny ones."""
    s = case.sizes
    return 2 * s["M"] * (2 * sum(s["N"]) * s["K"] + 3 * _adapter_elements(case))


SPECS = (
    Spec(
        op="lora_qkv",
        cases=_cases(),
        make=_make,
        run=_run,
        reference=_formula,
        bytes=_bytes,
        flops=_flops,
        grads=projections.GRADS,
        backends={"reference": _reference_backend},
        baselines={"eager": _peft},
        train_bytes=_train_bytes,
        train_flops=_train_flops,
    ),
)
