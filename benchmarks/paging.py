"""PagedAdamW8bit with all states on the host, against the rate of the link with both directions busy."""

from __future__ import annotations

import datetime
import functools
import gc
import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from benchmarks import environment, timing
from benchmarks.ceilings import Ceilings
from benchmarks.peers import Peer
from benchmarks.results import OURS, SCHEMA_VERSION
from benchmarks.runner import Settings
from peftkern.ops.adamw8bit.spec import lora_shapes
from peftkern.optim import AdamW8bit, PagedAdamW8bit
from peftkern.optim.pinned import pin, pinned_bytes

OP = "paged_adamw8bit"
LINK_BYTES = 1 << 30
LARGE = {"268M": 4, "1B": 16}  # matrices of 8192 x 8192
STEPS = 6  # of a sample
TRAINING_S = 0.3
CYCLES = 1000
RESIDENT, NOTHING = "AdamW8bit", "no optimizer"

Log = Callable[[str], None]


def run(settings: Settings, peers: Sequence[Peer], limits: Ceilings, log: Log) -> dict[str, Any]:
    """Measures on a CUDA device; the document is one of results.py with more keys.

    "link_bytes_per_s" of "ceilings": of each case, each way, both at once, measured in its rounds, as a shared link
    drifts; the case's floor is the states' bytes over it. "grown_bytes": of device memory and pinned memory, after
    `CYCLES` optimizers were made, used and dropped. "added_us": what a step adds to the training that it runs behind.
    """
    device = settings.device
    document: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "op": OP,
        **environment.commit(settings.given_commit),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": environment.device_info(device),
        "clocks": {"start": environment.clocks(device)},
        "versions": environment.versions(device, [peer.module for peer in peers]),
        "backends": {},
        "checks": {"passed": True, "failures": []},
        "ceilings": asdict(limits) | {"link_bytes_per_s": []},
        "settings": {"budget_s": settings.budget_s, "modes": ["eager"], "partial": settings.partial},
        "missing_peers": settings.missing_peers,
        "measurements": [],
    }
    streamed = functools.partial(_streamed, peers)
    cases = [*((name, streamed) for name in LARGE), ("LoRA set beside 300 ms", _beside_training)]
    for name, measure in cases:
        if settings.case_filter and not any(part in name for part in settings.case_filter):
            continue
        link = Link(device)
        document["measurements"] += measure(name, link, settings)
        document["ceilings"]["link_bytes_per_s"].append(link.rate())
        log(f"{OP} [{name}]: link {link.rate() / 1e9:.1f} GB/s each way")
        del link
        gc.collect()
        torch.cuda.empty_cache()
    document["grown_bytes"] = grown_bytes(device, CYCLES)
    if any(document["grown_bytes"].values()):
        failure = f"{CYCLES} optimizers left {document['grown_bytes']} bytes behind"
        document["checks"] = {"passed": False, "failures": [failure]}
        log(f"check failed: {failure}")
    document["clocks"]["end"] = environment.clocks(device)
    return document


class Link:
    """Copies between page-locked memory and the device, both directions busy."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._hosts = [pin(LINK_BYTES, device) for _ in range(2)]
        self._near = [torch.zeros(LINK_BYTES, dtype=torch.uint8, device=device) for _ in range(2)]
        self._streams = [torch.cuda.Stream(device) for _ in range(2)]
        self._seconds: list[float] = []

    def measure(self) -> None:
        """As an optimizer's step is: warm, several in a row."""
        self._copy()
        self._seconds.append(_seconds(lambda: [self._copy() for _ in range(3)]) / 3)

    def rate(self) -> float:
        """Bytes per second of each direction: the median."""
        return LINK_BYTES / float(np.median(self._seconds))

    def _copy(self) -> None:
        current = torch.cuda.current_stream(self._device)
        directions = ((self._near[0], self._hosts[0]), (self._hosts[1], self._near[1]))
        for stream, (target, source) in zip(self._streams, directions):
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                target.copy_(source, non_blocking=True)
        for stream in self._streams:
            current.wait_stream(stream)


def grown_bytes(device: torch.device, cycles: int) -> dict[str, int]:
    """What optimizers that were dropped have left behind, by kind of memory."""
    params = _parameters([(512, 1024)] * 4, device)

    def held() -> dict[str, int]:
        gc.collect()
        torch.cuda.synchronize(device)
        return {
            "allocated": torch.cuda.memory_allocated(device),
            "reserved": torch.cuda.memory_reserved(device),
            "pinned": pinned_bytes(),
        }

    before: dict[str, int] = {}
    for cycle in range(cycles):
        optimizer = PagedAdamW8bit(params, device_budget=0)
        optimizer.step()
        optimizer.step()
        del optimizer
        if cycle == 10:
            before = held()
    after = held()
    return {kind: after[kind] - before[kind] for kind in before}


def _streamed(peers: Sequence[Peer], name: str, link: Link, settings: Settings) -> list[dict[str, Any]]:
    """Steps one after another: the time from one to the next. Peers have parameters of their own."""
    params = _parameters([(8192, 8192)] * LARGE[name], settings.device)
    arms = {OURS: PagedAdamW8bit(params, 1e-3, device_budget=0), RESIDENT: AdamW8bit(params, 1e-3)}
    calls: dict[str, Callable[[], Any]] = {arm: optimizer.step for arm, optimizer in arms.items()}
    for arm, adapter in ((arm, adapter) for peer in peers for arm, adapter in peer.arms(OP, "cuda").items()):
        copies = [param.detach().clone() for param in params]
        args = {"params": copies, "grads": [param.grad for param in params], "lr": 1e-3}
        args |= {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01}
        calls[arm] = adapter.prepare(args).call

    def steps(call: Callable[[], Any]) -> Callable[[], float]:
        def sample() -> float:
            call()
            return _seconds(lambda: [call() for _ in range(STEPS)]) / STEPS

        return sample

    return _rows(name, params, link, {arm: steps(call) for arm, call in calls.items()}, arms[OURS], settings)


def _beside_training(name: str, link: Link, settings: Settings) -> list[dict[str, Any]]:
    """A LoRA set's step behind sums that stand for forward and backward: they are bound by memory. Products follow the
    card's clock, which drifts by more than the step takes."""
    params = _parameters(lora_shapes(), settings.device)
    arms = {
        OURS: PagedAdamW8bit(params, 1e-3, device_budget=0),
        RESIDENT: AdamW8bit(params, 1e-3),
        NOTHING: None,
    }
    a, b, c = (torch.randn(8192, 8192, device=settings.device, dtype=torch.bfloat16) for _ in range(3))
    torch.add(a, b, out=c)
    count = round(TRAINING_S / float(np.median([_seconds(lambda: torch.add(a, b, out=c)) for _ in range(20)])))

    def steps(optimizer: Any) -> Callable[[], float]:
        def once() -> None:
            for _ in range(count):
                torch.add(a, b, out=c)
            if optimizer is not None:
                optimizer.step()

        def sample() -> float:
            once()
            return _seconds(once)

        return sample

    rows = _rows(name, params, link, {arm: steps(optimizer) for arm, optimizer in arms.items()}, arms[OURS], settings)
    (alone,) = (row["median_us"] for row in rows if row["arm"] == NOTHING)
    return [row | {"added_us": round(row["median_us"] - alone, 3)} for row in rows]


def _rows(
    name: str,
    params: list[torch.Tensor],
    link: Link,
    samples: dict[str, Callable[[], float]],
    paged: Any,
    settings: Settings,
) -> list[dict[str, Any]]:
    """Interleaved; each arm is warm, and alone on the link."""
    times: dict[str, list[float]] = {arm: [] for arm in samples}
    for sample in samples.values():
        sample()
    started = datetime.datetime.now()
    for done in itertools.count():
        spent = (datetime.datetime.now() - started).total_seconds()
        if done >= 5 and spent > settings.budget_s * 2:
            break
        link.measure()
        for arm, sample in samples.items():
            times[arm].append(sample() * 1e6)
    ((_, nbytes),) = paged.memory().values()
    floor = nbytes / link.rate() * 1e6
    rows = []
    for arm, values in times.items():
        found = timing.stats(values)
        rows.append(
            {
                "case": name,
                "sizes": {"parameters": sum(p.numel() for p in params)},
                "dtype": "bfloat16",
                "pass": "forward",
                "mode": "eager",
                "arm": arm,
                "median_us": round(found.median_us, 3),
                "p10_us": round(found.p10_us, 3),
                "p90_us": round(found.p90_us, 3),
                "runs": found.runs,
                "bytes": nbytes if arm == OURS else 0,
                "floor_us": round(floor, 3),
                "share_of_floor": float(f"{floor / found.median_us:.4g}"),
                "ratio": round(float(np.median(np.array(values) / np.array(times[OURS]))), 4),
            }
        )
    return rows


def _parameters(shapes: Any, device: torch.device) -> list[torch.Tensor]:
    params = []
    for shape in shapes:
        param = torch.nn.Parameter((torch.randn(shape, device=device) * 0.02).bfloat16())
        param.grad = (torch.randn(shape, device=device) * 1e-3).bfloat16()
        params.append(param)
    return params


def _seconds(call: Callable[[], object]) -> float:
    """Of the device, from what was queued before to the end of what the call queues on the current stream."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3
