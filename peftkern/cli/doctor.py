"""`peftkern doctor`: what is installed, which backend owns which op, and whether every op is right on this machine."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import platform
import sys
import time
from typing import Annotated, Any

import typer

PACKAGES = ("torch", "triton", "transformers", "peft", "accelerate", "datasets", "safetensors", "numpy", "bitsandbytes")


def register(app: Any) -> None:
    """Adds the verb to the app."""
    app.command("doctor", help="Versions, devices, backends, and a numerical self-test of every op.")(doctor)


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
    self_test: Annotated[bool, typer.Option("--self-test/--no-self-test", help="Run the ops' own tests.")] = True,
) -> int:
    """Prints the report; returns 1 where the self-test finds a failure."""
    report = diagnose(self_test)
    print(json.dumps(report, indent=2) if as_json else _text(report))
    return 1 if any(test["failures"] for test in report["self_test"]) else 0


def diagnose(self_test: bool = True) -> dict[str, Any]:
    """Everything `peftkern doctor` reports, as plain JSON values.

    Returns:
        versions; platform; devices; cpu_features and build (None without `peftkern._host`); kernels_error (None when
        the compiled kernels are loaded); backends, op -> device -> owner; self_test, one entry per op and device with
        its seconds and one line per failure. The self-test holds each result to the ops' own rule: bitwise where the
        op promises that, else within 1.5 times the error of the same formula in eager PyTorch, float64 being the truth.
    """
    import torch

    import peftkern
    from peftkern.ops import _library

    host = _host()
    return {
        "versions": {"peftkern": peftkern.__version__, "python": platform.python_version()}
        | {name: _version(name) for name in PACKAGES}
        | {"torch": torch.__version__},  # with the build's tag, such as +cu130, which the package's version may lack
        "platform": platform.platform(),
        "devices": _devices(torch),
        "cpu_features": None if host is None else list(host.cpu_features()),
        "build": None if host is None else dict(host.build_info()),
        "disabled_backends": sorted(_library.DISABLED),
        "kernels_error": _library.kernels_error,
        "backends": _library.backends(),
        "self_test": _self_test(torch) if self_test else [],
    }


def _host() -> Any:
    try:
        return importlib.import_module("peftkern._host")
    except ImportError:
        return None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices(torch: Any) -> list[dict[str, Any]]:
    devices: list[dict[str, Any]] = [{"type": "cpu", "name": _cpu_name(), "threads": torch.get_num_threads()}]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "type": "cuda",
                "name": properties.name,
                "arch": f"sm_{properties.major}{properties.minor}",
                "memory_bytes": properties.total_memory,
                "cuda": torch.version.cuda,
            }
        )
    return devices


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _self_test(torch: Any) -> list[dict[str, Any]]:
    from peftkern.testing.checks import failures
    from peftkern.testing.spec import all_specs

    results = []
    for device in ["cpu"] + (["cuda"] if torch.cuda.is_available() else []):
        for name, spec in all_specs().items():
            start = time.perf_counter()
            lines = failures(spec, torch.device(device))
            seconds = round(time.perf_counter() - start, 3)
            results.append({"op": name, "device": device, "seconds": seconds, "failures": lines})
            if sys.stderr.isatty():
                print(f"\r\033[Kself-test: {name} on {device}", end="", file=sys.stderr)
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)
    return results


def _text(report: dict[str, Any]) -> str:
    versions = report["versions"]
    lines = ["versions   " + ", ".join(f"{name} {version or '-'}" for name, version in versions.items())]
    lines.append(f"platform   {report['platform']}")
    for device in report["devices"]:
        if device["type"] == "cpu":
            features = " ".join(report["cpu_features"] or []) or "features unknown"
            lines.append(f"device     {device['name']}, {device['threads']} threads ({features})")
        else:
            memory = device["memory_bytes"] / 1e9
            lines.append(f"device     {device['name']}, {device['arch']}, {memory:.0f} GB, CUDA {device['cuda']}")
    if report["kernels_error"]:
        lines.append(f"kernels    none compiled: {report['kernels_error']}")
        lines.append(
            "           cure: install again where torch and a C++ compiler are there, with --no-build-isolation"
        )
    elif report["build"] is not None:
        build = report["build"]
        archs = build["cuda_archs"].replace(";", " ") or "none"
        lines.append(
            f"kernels    compiled, CUDA archs: {archs}; torch {build['stable_abi_target']} on, "
            f"compiler {build['compiler']}"
        )
    if report["disabled_backends"]:
        lines.append(f"disabled   {', '.join(report['disabled_backends'])} (PEFTKERN_DISABLE)")
    width = max(len(op) for op in report["backends"])
    lines.append(f"backends   {'op':<{width}}  CPU        CUDA")
    for op, owners in report["backends"].items():
        lines.append(f"           {op:<{width}}  {owners.get('CPU', '-'):<9}  {owners.get('CUDA', '-')}")
    for test in report["self_test"]:
        verdict = f"FAILED ({len(test['failures'])})" if test["failures"] else "ok"
        lines.append(f"self-test  {test['op']:<{width}}  {test['device']:<9}  {verdict}, {test['seconds']:.1f} s")
        lines += [f"           {line}" for line in test["failures"][:5]]
    return "\n".join(lines)
