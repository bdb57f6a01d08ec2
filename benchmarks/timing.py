"""Taking times: samplers for each mode, interleaved rounds, peak memory. All times are in microseconds."""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

Call = Callable[[], Any]

MODES = {"cpu": ("cpu",), "cuda": ("eager", "graph", "wall")}
HOST_RUNS = 5
DEFAULT_MODES = {"cpu": ("cpu",), "cuda": ("eager", "graph")}
MIN_FLUSH_BYTES = 512 << 20  # its write also keeps the GPU busy for 0.1 to 0.2 ms, while the host prepares the launch


class Sampler(Protocol):
    """Times one call at a time."""

    def sample(self) -> float:
        """Microseconds of one call."""
        ...


@dataclass(frozen=True)
class Stats:
    """Of one arm in one mode, in microseconds."""

    median_us: float
    p10_us: float
    p90_us: float
    runs: int


def stats(samples: Sequence[float]) -> Stats:
    """Median and spread."""
    p10, median, p90 = (float(np.percentile(samples, q)) for q in (10, 50, 90))
    return Stats(median, p10, p90, len(samples))


class CpuSampler:
    """The host's clock around one call; successive calls take successive copies of the arguments."""

    def __init__(self, calls: Sequence[Call]) -> None:
        self._calls = itertools.cycle(calls)

    def sample(self) -> float:
        call = next(self._calls)
        start = time.perf_counter_ns()
        call()
        return (time.perf_counter_ns() - start) / 1e3


class EagerSampler:
    """CUDA events around one call made from Python, after writes over the whole L2 cache.

    The device is busy with as many of these flushes as the host needs to launch the call: the time is the device's, as
    in a training loop, whose host runs ahead. What a caller who waits sees is the wall mode's.
    """

    def __init__(self, calls: Sequence[Call], flush: Call, cuda: Any = torch.cuda) -> None:
        self._calls, self._flush, self._cuda = itertools.cycle(calls), flush, cuda
        self._start, self._end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
        self._flushes = 1 + math.ceil(2 * self._host_us(calls) / self._flush_us())

    def _host_us(self, calls: Sequence[Call]) -> float:
        times = []
        for call in itertools.islice(itertools.cycle(calls), HOST_RUNS):
            self._cuda.synchronize()
            start = time.perf_counter_ns()
            call()
            times.append((time.perf_counter_ns() - start) / 1e3)
        self._cuda.synchronize()
        return float(np.median(times))

    def _flush_us(self) -> float:
        self._flush()
        self._start.record()
        self._flush()
        self._end.record()
        self._cuda.synchronize()
        return max(self._start.elapsed_time(self._end) * 1e3, 1.0)

    def sample(self) -> float:
        call = next(self._calls)
        for _ in range(self._flushes):
            self._flush()
        self._start.record()
        call()
        self._end.record()
        self._cuda.synchronize()
        return self._start.elapsed_time(self._end) * 1e3


class WallSampler:
    """The host's clock from the call until the device is idle: what a Python program waits."""

    def __init__(self, calls: Sequence[Call], flush: Call, cuda: Any = torch.cuda) -> None:
        self._calls, self._flush, self._cuda = itertools.cycle(calls), flush, cuda

    def sample(self) -> float:
        call = next(self._calls)
        self._flush()
        self._cuda.synchronize()
        start = time.perf_counter_ns()
        call()
        self._cuda.synchronize()
        return (time.perf_counter_ns() - start) / 1e3


class GraphSampler:
    """One CUDA graph of the calls on all copies of the arguments, replayed whole; a sample is the time per call.

    The copies together exceed the L2 cache by far, so each call finds its inputs in device memory. Outputs stay alive
    until the capture ends: no two calls write the same memory.
    """

    def __init__(self, calls: Sequence[Call], flush: Call, cuda: Any = torch.cuda) -> None:
        self._flush, self._cuda, self._count = flush, cuda, len(calls)
        self._start, self._end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
        stream = cuda.Stream()
        stream.wait_stream(cuda.current_stream())
        with cuda.stream(stream):  # handles and workspaces come to be outside the capture
            for call in calls[:2]:
                call()
        cuda.current_stream().wait_stream(stream)
        cuda.synchronize()
        self._graph = cuda.CUDAGraph()
        outside = cuda.current_stream()
        try:
            with cuda.graph(self._graph, stream=stream):
                outputs = [call() for call in calls]
        except Exception:
            cuda.set_stream(outside)  # a capture that fails to end leaves its stream current
            raise
        del outputs
        self._graph.replay()
        cuda.synchronize()

    def sample(self) -> float:
        self._flush()
        self._start.record()
        self._graph.replay()
        self._end.record()
        self._cuda.synchronize()
        return self._start.elapsed_time(self._end) * 1e3 / self._count


def make_sampler(mode: str, calls: Sequence[Call], flush: Call) -> Sampler:
    """The sampler of a mode: "cpu", "eager", "graph" or "wall"."""
    if mode == "cpu":
        return CpuSampler(calls)
    return {"eager": EagerSampler, "graph": GraphSampler, "wall": WallSampler}[mode](calls, flush)


def l2_flush(device: torch.device) -> Call:
    """A function that overwrites more than twice the device's L2 cache."""
    size = max(4 * torch.cuda.get_device_properties(device).L2_cache_size, MIN_FLUSH_BYTES)
    buffer = torch.empty(size // 4, dtype=torch.int32, device=device)
    return buffer.zero_


def warm_up(call: Call, seconds: float = 0.05) -> None:
    """One call, then more until the time is over: compilation, handles and caches come first."""
    call()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        call()
        if torch.cuda.is_initialized():  # or thousands of launches would pile up in the queue
            torch.cuda.synchronize()


def interleave(
    samplers: Mapping[str, Sampler], budget_s: float, min_rounds: int = 15, max_rounds: int = 200, slow_rounds: int = 3
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Rounds of A B C, A B C, ..., after one untimed round, until the budget is spent.

    At least `min_rounds` are run, or `slow_rounds` where even those take several times the budget.

    Returns:
        Times by arm, one per round, and error lines of arms that failed and were dropped.
    """
    times: dict[str, list[float]] = {name: [] for name in samplers}
    errors: dict[str, str] = {}
    start = time.perf_counter()
    for done in range(-1, max_rounds):
        if done == 0:
            start = time.perf_counter()
        spent = time.perf_counter() - start
        enough = min_rounds if spent < 5 * budget_s else slow_rounds
        if len(errors) == len(samplers) or (done >= enough and spent >= budget_s):
            break
        for name, sampler in samplers.items():
            if name in errors:
                continue
            try:
                elapsed = sampler.sample()
            except Exception as error:
                errors[name] = one_line(error)
                del times[name]
                continue
            if done >= 0:
                times[name].append(elapsed)
    return times, errors


def peak_extra_bytes(call: Call, device: torch.device) -> int:
    """The most memory that one call holds above what was held before it, its output included.

    Counts what goes through PyTorch's allocators, on the CPU as well.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        output = call()
        torch.cuda.synchronize(device)
        del output
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would greet on stderr
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        output = call()
    del output
    results = profile.profiler.kineto_results  # type: ignore[union-attr]
    events = sorted((e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]")
    return max(itertools.accumulate((nbytes for _, nbytes in events), initial=0))


def one_line(error: BaseException) -> str:
    """The first line of an error, with its type."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
