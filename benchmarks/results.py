"""Results on disk: one JSON file per op and device, `results/<device>/<op>.json`.

{"schema_version", "op", "commit", "dirty", "date", "device", "clocks", "versions", "backends", "checks": {"passed",
"failures"}, "ceilings": {"copy_bytes_per_s", "gemm_flops_per_s"}, "settings", "missing_peers": {name: why},
"measurements": [{"case", "sizes", "dtype", "pass", "mode", "arm", "median_us", "p10_us", "p90_us", "runs", "copies",
"bytes", "flops", "floor_us", "share_of_floor", "ratio", "peak_extra_bytes"}, ...]}

"pass" is "forward" or "forward+backward". "ratio" is the median over rounds of this arm's time over ours: above 1 we
are faster; null while the op's checks fail. An arm that could not run has "error" instead of times.
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
