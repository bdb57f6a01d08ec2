"""The spec checker sees what it is there to see."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from peftkern.testing.checks import check_case, failures, poisoned_memory
from peftkern.testing.spec import Case, Spec

CASE = Case("small", {"M": 5, "K": 7})
CPU = torch.device("cpu")


def _scale(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * weight


def _make(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> dict[str, Any]:
    generator = torch.Generator(device).manual_seed(seed)
    shape = (case.sizes["M"], case.sizes["K"])
    x = torch.randn(shape, generator=generator, device=device).to(dtype)
    return {"x": x, "weight": torch.randn(shape[1], generator=generator, device=device).to(dtype)}


SPEC = Spec(
    op="scale",
    cases=(CASE, Case("empty", {"M": 0, "K": 3}), Case("large", {"M": 9, "K": 9}, bench=True)),
    make=_make,
    run=_scale,
    reference=_scale,
    bytes=lambda case, dtype: 1,
    flops=lambda case, dtype: 0,
    grads=("x", "weight"),
)


class _WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(weight)
        return x * weight

    @staticmethod
    def backward(ctx, dy):
        (weight,) = ctx.saved_tensors
        return dy * weight, torch.zeros_like(weight)


def _wrong_gradient(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return _WrongGradient.apply(x, weight)


def _unwritten(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(x)
    out[:-1] = (x * weight)[:-1]
    return out


def _slightly_off(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * weight * (1 + 8 * torch.finfo(x.dtype).eps)


def _other_dtype(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return (x * weight).float()


@pytest.mark.parametrize("dtype", SPEC.dtypes, ids=str)
def test_a_right_op_passes(dtype: torch.dtype) -> None:
    for case in SPEC.test_cases():
        check_case(SPEC, case, dtype, CPU)
    check_case(replace(SPEC, exact=True), CASE, dtype, CPU)


@pytest.mark.parametrize(
    ("wrong", "grads", "what"),
    [
        (_unwritten, (), "output: max error nan"),
        (_slightly_off, (), "output: max error"),
        (_other_dtype, (), "output: dtype"),
        (_wrong_gradient, SPEC.grads, "gradient of weight"),
    ],
    ids=["unwritten", "inaccurate", "dtype", "gradient"],
)
def test_a_wrong_op_fails(wrong: Callable[..., Any], grads: tuple[str, ...], what: str) -> None:
    spec = replace(SPEC, run=wrong, grads=grads)
    with pytest.raises(AssertionError, match=what):
        check_case(spec, CASE, torch.bfloat16, CPU)
    lines = failures(spec, CPU, (torch.bfloat16,))
    assert len(lines) >= 1
    assert lines[0].startswith("scale [small, bfloat16]: ")
    assert "\n" not in lines[0]


def test_exact_specs_compare_bitwise() -> None:
    """-0.0 equals 0.0, but its bits differ."""
    spec = replace(SPEC, exact=True, grads=(), reference=lambda x, weight: x * 0, run=lambda x, weight: x.abs() * 0)
    with pytest.raises(AssertionError, match="elements differ bitwise, the first at"):
        check_case(spec, CASE, torch.float32, CPU)


def test_a_crash_is_one_line() -> None:
    def crash(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("first line\nsecond line")

    lines = failures(replace(SPEC, run=crash, grads=()), CPU, (torch.float32,))
    assert lines == ["scale [small, float32]: first line", "scale [empty, float32]: first line"]


def test_slow_cases_are_left_out_of_failures() -> None:
    spec = replace(SPEC, run=_slightly_off, grads=(), cases=(replace(CASE, slow=True),))
    assert failures(spec, CPU) == []


def test_poisoned_memory_fills_and_restores() -> None:
    before = torch.are_deterministic_algorithms_enabled()
    with poisoned_memory():
        assert torch.empty(3).isnan().all()
        assert torch.empty(3, dtype=torch.uint8).eq(255).all()
    assert torch.are_deterministic_algorithms_enabled() == before
