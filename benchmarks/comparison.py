"""The comparison of methods: `peftkern compare`'s result kept beside the benchmarks, and its table in the README.

    python -m benchmarks --keep-comparison runs/compare

copies compare.json and compare.png to results/compare/<device>/ with the commit. A README asks for the table by

    <!-- benchmark:compare/<device>:begin -->
    <!-- benchmark:compare/<device>:end -->
"""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import torch

from benchmarks import environment
from benchmarks.results import RESULTS
from peftkern.formats.atomic import atomic_write_bytes, atomic_write_text
from peftkern.training.compare import NAMES

FOLDER = "compare"
_FILES = ("compare.json", "compare.png")


def keep(directory: Path, commit: str | None = None, root: Path = RESULTS) -> Path:
    """Copies a comparison made on this machine and this commit into the results; returns the JSON's path.

    Raises:
        ValueError: the directory holds no comparison.
    """
    document = read(directory / _FILES[0])
    picture = directory / _FILES[1]
    if not picture.exists():
        raise ValueError(f"benchmarks: no {picture}; run peftkern compare --output {directory} again")
    on_gpu = torch.cuda.is_available() and document["reports"]["full"]["device"] == torch.cuda.get_device_name()
    kind = "cuda" if on_gpu else "cpu"
    device = environment.device_info(torch.device(kind))
    document = {
        **environment.commit(commit),
        "date": datetime.date.today().isoformat(),
        "machine": device,
        **document,
    }
    for part in (document, *document["reports"].values()):  # where the runs lay is nobody's business
        settings = part.get("settings", {})
        if settings.get("output"):
            settings["output"] = Path(settings["output"]).name
    target = root / FOLDER / device["slug"]
    target.mkdir(parents=True, exist_ok=True)
    atomic_write_text(target / _FILES[0], json.dumps(document, indent=1) + "\n")
    atomic_write_bytes(target / _FILES[1], picture.read_bytes())
    return target / _FILES[0]


def read(path: Path) -> dict[str, Any]:
    """A comparison's document.

    Raises:
        ValueError: there is none at `path`.
    """
    try:
        document = json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError) as error:
        raise ValueError(f"benchmarks: no comparison at {path} ({error}); run peftkern compare") from None
    if not isinstance(document, dict) or not {"rows", "reports"} <= document.keys():
        raise ValueError(f"benchmarks: {path} is not what peftkern compare writes; run it again")
    return document


def table(document: dict[str, Any]) -> str:
    """A Markdown table, one line a method."""
    first, machine = document["reports"]["full"], document["machine"]["name"]
    lines = [
        f"{first['tokens']:,} tokens each, {first['dtype']}, {first['threads']} threads of {machine}; "
        f"held-out perplexity before {first['heldout']['perplexity_before']:.1f}. Memory is what training needs beyond "
        f"libraries and data. Commit {document['commit'][:10]}, {document['date']}.",
        "",
        "| method | learning rate | trainable | memory MB | tokens/s over full | held-out perplexity | quality |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in document["rows"]:
        quality = "-" if row["quality"] is None else f"{100 * row['quality']:.1f}%"
        lines.append(
            f"| {NAMES[row['method']]} | {row['learning_rate']:g} | {row['trainable_percent']:.2f}% | "
            f"{row['memory_bytes'] / 1e6:.0f} | {row['relative_speed']:.2f} | {row['heldout_perplexity']:.2f} | "
            f"{quality} |"
        )
    return "\n".join(lines) + "\n"
