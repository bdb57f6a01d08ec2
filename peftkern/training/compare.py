"""The methods side by side on the same data, token budget and seed: what `peftkern compare` does."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from peftkern.formats.atomic import atomic_write_text
from peftkern.training import output
from peftkern.training.errors import UserError
from peftkern.training.memory import megabytes
from peftkern.training.model import read_json
from peftkern.training.settings import METHODS, CompareSettings, TrainSettings

RESULT = "compare.json"
PLOT = "compare.png"
# OpenMP's threads of a small model wait for each other often. Spinning less costs a few percent on a calm machine; on a
# busy one it is several times faster, because a thread that spins keeps the one it waits for from running.
ENVIRONMENT = {"GOMP_SPINCOUNT": "10000", "NO_COLOR": "1"}
NAMES = {
    "full": "full fine-tuning",
    "lora": "LoRA",
    "qlora": "QLoRA",
    "adapter": "adapter",
    "prompt": "prompt tuning",
    "ptuning_v2": "P-tuning v2",
}


def compare(settings: CompareSettings, console: Console) -> dict[str, Any]:
    """Runs every method in a process of its own, so that its peak memory is its own; prints, saves and plots the table.

    Args:
        settings: validated.
        console: where the person reads along.

    Returns:
        What is saved as `compare.json` in the output directory: the setting, and a row per method.

    Raises:
        UserError: input that cannot be used.
        RuntimeError: a method's process failed; its last line of output says why.
    """
    settings.output = settings.output or "runs/compare"
    directory = output.prepare(settings, "report")
    methods = [method for method in METHODS if method in settings.methods or method == "full"]
    reports = {}
    for number, method in enumerate(methods, 1):
        console.print(f"[{number}/{len(methods)}] {NAMES[method]} ...", markup=False, highlight=False)
        reports[method] = _run(method, settings, directory)
        console.print(f"      {_headline(reports[method])}", highlight=False)
    rows = [table_row(method, reports[method], reports["full"]) for method in methods]
    result = {"rows": rows, "reports": reports, "settings": dataclasses.asdict(settings)}
    atomic_write_text(directory / RESULT, json.dumps(result, indent=2) + "\n")
    from peftkern.training.plot import plot_comparison

    plot_comparison(rows, directory / PLOT)
    console.print(render(rows))
    first = reports["full"]
    console.print(
        f"{first['tokens']:,} tokens each, {first['dtype']} on {first['device']}, {first['threads']} threads; "
        f"held-out loss before: {first['heldout']['loss_before']:.4f}. Memory is what the process needs beyond its "
        "libraries and data; quality is the share of full fine-tuning's held-out improvement.",
        highlight=False,
    )
    console.print(f"saved {directory / RESULT} and {directory / PLOT}", highlight=False)
    return result


def _run(method: str, settings: CompareSettings, directory: Path) -> dict[str, Any]:
    """One method's report, from `peftkern finetune` in its own process."""
    shared = {f.name: getattr(settings, f.name) for f in dataclasses.fields(TrainSettings)}
    place = directory / method
    config = {
        **{name: value for name, value in shared.items() if value is not None},
        "method": method,
        "output": str(place),
        "learning_rate": settings.learning_rates.get(method),
        "save_steps": 0,
        "overwrite": True,
    }
    place.mkdir(exist_ok=True)
    path = place / "config.yaml"
    atomic_write_text(path, json.dumps(config))  # JSON is YAML
    (place / output.REPORT).unlink(missing_ok=True)
    command = [sys.executable, "-m", "peftkern", "finetune", "--config", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, env={**ENVIRONMENT, **os.environ})
    report = read_json(place / output.REPORT)
    if done.returncode or not isinstance(report, dict):
        lines = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()
        reason = lines[-1].removeprefix("peftkern: ").removeprefix("error: ")
        if done.returncode == 2:
            raise UserError(f"{method}: {reason}")
        if done.returncode == 130:
            raise KeyboardInterrupt
        raise RuntimeError(f"compare: {method} failed with exit code {done.returncode}: {reason}")
    return report


def _headline(report: dict[str, Any]) -> str:
    heldout = report["heldout"]
    return (
        f"held-out perplexity {heldout['perplexity_before']:.2f} -> {heldout['perplexity_after']:.2f}, "
        f"{report['seconds']:.1f} s at learning rate {report['learning_rate']:g}"
    )


def needed_memory(report: dict[str, Any]) -> int:
    """Peak memory of the training, less what the process held before it loaded the model (libraries and data)."""
    return report["peak_memory_bytes"] - report["memory_before_model_bytes"]


def table_row(method: str, report: dict[str, Any], full: dict[str, Any]) -> dict[str, Any]:
    """A method's line of the comparison, relative to full fine-tuning."""
    heldout, reference = report["heldout"], full["heldout"]
    gained = heldout["loss_before"] - heldout["loss_after"]
    possible = reference["loss_before"] - reference["loss_after"]
    return {
        "method": method,
        "learning_rate": report["learning_rate"],
        "trainable_parameters": report["trainable_parameters"],
        "trainable_percent": 100 * report["trainable_parameters"] / report["total_parameters"],
        "peak_memory_bytes": report["peak_memory_bytes"],
        "memory_bytes": needed_memory(report),
        "tokens_per_second": report["tokens_per_second"],
        "relative_speed": report["tokens_per_second"] / full["tokens_per_second"],
        "heldout_loss": heldout["loss_after"],
        "heldout_perplexity": heldout["perplexity_after"],
        # Not defined when full fine-tuning itself did not improve.
        "quality": gained / possible if possible > 0 else None,
    }


def render(rows: list[dict[str, Any]]) -> Table:
    """The table for the terminal."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("method")
    for title in ("trainable", "%", "memory", "speed", "loss", "perplexity", "quality"):
        table.add_column(title, justify="right")
    for row in rows:
        quality = "-" if row["quality"] is None else f"{100 * row['quality']:.1f} %"
        table.add_row(
            NAMES[row["method"]],
            f"{row['trainable_parameters']:,}",
            f"{row['trainable_percent']:.2f}",
            megabytes(row["memory_bytes"]),
            f"{row['relative_speed']:.2f}x",
            f"{row['heldout_loss']:.4f}",
            f"{row['heldout_perplexity']:.2f}",
            quality,
        )
    return table
