"""The same cases for pytest-benchmark: `pytest benchmarks --benchmark-enable`. For a look at one op; results that count
come from `python -m benchmarks`, which interleaves."""

from __future__ import annotations

import itertools

import pytest
import torch

from benchmarks.arms import Job, arms_of, calls, count_copies
from benchmarks.ceilings import dtype_name
from peftkern.testing.spec import all_specs

SMALL_BYTES, SMALL_FLOPS = 1 << 28, 1 << 35  # what the CPU does in about a second


def _jobs() -> list:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    jobs = [Job(spec, case, dtype, device) for spec in all_specs().values() for case in spec.bench_cases(device.type)]
    if device.type == "cpu":
        jobs = [job for job in jobs if job.cost()[0] <= SMALL_BYTES and job.cost()[1] <= SMALL_FLOPS]
    return [pytest.param(job, id=f"{job.spec.op}-{job.case.name}-{dtype_name(dtype)}") for job in jobs]


@pytest.mark.parametrize("job", _jobs())
def test_op(job: Job, benchmark) -> None:  # type: ignore[no-untyped-def]
    ours = arms_of(job.spec, job.device.type, [])[0]
    base = job.arguments()
    with torch.no_grad():
        ready = itertools.cycle(calls(job, ours, base, count_copies(base, job.device.type)))

        def once() -> None:
            next(ready)()
            if job.device.type == "cuda":
                torch.cuda.synchronize()

        nbytes, flops = job.cost()
        benchmark.extra_info.update(bytes=nbytes, flops=flops, **job.case.sizes)
        benchmark(once)
