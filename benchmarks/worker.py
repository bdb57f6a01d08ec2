"""Arms in a process of their own, for peers that patch other packages when imported.

The child is `python -m benchmarks.worker PEER`, one for each arm and run: importing such a peer takes long. Both sides
speak lines of JSON over the child's stdin and stdout: a job, answered by {"peak": bytes}; then an empty line for each
sample, answered by {"us": microseconds}; another job replaces the first, and null ends it, answered by {}. End of input
ends the child. {"error": line} answers what failed, {"not_applicable": line} what the peer cannot do. While the child
measures, the parent waits, so rounds stay interleaved.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from benchmarks import peers, timing
from benchmarks.arms import Arm, Job, calls, clone, find_arm
from benchmarks.ceilings import dtype_name
from benchmarks.peers import NotApplicable
from peftkern.testing.spec import all_specs


class WorkerError(Exception):
    """What the child reported, or that it ended."""


_workers: dict[str, Worker] = {}


class Worker:
    """A child process that serves one arm, job after job."""

    def __init__(self, arm: Arm) -> None:
        assert arm.peer is not None
        self._arm = arm.name
        command = [sys.executable, "-m", "benchmarks.worker", arm.peer]
        root = Path(__file__).resolve().parents[1]
        self._child = subprocess.Popen(
            command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    def ask(self, line: str) -> dict[str, Any]:
        """The answer to a line.

        Raises:
            NotApplicable: the peer cannot do that.
            WorkerError: it failed. A child that ended is forgotten, so that the next job gets a new one.
        """
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        try:
            self._child.stdin.write(line + "\n")
            self._child.stdin.flush()
            answer = self._child.stdout.readline()
        except (OSError, ValueError):  # the pipe was broken, or closed here
            answer = ""
        if not answer:
            self.close()
            raise WorkerError("the peer's process ended")
        message = json.loads(answer)
        if "not_applicable" in message:
            raise NotApplicable(message["not_applicable"])
        if "error" in message:
            raise WorkerError(message["error"])
        return message

    def close(self) -> None:
        """Ends the child."""
        if _workers.get(self._arm) is self:
            del _workers[self._arm]
        assert self._child.stdin is not None
        try:
            self._child.stdin.close()
            self._child.wait(timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            self._child.kill()
            self._child.wait()


def close_workers() -> None:
    """Ends every child."""
    for worker in list(_workers.values()):
        worker.close()


class RemoteSampler:
    """A sampler whose arm lives in a child process. `peak_extra_bytes` is measured there."""

    def __init__(self, job: Job, arm: Arm, mode: str, copies: int) -> None:
        if arm.name not in _workers:
            _workers[arm.name] = Worker(arm)
        self._worker = _workers[arm.name]
        request = {
            "arm": arm.name,
            "op": job.spec.op,
            "case": job.case.name,
            "dtype": dtype_name(job.dtype),
            "device": str(job.device),
            "training": job.training,
            "seed": job.seed,
            "mode": mode,
            "copies": copies,
        }
        self.peak_extra_bytes = int(self._worker.ask(json.dumps(request))["peak"])

    def sample(self) -> float:
        return float(self._worker.ask("")["us"])

    def close(self) -> None:
        """Gives the job's memory back; the process stays for the next one."""
        with suppress(WorkerError):  # it ended
            self._worker.ask("null")


def main() -> None:
    """Serves one arm over stdin and stdout."""
    # The protocol gets stdout to itself: whatever a peer prints goes to stderr.
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def answer(message: dict[str, Any]) -> None:
        channel.write(json.dumps(message) + "\n")
        channel.flush()

    peer = peers.load(sys.argv[1])
    sampler: timing.Sampler | None = None
    for line in sys.stdin:
        try:
            if line.strip():
                sampler = None
                gc.collect()
                if torch.cuda.is_initialized():
                    torch.cuda.empty_cache()
                request = json.loads(line)
                if request is None:
                    answer({})
                else:
                    peak, sampler = _start(request, peer)
                    answer({"peak": peak})
            elif sampler is None:
                answer({"error": "no job"})
            else:
                answer({"us": sampler.sample()})
        except NotApplicable as reason:
            answer({"not_applicable": str(reason)})
        except Exception as error:
            answer({"error": timing.one_line(error)})


def _start(request: dict[str, Any], peer: peers.Peer) -> tuple[int, timing.Sampler]:
    """The peak memory of a request's job and its sampler."""
    spec = all_specs()[request["op"]]
    case = next(case for case in spec.cases if case.name == request["case"])
    device = torch.device(request["device"])
    job = Job(spec, case, getattr(torch, request["dtype"]), device, request["training"], request["seed"])
    arm = find_arm(spec, device.type, peer, request["arm"])
    torch.set_grad_enabled(job.training)  # until the next job
    ready = calls(job, arm, clone(job.arguments()), request["copies"])
    timing.warm_up(ready[0])
    peak = timing.peak_extra_bytes(ready[0], device)
    flush = timing.l2_flush(device) if device.type == "cuda" else _nothing
    return peak, timing.make_sampler(request["mode"], ready, flush)


def _nothing() -> None:
    """The CPU has no cache that is flushed."""


if __name__ == "__main__":
    main()
