"""The command line: measure ops, then write tables and plots from the results."""

from __future__ import annotations

import argparse
import importlib
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks import ceilings, comparison, paging, peers, plots, report, results, runner, timing
from peftkern.testing.spec import Spec, all_specs

QUICK_BUDGET_S, QUICK_CASES = 0.1, 3
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEFAULT_DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.bfloat16,)}


def parser() -> argparse.ArgumentParser:
    """The options."""
    p = argparse.ArgumentParser(prog="python -m benchmarks", description="Times every op against its floor and peers.")
    p.add_argument(
        "--op",
        default="",
        help=f"op names or op folders, comma-separated (nf4: its four), or {paging.OP}; default all",
    )
    p.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    p.add_argument("--peers", help=f"of {', '.join(peers.PEER_FILES)}, or none; default all. torch is always there")
    p.add_argument(
        "--dtype", default="", help="float32, bfloat16, float16; default bfloat16, on the CPU float32 as well"
    )
    p.add_argument("--case", default="", help="parts of case names, comma-separated, e.g. 'M=1,M=16'")
    p.add_argument("--modes", default="", help="of eager, graph, wall on CUDA; default eager,graph")
    p.add_argument("--budget", type=float, default=1.0, help="seconds of rounds per case and mode (default 1)")
    p.add_argument("--quick", action="store_true", help=f"{QUICK_CASES} cases per op, {QUICK_BUDGET_S} s each")
    p.add_argument("--out", type=Path, help="folder for the JSON; default benchmarks/results, for complete runs only")
    p.add_argument("--commit", help="commit to record, where git cannot tell")
    p.add_argument(
        "--keep-comparison", type=Path, metavar="DIR", help="take a peftkern compare output into the results"
    )
    p.add_argument("--report", action="store_true", help="write the READMEs' tables from benchmarks/results")
    p.add_argument("--plot", action="store_true", help="write a PNG beside each JSON")
    return p


def select_specs(names: str) -> list[Spec]:
    """Specs by op or folder name; all for an empty string.

    Raises:
        ValueError: a name that is neither.
    """
    specs = all_specs()
    if not names:
        return list(specs.values())
    chosen: dict[str, Spec] = {}
    for name in _split(names):
        try:
            folder = {spec.op for spec in importlib.import_module(f"peftkern.ops.{name}.spec").SPECS}
        except ImportError:
            folder = set()
        found = {op: spec for op, spec in specs.items() if op == name or op in folder}
        if not found:
            raise ValueError(f"benchmarks: no op {name!r}; there are {', '.join(specs)}")
        chosen |= found
    return list(chosen.values())


def select_peers(names: str | None) -> tuple[list[peers.Peer], dict[str, str]]:
    """The usable peers of those named, "torch" first, and why the others are not usable.

    Raises:
        ValueError: an unknown name.
    """
    wanted = list(peers.PEER_FILES) if names is None else [] if names == "none" else _split(names)
    usable, missing = [], {}
    for name in dict.fromkeys(["torch", *wanted]):
        peer = peers.load(name)
        why = peer.missing()
        if why is None:
            usable.append(peer)
        else:
            missing[name] = why
    return usable, missing


def make_settings(options: argparse.Namespace, missing: dict[str, str]) -> runner.Settings:
    """Settings from the options.

    Raises:
        ValueError: an option's value that cannot be used here.
    """
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("benchmarks: --device cuda, but torch finds no CUDA device; use --device cpu")
    dtypes = _choose("--dtype", options.dtype, DTYPES) or DEFAULT_DTYPES[device]
    modes = _choose("--modes", options.modes, {m: m for m in timing.MODES[device]}) or timing.DEFAULT_MODES[device]
    if not options.budget > 0:
        raise ValueError(f"benchmarks: --budget must be a positive number of seconds, got {options.budget}")
    complete = set(dtypes) >= set(DEFAULT_DTYPES[device]) and set(modes) >= set(timing.DEFAULT_MODES[device])
    return runner.Settings(
        device=torch.device(device),
        dtypes=dtypes,
        modes=modes,
        budget_s=QUICK_BUDGET_S if options.quick else options.budget,
        case_filter=tuple(_split(options.case)),
        max_cases=QUICK_CASES if options.quick else None,
        partial=bool(options.quick or options.case or not complete),
        given_commit=options.commit,
        missing_peers=missing,
    )


def measure(options: argparse.Namespace) -> bool:
    """Runs the chosen ops and writes their results; whether all of ours passed and ran."""
    ops = [name for name in _split(options.op) if name != paging.OP]
    specs = select_specs(",".join(ops)) if ops or not options.op else []
    usable, missing = select_peers(options.peers)
    settings = make_settings(options, missing)
    paged = paging.OP in _split(options.op)
    if paged and settings.device.type != "cuda":
        raise ValueError(f"benchmarks: {paging.OP} needs --device cuda, got cpu; time adamw8bit there")
    for name, why in missing.items():
        print(f"peer {name} left out: {why}")
    root = options.out or (None if settings.partial else results.RESULTS)
    limits = ceilings.measure(settings.device, settings.dtypes)
    good = True
    for spec in specs:
        document = runner.run(spec, settings, usable, limits, _log)
        add_drift(document, settings)
        good = keep(document, root, options.plot) and good
        paged = paged or (spec.op == "adamw8bit" and settings.device.type == "cuda")
    if paged:
        good = keep(paging.run(settings, usable, limits, _log), root, options.plot) and good
    return good


def keep(document: dict[str, Any], root: Path | None, plot: bool) -> bool:
    """Prints a document and, where `root` is given, writes it; whether all of ours passed and ran."""
    for line in report.terminal(document):
        print(line)
    if not document["measurements"]:
        print("  no case matches")
    elif root is None:
        print("  not written: a partial run; give --out DIR to keep it")
    else:
        path = results.write(document, root)
        print(f"  wrote {path}")
        if plot:
            print(f"  wrote {plots.plot(document, path.with_suffix('.png'))}")
    sys.stdout.flush()
    ours_failed = any("error" in row for row in document["measurements"] if row["arm"] == results.OURS)
    return document["checks"]["passed"] and not ours_failed


def _log(line: str) -> None:
    print(line, flush=True)


def add_drift(document: dict[str, Any], settings: runner.Settings) -> None:
    """Reads a GPU's ceilings once more: power and heat move them within a run. A CPU's take too long to repeat."""
    if settings.device.type == "cuda":
        document["ceilings_after"] = asdict(ceilings.measure(settings.device, settings.dtypes))


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _choose(option: str, text: str, known: dict) -> tuple:  # type: ignore[type-arg]
    for name in _split(text):
        if name not in known:
            raise ValueError(f"benchmarks: {option} {name!r} is not one of {', '.join(known)}")
    return tuple(known[name] for name in _split(text))


def main(argv: list[str] | None = None) -> int:
    """Exit code 0: done; 1: a check failed or our op did not run; 2: a mistake in the command or in a README."""
    options = parser().parse_args(argv)
    good = True
    try:
        if options.keep_comparison:
            print(f"wrote {comparison.keep(options.keep_comparison, options.commit)}")
        elif options.op or not (options.report or options.plot):
            good = measure(options)
        elif options.plot:
            for path in sorted((options.out or results.RESULTS).glob("*/*.json")):
                print(f"wrote {plots.plot(results.read(path), path.with_suffix('.png'))}")
        if options.report:
            for path in report.update_readmes():
                print(f"wrote {path}")
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
