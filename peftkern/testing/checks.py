"""Does an op keep what its spec promises? One routine, used by the tests and, before timing, by the benchmarks."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils import _pytree as pytree

from peftkern.testing.numerics import assert_within, to_float64
from peftkern.testing.spec import Case, Spec

# Where a backend of `Spec.backends` can run; any other name runs on every device.
BACKEND_DEVICE = {"cuda": "cuda", "triton": "cuda", "cpp": "cpu"}


def check_case(
    spec: Spec, case: Case, dtype: torch.dtype, device: torch.device, backend: str | None = None, seed: int = 0
) -> None:
    """Runs one case and compares results, and gradients for `spec.grads`, with the reference.

    Exact specs must equal the reference bitwise; the others obey the error rule against the reference in float64.
    Memory from `torch.empty` is filled with NaN meanwhile, so an element that nobody wrote is seen.

    Args:
        backend: a name of `spec.backends`, checked without gradients; None for the public function.

    Raises:
        AssertionError: naming what differs.
    """
    run = spec.run if backend is None else spec.backends[backend]
    grads = tuple(name for name in spec.grads if backend is None)
    with poisoned_memory():
        got = _results(run, spec.make(case, dtype, device, seed), grads, seed)
    eager = _results(spec.reference, spec.make(case, dtype, device, seed), grads, seed)
    if spec.exact:
        truth = eager
    else:
        truth = _results(spec.reference, to_float64(spec.make(case, dtype, device, seed)), grads, seed, dtype)
    assert got.keys() == eager.keys()
    for what, value in got.items():
        _compare(value, eager[what], truth[what], spec.exact, what)


def failures(spec: Spec, device: torch.device, dtypes: tuple[torch.dtype, ...] | None = None) -> list[str]:
    """One line per (case, dtype) of the spec's quick test cases that fails on this device; empty when all hold."""
    lines = []
    for dtype in dtypes or spec.dtypes:
        for case in spec.test_cases(device.type):
            if case.slow:
                continue
            try:
                check_case(spec, case, dtype, device)
            except Exception as error:  # a crash is a failure like a wrong value
                message = (str(error).strip() or type(error).__name__).splitlines()[0]
                lines.append(f"{spec.op} [{case.name}, {str(dtype).removeprefix('torch.')}]: {message}")
    return lines


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Within it `torch.empty` and its kin return NaN, or the largest value of an integer dtype."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*determinis.*")
        try:
            torch.use_deterministic_algorithms(True, warn_only=True)
            torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
            yield
        finally:
            torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
            torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)


def _results(
    function: Callable[..., Any], args: dict[str, Any], grads: tuple[str, ...], seed: int, dy_dtype: Any = None
) -> dict[str, Any]:
    """What `function` returns, under "output", and the gradients of its arguments, under "gradient of NAME".

    `dy_dtype`: the dtype in which the outgoing gradient is drawn, so that the float64 run gets the same values.
    """
    names = tuple(name for name in grads if args.get(name) is not None)
    for name in names:
        args[name].requires_grad_()
    output = function(**args)
    results = {"output": output}
    if names:
        outputs = [t for t in pytree.tree_leaves(output) if isinstance(t, torch.Tensor) and t.requires_grad]
        generator = torch.Generator(outputs[0].device).manual_seed(seed + 1)
        dys = [
            torch.randn(t.shape, generator=generator, device=t.device, dtype=torch.float32)
            .to(dy_dtype or t.dtype)
            .to(t.dtype)
            for t in outputs
        ]
        gradients = torch.autograd.grad(outputs, [args[name] for name in names], dys)
        results |= {f"gradient of {name}": gradient for name, gradient in zip(names, gradients)}
    return results


def _compare(got: Any, eager: Any, truth: Any, exact: bool, what: str) -> None:
    got_leaves, got_tree = pytree.tree_flatten(got)
    eager_leaves, eager_tree = pytree.tree_flatten(eager)
    assert got_tree == eager_tree, f"{what}: structure {got_tree}, expected {eager_tree}"
    for index, (a, b, c) in enumerate(zip(got_leaves, eager_leaves, pytree.tree_leaves(truth))):
        label = what if len(got_leaves) == 1 else f"{what}[{index}]"
        if not isinstance(b, torch.Tensor):
            assert a == b, f"{label}: {a!r}, expected {b!r}"
        elif exact or not b.is_floating_point():
            _assert_bitwise(a, b, label)
        else:
            assert_within(a.detach(), b.detach(), c.detach(), label)


def _assert_bitwise(got: torch.Tensor, expected: torch.Tensor, label: str) -> None:
    assert got.dtype == expected.dtype, f"{label}: dtype {got.dtype}, expected {expected.dtype}"
    assert got.shape == expected.shape, f"{label}: shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    a, b = (t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (got, expected))
    if not torch.equal(a, b):
        wrong = (a != b).view(got.numel(), -1).any(dim=1)
        first = int(wrong.nonzero()[0])
        values = got.reshape(-1)[first].item(), expected.reshape(-1)[first].item()
        raise AssertionError(
            f"{label}: {int(wrong.sum())} of {got.numel()} elements differ bitwise, "
            f"the first at {first}: {values[0]} instead of {values[1]}"
        )
