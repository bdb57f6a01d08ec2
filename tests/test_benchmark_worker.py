"""Arms that run in a process of their own."""

from __future__ import annotations

import contextlib
import io
import subprocess
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from benchmarks import arms, peers, worker
from benchmarks.worker import RemoteSampler, WorkerError
from peftkern.testing.spec import all_specs

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _no_child_is_left() -> Iterator[None]:
    yield
    worker.close_workers()


def _remote(arm: str, case: int = 0) -> RemoteSampler:
    spec = all_specs()["nf4_matmul"]
    job = arms.Job(spec, spec.test_cases()[case], torch.float32, CPU)
    adapter = peers.load("torch").arms("nf4_matmul", "cpu")["torch dense"]
    return RemoteSampler(job, arms.Arm(arm, adapter, "torch"), "cpu", 2)


def test_an_arm_can_run_in_its_own_process() -> None:
    with contextlib.closing(_remote("torch dense")) as sampler:
        assert sampler.sample() > 0
        assert sampler.sample() > 0
        assert sampler.peak_extra_bytes > 0


def test_a_child_serves_job_after_job() -> None:
    with contextlib.closing(_remote("torch dense")) as sampler:
        assert sampler.sample() > 0
    (child,) = worker._workers.values()
    with pytest.raises(WorkerError, match="no job"):
        sampler.sample()
    with contextlib.closing(_remote("torch dense", case=1)) as sampler:
        assert sampler.sample() > 0
    assert list(worker._workers.values()) == [child]
    worker.close_workers()
    assert not worker._workers
    with pytest.raises(WorkerError, match="ended"):
        sampler.sample()


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        ('{"error": "KeyError: 4"}\n', WorkerError, "KeyError: 4"),
        ('{"not_applicable": "no bias"}\n', peers.NotApplicable, "no bias"),
        ("", WorkerError, "the peer's process ended"),
    ],
)
def test_what_a_child_reports(
    answer: str, error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = []
    child = SimpleNamespace(stdin=io.StringIO(), stdout=io.StringIO(answer), wait=lambda timeout: closed.append(1))
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **kwargs: child)
    with pytest.raises(error, match=message):
        _remote("torch dense")
    assert bool(closed) == (not answer)  # what failed may be one job alone
