"""LoRA MLP's spec: cases, oracle, floor, and the PEFT model's formula as the baseline."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from peftkern.ops._activations import activate
from peftkern.ops._frozen_weight import dense_weight, split_weight
from peftkern.ops._projection import LoRAProjection, pack
from peftkern.ops.lora_mlp import reference
from peftkern.ops.lora_mlp.function import lora_mlp_seeded
from peftkern.ops.lora_mlp.op import ACTIVATIONS
from peftkern.testing import projections
from peftkern.testing.spec import Case, Spec

SHAPES = ((4096, 11008), (4096, 14336))  # (H, I)
GPU_TOKENS = 8192
CPU_SHAPES = ((512, 1408), (1024, 2816))
CPU_TOKENS = 256


def _case(name: str, M: int, H: int, I: int, r: tuple[int, int, int], **more: Any) -> Case:  # noqa: E741
    """x and y are of width H, unless `out` gives y's."""
    flags = {key: more.pop(key) for key in ("bench", "devices", "slow") if key in more}
    return Case(name, {"M": M, "H": H, "I": I, "r": r, **more}, **flags)


def _cases() -> tuple[Case, ...]:
    # Products of three random factors have heavy tails: with few elements or tokens, largest errors say little.
    cases = [
        _case(f"{name}-dropout", 260, 195, 515, (16, 16, 16), activation=name, dropout_p=0.1) for name in ACTIVATIONS
    ]
    cases += [
        _case("one-token", 1, 256, 640, (64, 64, 64)),
        _case("odd-ranks", 258, 195, 515, (3, 5, 7), bias=True),
        _case("odd-ranks-dropout", 259, 195, 515, (7, 3, 19), bias=True, dropout_p=0.3, activation="gelu_tanh"),
        _case("own-output-width", 256, 192, 512, (16, 24, 16), out=72),
        _case("down-without-adapter", 256, 192, 512, (16, 16, 0), dropout_p=0.2),
        _case("down-alone", 256, 192, 512, (0, 0, 16), bias=True, dropout_p=0.2),
        _case("no-adapters", 256, 192, 512, (0, 0, 0), activation="gelu"),
        _case("float32-adapters", 256, 192, 512, (16, 16, 16), adapter_dtype=torch.float32, dropout_p=0.05),
        _case("three-dimensional", 256, 192, 512, (16, 16, 16), batch=(2, 128), bias=True, dropout_p=0.2),
        _case("transposed-x", 256, 192, 512, (16, 16, 16), layout="transposed", dropout_p=0.2),
        _case("every-other-column", 256, 191, 512, (16, 16, 16), layout="sliced"),
        _case("no-tokens", 0, 48, 64, (16, 16, 16), bias=True, dropout_p=0.1),
        _case("nf4", 256, 192, 512, (8, 8, 8), nf4=True),
        _case("nf4-ragged-bias-dropout", 258, 195, 515, (7, 3, 5), nf4=True, bias=True, dropout_p=0.1),
        _case("nf4-and-dense", 256, 192, 512, (8, 8, 8), nf4=(True, False, True)),
    ]
    for tokens, shapes, device in ((GPU_TOKENS, SHAPES, "cuda"), (CPU_TOKENS, CPU_SHAPES, "cpu")):
        for H, I in shapes:  # noqa: E741
            for dropout_p in (0.0, 0.05):
                for nf4 in (False, True):
                    name = f"{H}/{I} r16" + " nf4" * nf4 + f" p={dropout_p}" * (dropout_p > 0)
                    more = {"dropout_p": dropout_p, "nf4": nf4, "bench": True, "devices": (device,)}
                    cases.append(_case(name, tokens, H, I, (16, 16, 16), **more))
    return tuple(cases)


def _shapes(case: Case) -> list[tuple[int, int]]:
    """Of the weights of gate, up and down."""
    s = case.sizes
    return [(s["I"], s["H"]), (s["I"], s["H"]), (s.get("out", s["H"]), s["I"])]


def _make(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> dict[str, Any]:
    args = projections.make(case, dtype, device, seed, case.sizes["H"], _shapes(case))
    return {**args, "activation": case.sizes.get("activation", "silu")}


def _three(args: dict[str, Any]) -> tuple[LoRAProjection, LoRAProjection, LoRAProjection]:
    gate, up, down = projections.projections(args)
    return gate, up, down


def _run(x: torch.Tensor, activation: str, dropout_p: float, seeds: torch.Tensor | None, **args: Any) -> torch.Tensor:
    gate, up, down = _three(args)
    return lora_mlp_seeded(x, gate, up, down, activation=activation, dropout_p=dropout_p, seeds=seeds)


def _formula(
    x: torch.Tensor, activation: str, dropout_p: float, seeds: torch.Tensor | None, **args: Any
) -> torch.Tensor:
    return reference.formula(x, *_three(args), activation, dropout_p, seeds)


def _reference_backend(
    x: torch.Tensor, activation: str, dropout_p: float, seeds: torch.Tensor | None, **args: Any
) -> torch.Tensor:
    lora_A, lora_B, biases, scalings, pieces, layouts = pack(_three(args), x)
    flat = x.reshape(-1, x.shape[-1])
    y, *_ = reference.lora_mlp_fwd(
        flat, pieces, layouts, lora_A, lora_B, biases, scalings, dropout_p, seeds, activation
    )
    return y.view(*x.shape[:-1], y.shape[-1])


def _peft(x: torch.Tensor, activation: str, dropout_p: float, seeds: torch.Tensor | None, **args: Any) -> torch.Tensor:
    """What a PEFT model's layers compute, with torch's own dropout."""

    def project(x: torch.Tensor, p: LoRAProjection) -> torch.Tensor:
        y = functional.linear(x, dense_weight(*split_weight(p.weight), x.dtype), p.bias)
        if p.lora_A is None or p.lora_B is None:
            return y
        S = functional.linear(functional.dropout(x, dropout_p), p.lora_A.to(x.dtype))
        return y + functional.linear(S, p.lora_B.to(x.dtype)) * p.scaling

    gate, up, down = _three(args)
    return project(activate(project(x, gate), activation) * project(x, up), down)


def _weight_bytes(case: Case, dtype: torch.dtype) -> int:
    numel = sum(rows * columns for rows, columns in _shapes(case))
    return projections.weight_bytes(numel, dtype, case.sizes.get("nf4") is True)


def _adapter_elements(case: Case) -> int:
    return sum(r * (rows + columns) for r, (rows, columns) in zip(case.sizes["r"], _shapes(case)))


def _base_elements(case: Case) -> int:
    return sum(rows * columns for rows, columns in _shapes(case))


def _bytes(case: Case, dtype: torch.dtype) -> int:
    """x, weights and adapters in, y out; e and g need not leave the chip."""
    s = case.sizes
    return _weight_bytes(case, dtype) + (2 * s["M"] * s["H"] + _adapter_elements(case)) * dtype.itemsize


def _train_bytes(case: Case, dtype: torch.dtype) -> int:
    """The forward's, e, g and S out and in again; dy, x, weights and adapters in, dx and adapter gradients out."""
    s = case.sizes
    M = s["M"]
    saved = M * (2 * s["I"] + sum(s["r"]))
    backward = 3 * M * s["H"] + 2 * _adapter_elements(case)
    return _bytes(case, dtype) + _weight_bytes(case, dtype) + (2 * saved + backward) * dtype.itemsize


def _flops(case: Case, dtype: torch.dtype) -> int:
    return 2 * case.sizes["M"] * (_base_elements(case) + _adapter_elements(case))


def _train_flops(case: Case, dtype: torch.dtype) -> int:
    """Per projection two large products, forward and dX, and six skinny ones."""
    return 2 * case.sizes["M"] * (2 * _base_elements(case) + 3 * _adapter_elements(case))


SPECS = (
    Spec(
        op="lora_mlp",
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
