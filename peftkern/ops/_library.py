"""Op registration: one schema per op, one owner per (op, device), chosen at import.

PyTorch's dispatcher picks a kernel by device. It cannot choose between CUDA C++ and Triton, so the first backend that
registers for an (op, device) pair owns it: the compiled library is loaded first, then each op's Python backends `fill`
what is still vacant, in the order in which the op's package imports them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

F = TypeVar("F", bound=Callable)

NAMESPACE = "peftkern"
KERNELS_PATH = Path(__file__).resolve().parents[1] / "_kernels.abi3.so"

# Backends handed over to the next one, for debugging and A/B runs. Read once; the compiled library reads it as well.
DISABLED = frozenset(name.strip() for name in os.environ.get("PEFTKERN_DISABLE", "").split(",") if name.strip())

_COMPILED = {"CPU": "cpp", "CUDA": "cuda"}
_owners: dict[tuple[str, str], str] = {}
_ops: list[str] = []

kernels_error: str | None = None
if KERNELS_PATH.exists():
    try:
        torch.ops.load_library(str(KERNELS_PATH))
    except OSError as error:
        kernels_error = f"{KERNELS_PATH.name} cannot be loaded by torch {torch.__version__}: {error}"
else:
    kernels_error = f"{KERNELS_PATH.name} was not built (no C++ compiler or no torch at build time)"

_library = torch.library.Library(NAMESPACE, "DEF")


def define(schema: str) -> None:
    """Defines an op, e.g. `define("nf4_quantize(Tensor weight, int blocksize) -> (Tensor, Tensor)")`."""
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    name = schema.split("(", 1)[0]
    _ops.append(name)
    for key, backend in _COMPILED.items():
        if _has_kernel(name, key):
            _owners[name, key] = backend


def fake(name: str) -> Callable[[F], F]:
    """Registers the decorated function as the op's fake kernel (shapes and dtypes only)."""

    def register(function: F) -> F:
        torch.library.register_fake(f"{NAMESPACE}::{name}", function, lib=_library)
        return function

    return register


def fill(name: str, key: str, backend: str) -> Callable[[F], F]:
    """Registers the decorated function for dispatch key `key` ("CPU" or "CUDA") unless another backend owns it."""

    def register(function: F) -> F:
        if backend not in DISABLED and not _has_kernel(name, key):
            _library.impl(name, function, key)
            _owners[name, key] = backend
        return function

    return register


def backends() -> dict[str, dict[str, str]]:
    """Which backend owns which op on which device: `{"nf4_dequantize": {"CPU": "cpp", "CUDA": "cuda"}, ...}`.

    Ops that the compiled library alone has are nobody's without it.
    Backends are "cuda" (CUDA C++), "triton", "cpp" (C++ on the CPU), "composed" (of other
    ops) and "reference" (eager PyTorch).
    """
    return {name: {key: _owners[name, key] for key in _COMPILED if (name, key) in _owners} for name in _ops}


def _has_kernel(name: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", key)
