"""Every op keeps its spec: each case, dtype and backend against float64 (or bitwise), gradients included."""

from __future__ import annotations

import pytest
import torch

from peftkern.testing.checks import BACKEND_DEVICE, check_case
from peftkern.testing.spec import Case, Spec, all_specs

SPECS = all_specs()


def _cases(slow: bool) -> list:
    marks = [pytest.mark.slow] if slow else []
    return [
        pytest.param(spec, case, dtype, id=f"{spec.op}-{case.name}-{str(dtype).removeprefix('torch.')}", marks=marks)
        for spec in SPECS.values()
        for case in spec.test_cases()
        for dtype in spec.dtypes
        if case.slow == slow
    ]


def _skip_elsewhere(case: Case, device: torch.device) -> None:
    if device.type not in case.devices:
        pytest.skip(f"a case for {', '.join(case.devices)}")


@pytest.mark.parametrize(("spec", "case", "dtype"), _cases(slow=False))
def test_op_keeps_its_spec(spec: Spec, case: Case, dtype: torch.dtype, device: torch.device) -> None:
    _skip_elsewhere(case, device)
    check_case(spec, case, dtype, device)


@pytest.mark.parametrize(("spec", "case", "dtype"), _cases(slow=True))
def test_large_case(spec: Spec, case: Case, dtype: torch.dtype, device: torch.device) -> None:
    _skip_elsewhere(case, device)
    try:
        check_case(spec, case, dtype, device)
    except torch.OutOfMemoryError:
        pytest.skip("not enough device memory for the reference")
    finally:
        torch.cuda.empty_cache()


@pytest.mark.parametrize(
    ("spec", "backend"),
    [pytest.param(spec, name, id=f"{spec.op}-{name}") for spec in SPECS.values() for name in spec.backends],
)
def test_further_backends(spec: Spec, backend: str, device: torch.device) -> None:
    if BACKEND_DEVICE.get(backend, device.type) != device.type:
        pytest.skip(f"{backend} does not run on {device.type}")
    for case in spec.test_cases(device.type):
        for dtype in spec.dtypes:
            if not case.slow:
                check_case(spec, case, dtype, device, backend)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_spec_is_well_formed(spec: Spec) -> None:
    names = [case.name for case in spec.cases]
    assert len(set(names)) == len(names), "case names repeat"
    assert spec.test_cases("cpu"), "no test cases for the CPU"
    assert spec.bench_cases("cpu"), "no benchmark cases for the CPU"
    assert spec.bench_cases("cuda"), "no benchmark cases for CUDA"
    for case in spec.bench_cases():
        assert spec.bytes(case, spec.dtypes[0]) > 0
        assert spec.flops(case, spec.dtypes[0]) >= 0
    assert (spec.train_bytes is None) == (spec.train_flops is None)
