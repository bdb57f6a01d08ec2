"""Bottleneck adapter's spec: cases, oracle, floor, and the eager module as the baseline."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from peftkern.ops._activations import activate
from peftkern.ops.bottleneck import reference
from peftkern.ops.bottleneck.function import bottleneck_seeded
from peftkern.ops.bottleneck.op import ACTIVATIONS
from peftkern.testing.spec import Case, Spec


def _case(name: str, M: int, H: int, b: int, **more: Any) -> Case:
    flags = {key: more.pop(key) for key in ("bench", "devices", "slow") if key in more}
    return Case(name, {"M": M, "H": H, "b": b, **more}, **flags)


def _cases() -> tuple[Case, ...]:
    cases = [_case(f"{name}-dropout", 33, 101, 16, activation=name, dropout_p=0.1) for name in ACTIVATIONS]
    cases += [
        _case("one-token", 1, 64, 8),
        _case("bottleneck-of-one", 17, 65, 1, dropout_p=0.5),
        _case("bottleneck-of-seven", 34, 37, 7, scaling=0.5, dropout_p=0.3),
        _case("bottleneck-over-hidden", 9, 5, 19),
        _case("no-biases", 20, 48, 8, bias=False, dropout_p=0.2),
        _case("own-residual", 40, 56, 8, residual=True, scaling=4.0, dropout_p=0.1),
        _case("float32-adapter", 40, 72, 8, adapter_dtype=torch.float32, dropout_p=0.05),
        _case("three-dimensional", 6, 64, 8, batch=(2, 3), residual=True, dropout_p=0.2),
        _case("transposed-x", 21, 64, 8, layout="transposed", dropout_p=0.2),
        _case("every-other-column", 21, 63, 8, layout="sliced"),
        _case("expanded-x", 8, 64, 8, layout="expanded"),
        _case("no-tokens", 0, 64, 8, residual=True, dropout_p=0.1),
        _case("many-tiles", 300, 4104, 24, dropout_p=0.1),  # of the CPU's sums
        *(_case(f"4096/64 M={M}", M, 4096, 64, bench=True, devices=("cuda",)) for M in (1, 16, 128, 1024)),
        _case("4096/64", 8192, 4096, 64, bench=True, devices=("cuda",)),
        _case("4096/64 p=0.1", 8192, 4096, 64, dropout_p=0.1, bench=True, devices=("cuda",)),
        _case("4096/16", 8192, 4096, 16, bench=True, devices=("cuda",)),
        _case("4096/128", 8192, 4096, 128, bench=True, devices=("cuda",)),
        _case("4096/256", 8192, 4096, 256, bench=True, devices=("cuda",)),
        _case("8192/64", 8192, 8192, 64, bench=True, devices=("cuda",)),
        _case("1024/64", 512, 1024, 64, bench=True, devices=("cpu",)),
        _case("1024/64 p=0.1", 512, 1024, 64, dropout_p=0.1, bench=True, devices=("cpu",)),
    ]
    return tuple(cases)


def _make(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> dict[str, Any]:
    """Trained-like scales: pre-activation, update and residual are all of size 1."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, std: float = 1.0, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device).mul_(std).to(dtype)

    s = case.sizes
    M, H, b = s["M"], s["H"], s["b"]
    layout = s.get("layout")
    if layout == "transposed":
        x = normal(H, M).t()
    elif layout == "sliced":
        x = normal(M, 2 * H)[:, ::2]
    elif layout == "expanded":
        x = normal(1, H).expand(M, H)
    else:
        x = normal(*s.get("batch", (M,)), H)
    adapter_dtype = s.get("adapter_dtype", dtype)
    dropout_p = s.get("dropout_p", 0.0)
    scaling = s.get("scaling", 1.0)
    with_bias = s.get("bias", True)
    return {
        "x": x,
        "down_weight": normal(b, H, std=H**-0.5, dtype=adapter_dtype),
        "down_bias": normal(b, std=0.3, dtype=adapter_dtype) if with_bias else None,
        "up_weight": normal(H, b, std=b**-0.5 / scaling, dtype=adapter_dtype),
        "up_bias": normal(H, std=0.3 / scaling, dtype=adapter_dtype) if with_bias else None,
        "activation": s.get("activation", "gelu"),
        "dropout_p": dropout_p,
        "scaling": scaling,
        "residual": normal(*x.shape) if s.get("residual") else None,
        "seed": torch.tensor([2**62 + 7 * seed + 1], device=device) if dropout_p else None,
    }


def _reference_backend(
    x: torch.Tensor,
    down_weight: torch.Tensor,
    down_bias: torch.Tensor | None,
    up_weight: torch.Tensor,
    up_bias: torch.Tensor | None,
    activation: str,
    dropout_p: float,
    scaling: float,
    residual: torch.Tensor | None,
    seed: torch.Tensor | None,
) -> torch.Tensor:
    flat = x.reshape(-1, x.shape[-1])
    residual = None if residual is None else residual.reshape(flat.shape)
    y, _ = reference.bottleneck_fwd(
        flat, down_weight, down_bias, up_weight, up_bias, residual, activation, scaling, dropout_p, seed
    )
    return y.view(x.shape)


def eager(
    x: torch.Tensor,
    down_weight: torch.Tensor,
    down_bias: torch.Tensor | None,
    up_weight: torch.Tensor,
    up_bias: torch.Tensor | None,
    activation: str,
    dropout_p: float,
    scaling: float,
    residual: torch.Tensor | None,
    seed: torch.Tensor | None,
) -> torch.Tensor:
    """Linear, activation, torch's own dropout, linear, add: `seed` is not used."""
    a = functional.dropout(activate(functional.linear(x, down_weight, down_bias), activation), dropout_p)
    return (x if residual is None else residual) + scaling * functional.linear(a, up_weight, up_bias)


def _adapter_elements(case: Case) -> int:
    return 2 * case.sizes["H"] * case.sizes["b"]


def _bytes(case: Case, dtype: torch.dtype) -> int:
    """x and adapter in, y out, once each; the residual is x."""
    return (2 * case.sizes["M"] * case.sizes["H"] + _adapter_elements(case)) * dtype.itemsize


def _train_bytes(case: Case, dtype: torch.dtype) -> int:
    """The forward's, the pre-activation out and in again; x, dy and adapter in, dx and the adapter's gradients out."""
    s = case.sizes
    backward = s["M"] * (3 * s["H"] + 2 * s["b"]) + 2 * _adapter_elements(case)
    return _bytes(case, dtype) + backward * dtype.itemsize


def _flops(case: Case, dtype: torch.dtype) -> int:
    return 2 * case.sizes["M"] * _adapter_elements(case)


def _train_flops(case: Case, dtype: torch.dtype) -> int:
    """Two products forward, four backward."""
    return 3 * _flops(case, dtype)


SPECS = (
    Spec(
        op="bottleneck",
        cases=_cases(),
        make=_make,
        run=bottleneck_seeded,
        reference=reference.formula,
        bytes=_bytes,
        flops=_flops,
        grads=("x", "down_weight", "down_bias", "up_weight", "up_bias", "residual"),
        backends={"reference": _reference_backend},
        baselines={"eager": eager},
        train_bytes=_train_bytes,
        train_flops=_train_flops,
    ),
)
