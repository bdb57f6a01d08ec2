"""Results on disk: one JSON file per op and device, `results/<device>/<op>.json`.

{"schema_version", "op", "commit", "dirty", "date", "device", "clocks", "versions", "backends", "checks": {"passed",
"failures"}, "ceilings": {"copy_bytes_per_s", "gemm_flops_per_s"}, "ceilings_after": the same, "settings",
"missing_peers": {name: why}, "measurements": [{"case", "sizes", "dtype", "pass", "mode", "arm", "median_us", "p10_us",
"p90_us", "runs", "copies", "bytes", "flops", "floor_us", "share_of_floor", "ratio", "peak_extra_bytes"}, ...]}

"pass" is "forward" or "forward+backward". "ratio" is the median over rounds of this arm's time over ours: above 1 we
are faster; null while the op's checks fail. An arm that could not run has "error" instead of times. Floors follow from
"ceilings", measured before; "ceilings_after", measured when the op was done, show how far a GPU drifted meanwhile.
`paging.py` adds keys of its own, documented there.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
SCHEMA_VERSION = 1
OURS = "peftkern"
GRAPH_TOKENS = 64  # up to so many, a launch takes as long as the work: tables and plots show the CUDA graph's time
DENSE = "torch dense"
FROZEN = "torch frozen"  # the layer without its adapter


def write(document: dict[str, Any], root: Path) -> Path:
    """Writes root/<device slug>/<op>.json: all of it or, if that fails, nothing."""
    path = root / document["device"]["slug"] / f"{document['op']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    # One measurement a line: diffs between runs stay readable.
    head = json.dumps({k: v for k, v in document.items() if k != "measurements"}, indent=1)
    rows = ",\n".join(f"  {json.dumps(row)}" for row in document["measurements"])
    text = f'{head.rstrip().removesuffix("}").rstrip()},\n "measurements": [\n{rows}\n ]\n}}\n'
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp's is private
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    return path


def read(path: Path) -> dict[str, Any]:
    """One file's document.

    Raises:
        ValueError: not such a file, or of another schema.
    """
    try:
        document = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"benchmarks: no results at {path}; run python -m benchmarks --op {path.stem}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"benchmarks: {path} is not JSON ({error}); measure again") from None
    if not isinstance(document, dict) or document.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(f"benchmarks: {path} is not of schema {SCHEMA_VERSION}; measure again")
    return document


def arms(document: dict[str, Any]) -> list[str]:
    """Ours first, then the others in the order in which they ran."""
    seen = dict.fromkeys(row["arm"] for row in document["measurements"])
    return sorted(seen, key=lambda arm: arm != OURS)


def best_rows(document: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per case, dtype, pass and arm, in the mode to look at.

    That is the CUDA graph where there are at most GRAPH_TOKENS tokens, or none to count, and eager above. An arm
    without that mode, or that failed in it, is shown by the other one.
    """
    chosen: dict[tuple[str, ...], dict[str, Any]] = {}
    for row in document["measurements"]:
        key = (row["case"], row["dtype"], row["pass"], row["arm"])
        if key not in chosen or _rank(row) < _rank(chosen[key]):
            chosen[key] = row
    return list(chosen.values())


def _rank(row: dict[str, Any]) -> tuple[bool, int]:
    few = row["sizes"].get("M", 0) <= GRAPH_TOKENS
    order = ("graph", "eager", "cpu", "wall") if few else ("eager", "graph", "cpu", "wall")
    return "error" in row, order.index(row["mode"])


def label(document: dict[str, Any], arm: str) -> str:
    """An arm's name in tables and plots."""
    return "dense cuBLAS" if arm == DENSE and document["device"]["type"] == "cuda" else arm


def common_arms(document: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    """The arms of at least half the cases, ours first: the others make no column and no curve."""
    half = len({(row["case"], row["dtype"], row["pass"]) for row in rows}) / 2
    return [arm for arm in arms(document) if sum(row["arm"] == arm for row in rows) >= half]
