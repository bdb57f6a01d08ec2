"""Arms in a process of their own, for peers that patch other packages when imported.

The child is `python -m benchmarks.worker`. Both sides speak lines of JSON over the child's stdin and stdout: first the
job, answered by {"peak": bytes}; then an empty line per sample, answered by {"us": microseconds}; end of input ends it.
{"error": line} answers what failed, {"not_applicable": line} what the peer cannot do. While the child measures, the
parent waits, so rounds stay interleaved.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
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


class RemoteSampler:
    """A sampler whose arm lives in a child process. `peak_extra_bytes` is measured there."""

    def __init__(self, job: Job, arm: Arm, mode: str, copies: int) -> None:
        command = [sys.executable, "-m", "benchmarks.worker"]
        root = Path(__file__).resolve().parents[1]
        self._child = subprocess.Popen(
            command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        try:
            request = {
                "peer": arm.peer,
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
            self.peak_extra_bytes = int(self._ask(json.dumps(request))["peak"])
        except BaseException:
            self.close()
            raise

    def sample(self) -> float:
        return float(self._ask("")["us"])

    def close(self) -> None:
        """Ends the child."""
        assert self._child.stdin is not None
        try:
            self._child.stdin.close()
            self._child.wait(timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            self._child.kill()
            self._child.wait()

    def _ask(self, line: str) -> dict[str, Any]:
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        try:
            self._child.stdin.write(line + "\n")
            self._child.stdin.flush()
        except OSError:
            raise WorkerError("the peer's process ended") from None
        answer = self._child.stdout.readline()
        if not answer:
            raise WorkerError("the peer's process ended")
        message = json.loads(answer)
        if "not_applicable" in message:
            raise NotApplicable(message["not_applicable"])
        if "error" in message:
            raise WorkerError(message["error"])
        return message


def main() -> None:
    """Serves one arm over stdin and stdout."""
    # The protocol gets stdout to itself: whatever a peer prints goes to stderr.
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def answer(message: dict[str, Any]) -> None:
        channel.write(json.dumps(message) + "\n")
        channel.flush()

    try:
        request = json.loads(sys.stdin.readline())
        spec = all_specs()[request["op"]]
        case = next(case for case in spec.cases if case.name == request["case"])
        device = torch.device(request["device"])
        job = Job(spec, case, getattr(torch, request["dtype"]), device, request["training"], request["seed"])
        arm = find_arm(spec, device.type, peers.load(request["peer"]), request["arm"])
        flush = timing.l2_flush(device) if device.type == "cuda" else _nothing
        with torch.set_grad_enabled(job.training):
            ready = calls(job, arm, clone(job.arguments()), request["copies"])
            timing.warm_up(ready[0])
            peak = timing.peak_extra_bytes(ready[0], device)
            sampler = timing.make_sampler(request["mode"], ready, flush)
            answer({"peak": peak})
            for _ in sys.stdin:
                answer({"us": sampler.sample()})
    except NotApplicable as reason:
        answer({"not_applicable": str(reason)})
    except Exception as error:
        answer({"error": timing.one_line(error)})


def _nothing() -> None:
    """The CPU has no cache that is flushed."""


if __name__ == "__main__":
    main()
