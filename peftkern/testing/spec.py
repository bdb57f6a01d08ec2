"""One spec per op: cases, arguments, oracle and floor. Tests, benchmarks and the docs' floors are generated from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Case:
    """One set of sizes. Test cases are small and ragged; `bench` cases are the field's shapes.

    Attributes:
        name: unique among the op's cases; part of it selects the case on the command line.
        sizes: what the spec's functions read.
        bench: timed, not tested.
        devices: device types it belongs to.
        slow: a test case of more than a few seconds; benchmarks do not wait for it. Not for cases of more than 2^31
            elements, as the generic check holds whole float64 copies: an op's own tests compare those in slices.
    """

    name: str
    sizes: Mapping[str, Any]
    bench: bool = False
    devices: tuple[str, ...] = ("cpu", "cuda")
    slow: bool = False


@dataclass(frozen=True)
class Spec:
    """What an op promises.

    Attributes:
        op: its name, e.g. "nf4_dequantize"; benchmarks are selected by it.
        cases: sizes to test and to time.
        make: (case, dtype, device, seed) -> keyword arguments for `run` and `reference`, at trained-like scales.
        run: the public function, over keyword arguments.
        reference: the same formula in eager PyTorch, in whatever dtype its arguments have; in float64 it is the truth.
        dtypes: activations to test and time.
        bytes, flops: (case, dtype) -> the least a call must move through memory and compute: the floor.
        grads: names of the arguments that get gradients.
        exact: results are compared bitwise instead of by the error rule.
        backends: further backends to test by name, called directly: name -> function with run's arguments.
        baselines: eager formulas to time beside it, name -> function with run's arguments.
        times_baselines: whether they are timed in a bench case; in large ones they cost time and memory and say
            nothing that the small ones do not.
        train_bytes, train_flops: the same floor for a forward and backward together. Where both are given, benchmarks
            time forward + backward (to the arguments in `grads`) as well.
        times_forward: whether they time the forward alone in a bench case too, and in graphs as well as eagerly: where
            a step takes long, launches are hidden and its sum is what a user waits for.
    """

    op: str
    cases: tuple[Case, ...]
    make: Callable[[Case, torch.dtype, torch.device, int], dict[str, Any]]
    run: Callable[..., Any]
    reference: Callable[..., Any]
    bytes: Callable[[Case, torch.dtype], int]
    flops: Callable[[Case, torch.dtype], int]
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
    grads: tuple[str, ...] = ()
    exact: bool = False
    backends: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    baselines: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    times_baselines: Callable[[Case], bool] = lambda case: True
    train_bytes: Callable[[Case, torch.dtype], int] | None = None
    train_flops: Callable[[Case, torch.dtype], int] | None = None
    times_forward: Callable[[Case], bool] = lambda case: True

    def test_cases(self, device: str | None = None) -> tuple[Case, ...]:
        """The cases to test, on that device type if one is given."""
        return tuple(c for c in self.cases if not c.bench and (device is None or device in c.devices))

    def bench_cases(self, device: str | None = None) -> tuple[Case, ...]:
        """The cases to time, on that device type if one is given."""
        return tuple(c for c in self.cases if c.bench and (device is None or device in c.devices))


def all_specs() -> dict[str, Spec]:
    """Every op's spec by name: the `SPECS` tuple of each `peftkern/ops/<op>/spec.py`."""
    import importlib
    import pkgutil

    import peftkern.ops

    specs = {}
    for module in pkgutil.iter_modules(peftkern.ops.__path__):
        if module.ispkg:
            for spec in importlib.import_module(f"peftkern.ops.{module.name}.spec").SPECS:
                specs[spec.op] = spec
    return specs
