"""Runs one op: checks, ceilings, then every case with all arms interleaved."""

from __future__ import annotations

import datetime
import gc
import sys
import textwrap
from collections.abc import Callable
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from benchmarks import environment, timing
from benchmarks.arms import Arm, Job, arms_of, calls, count_copies
from benchmarks.ceilings import Ceilings, dtype_name
from benchmarks.peers import NotApplicable, Peer
from benchmarks.results import OURS, SCHEMA_VERSION
from benchmarks.worker import RemoteSampler, close_workers
from peftkern.ops import backends
from peftkern.testing.checks import failures
from peftkern.testing.spec import Case, Spec

Log = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        device: where.
        dtypes: of the activations (weights, for quantize and dequantize).
        modes: of `timing.MODES[device.type]`.
        budget_s: seconds of interleaved rounds per case, pass and mode.
        case_filter: substrings; a case runs when its name has one of them. Empty: all.
        max_cases: at most so many cases per op, spread over the list. None: all.
        partial: whether cases, dtypes or modes are left out.
        given_commit: the commit, where git cannot tell.
        missing_peers: peers that were asked for and cannot be used here, and why.
    """

    device: torch.device
    dtypes: tuple[torch.dtype, ...]
    modes: tuple[str, ...]
    budget_s: float = 1.0
    case_filter: tuple[str, ...] = ()
    max_cases: int | None = None
    partial: bool = False
    given_commit: str | None = None
    missing_peers: dict[str, str] = field(default_factory=dict)


def select_cases(spec: Spec, settings: Settings) -> list[Case]:
    """The bench cases of this device that the settings ask for."""
    cases = list(spec.bench_cases(settings.device.type))
    if settings.case_filter:
        cases = [case for case in cases if any(part in case.name for part in settings.case_filter)]
    if settings.max_cases is not None and len(cases) > settings.max_cases:
        chosen = np.linspace(0, len(cases) - 1, settings.max_cases).round().astype(int)
        cases = [cases[i] for i in chosen]
    return cases


def run(spec: Spec, settings: Settings, peers: list[Peer], ceilings: Ceilings, log: Log) -> dict[str, Any]:
    """Measures one op and returns its document; see results.py for the schema."""
    device = settings.device
    dtypes = tuple(dtype for dtype in settings.dtypes if dtype in spec.dtypes)
    problems = failures(spec, device, dtypes)
    document: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "op": spec.op,
        **environment.commit(settings.given_commit),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": environment.device_info(device),
        "clocks": {"start": environment.clocks(device)},
        "versions": environment.versions(device, [peer.module for peer in peers]),
        "backends": {op: keys[device.type.upper()] for op, keys in backends().items() if device.type.upper() in keys},
        "checks": {"passed": not problems, "failures": problems},
        "ceilings": {
            "copy_bytes_per_s": ceilings.copy_bytes_per_s,
            "gemm_flops_per_s": ceilings.gemm_flops_per_s,
        },
        "settings": {"budget_s": settings.budget_s, "modes": list(settings.modes), "partial": settings.partial},
        "missing_peers": settings.missing_peers,
        "measurements": [],
    }
    for line in problems:
        log(f"check failed: {line}")
    arms = arms_of(spec, device.type, peers)
    for dtype in dtypes:
        for case in select_cases(spec, settings):
            short = spec.times_forward(case)
            passes = (False,) if spec.train_bytes is None else (False, True) if short else (True,)
            modes = tuple(mode for mode in settings.modes if short or mode != "graph")
            chosen = [arm for arm in arms if arm.applies(case)]
            for training in passes:
                job = Job(spec, case, dtype, device, training)
                timed = replace(settings, modes=modes)
                document["measurements"] += _measure(job, chosen, timed, ceilings, not problems, log)
                _release(device)
    close_workers()
    document["clocks"]["end"] = environment.clocks(device)
    return document


def _release(device: torch.device) -> None:
    """Gives a case's memory and compiled code back before the next one: what is compiled for many falls back."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        # After a capture that failed the allocator may refuse; what it keeps then only lowers what the rest can use.
        with suppress(RuntimeError):
            torch.cuda.empty_cache()


def _measure(
    job: Job, arms: list[Arm], settings: Settings, ceilings: Ceilings, checked: bool, log: Log
) -> list[dict[str, Any]]:
    """All arms of one case and pass, mode after mode."""
    nbytes, flops = job.cost()
    floor = ceilings.floor_us(nbytes, flops, job.dtype)
    label = f"{job.spec.op} [{job.case.name}, {dtype_name(job.dtype)}, {job.pass_name}]"
    if floor / 1e6 > settings.budget_s * 10:
        log(f"skipped: {label}: its floor alone is {floor / 1e6:.1f} s; raise --budget to time it")
        return []
    common = {
        "case": job.case.name,
        "sizes": {key: _plain(value) for key, value in job.case.sizes.items()},
        "dtype": dtype_name(job.dtype),
        "pass": job.pass_name,
    }
    flush = timing.l2_flush(job.device) if job.device.type == "cuda" else None
    rows = []
    with torch.set_grad_enabled(job.training):
        ready, peaks, errors, copies = _prepare(job, arms)
        for mode in settings.modes:
            times, failed, mode_peaks = _time_mode(job, arms, ready, mode, flush, copies, settings.budget_s)
            for arm in arms:
                if mode == "graph" and not arm.adapter.graph:
                    continue
                row = {**common, "mode": mode, "arm": arm.name}
                if arm.name in times:
                    row |= _row(times, arm.name, floor, checked)
                    row |= {"copies": copies, "bytes": nbytes, "flops": flops}
                    row["peak_extra_bytes"] = peaks.get(arm.name, mode_peaks.get(arm.name))
                elif arm.name in errors or arm.name in failed:
                    row["error"] = errors.get(arm.name) or failed[arm.name]
                    log(f"{label}, {mode}: {arm.name}: {row['error']}")
                else:
                    continue  # the peer has nothing for these arguments
                rows.append(row)
    return rows


def _row(times: dict[str, list[float]], arm: str, floor: float, checked: bool) -> dict[str, Any]:
    samples = timing.stats(times[arm])
    ratio = None
    if checked and OURS in times:
        rounds = min(len(times[arm]), len(times[OURS]))
        ratio = float(np.median(np.array(times[arm][:rounds]) / np.array(times[OURS][:rounds])))
    return {
        "median_us": round(samples.median_us, 3),
        "p10_us": round(samples.p10_us, 3),
        "p90_us": round(samples.p90_us, 3),
        "runs": samples.runs,
        "floor_us": round(floor, 3),
        "share_of_floor": float(f"{floor / samples.median_us:.4g}"),
        "ratio": None if ratio is None else round(ratio, 4),
    }


def _plain(size: Any) -> Any:
    """A size as JSON takes it; a list of hundreds of shapes by its beginning."""
    return size if isinstance(size, (int, float, str)) else textwrap.shorten(str(size), 60, placeholder=" ...")


def _prepare(job: Job, arms: list[Arm]) -> tuple[dict[str, list[timing.Call]], dict[str, int], dict[str, str], int]:
    """Arguments in every arm's hands, warmed up: calls, peak memory and errors by arm, and the number of copies."""
    base = job.arguments()
    copies = count_copies(base, job.device.type)
    ready: dict[str, list[timing.Call]] = {}
    peaks: dict[str, int] = {}
    errors: dict[str, str] = {}
    for arm in arms:
        if arm.peer is not None:
            continue
        try:
            made = calls(job, arm, base, copies)
            timing.warm_up(made[0])
            peaks[arm.name] = timing.peak_extra_bytes(made[0], job.device)
            for call in made[1:] if arm.stateful else ():
                call()
            ready[arm.name] = made
        except NotApplicable:
            continue
        except Exception as error:
            errors[arm.name] = timing.one_line(error)
    return ready, peaks, errors, copies


def _time_mode(
    job: Job,
    arms: list[Arm],
    ready: dict[str, list[timing.Call]],
    mode: str,
    flush: timing.Call | None,
    copies: int,
    budget_s: float,
) -> tuple[dict[str, list[float]], dict[str, str], dict[str, int]]:
    """Interleaved times by arm, errors of the arms without, and peaks measured in other processes."""
    samplers: dict[str, timing.Sampler] = {}
    errors: dict[str, str] = {}
    peaks: dict[str, int] = {}
    with ExitStack() as stack:
        for arm in arms:
            if mode == "graph" and not arm.adapter.graph:
                continue
            try:
                if arm.peer is not None:
                    remote = stack.enter_context(closing(RemoteSampler(job, arm, mode, copies)))
                    samplers[arm.name] = remote
                    peaks[arm.name] = remote.peak_extra_bytes
                elif arm.name in ready:
                    samplers[arm.name] = timing.make_sampler(mode, ready[arm.name], flush or _nothing)
            except NotApplicable:
                continue
            except Exception as error:
                errors[arm.name] = timing.one_line(error)
        times, dropped = timing.interleave(samplers, budget_s)
    return times, errors | dropped, peaks


def _nothing() -> None:
    """Nothing to flush."""
