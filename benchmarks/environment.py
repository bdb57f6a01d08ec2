"""Where a result comes from: commit, versions, device, clocks."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
UNKNOWN = "unknown"


def _output(*command: str) -> str | None:
    """What a command prints, or None when it is absent or fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def commit(given: str | None = None) -> dict[str, Any]:
    """{"commit": hash or "unknown", "dirty": bool or None}; the results themselves do not make the tree dirty."""
    head = given or _output("git", "rev-parse", "HEAD")
    if given or head is None:
        return {"commit": head or UNKNOWN, "dirty": None}
    status = _output("git", "status", "--porcelain", "--", ".", ":!benchmarks/results", ":!*README.md")
    return {"commit": head, "dirty": None if status is None else bool(status)}


def slug(name: str) -> str:
    """A device's name as a folder name: "NVIDIA H200" -> "nvidia-h200"."""
    name = re.sub(r"\((r|tm)\)|@.*|\b(cpu|processor)\b", " ", name.lower())
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-") or UNKNOWN


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def device_info(device: torch.device) -> dict[str, Any]:
    """Name, slug and what matters when comparing: the CPU's threads and vector level, the GPU's units and cache."""
    if device.type == "cpu":
        name = _cpu_name()
        return {
            "type": "cpu",
            "name": name,
            "slug": f"cpu-{slug(name)}",
            "threads": torch.get_num_threads(),
            "capability": torch.backends.cpu.get_cpu_capability(),
        }
    properties = torch.cuda.get_device_properties(device)
    return {
        "type": "cuda",
        "name": properties.name,
        "slug": slug(properties.name),
        "threads": torch.get_num_threads(),
        "capability": f"sm_{properties.major}{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "memory_bytes": properties.total_memory,
    }


def clocks(device: torch.device) -> dict[str, str] | None:
    """The GPU's clocks, power limit and temperature now, as nvidia-smi reports them, or None."""
    if device.type != "cuda":
        return None
    fields = ("clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw", "power.limit", "temperature.gpu")
    values = _smi(device, fields)
    return None if values is None else dict(zip(fields, values))


def _smi(device: torch.device, fields: tuple[str, ...]) -> list[str] | None:
    uuid = str(getattr(torch.cuda.get_device_properties(device), "uuid", ""))
    which = [f"--id=GPU-{uuid.removeprefix('GPU-')}"] if uuid else []
    query = _output("nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", *which)
    if not query:
        return None
    values = [value.strip() for value in query.splitlines()[0].split(",")]
    return values if len(values) == len(fields) else None


def versions(device: torch.device, modules: Iterable[str]) -> dict[str, str]:
    """Of Python, torch, the given packages and, on a GPU, CUDA and the driver."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for module in ("triton", "peftkern", *modules):
        if module == "torch":
            continue
        try:
            found[module] = importlib.metadata.version(module)
        except importlib.metadata.PackageNotFoundError:
            if module == "peftkern":
                found[module] = __import__("peftkern").__version__
    if device.type == "cuda":
        found["cuda"] = torch.version.cuda or UNKNOWN
        driver = _smi(device, ("driver_version",))
        found["driver"] = driver[0] if driver else UNKNOWN
    return found
