"""The same work by other packages: one file per peer, each with a `PEER`.

A peer is imported only when it is asked for, and one that cannot be imported is reported in a line, not as an error.
Adapters take the very arguments that our op gets, so that all arms work on the same values.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch


class NotApplicable(Exception):
    """The peer has no such operation for these arguments; the message says why."""


@dataclass(frozen=True)
class Prepared:
    """One set of arguments in a peer's hands.

    Attributes:
        call: does the work once and returns the output.
        leaves: tensors that get gradients when forward + backward is timed.
    """

    call: Callable[[], Any]
    leaves: tuple[torch.Tensor, ...] = ()


@dataclass(frozen=True)
class Adapter:
    """How a peer does one of our ops.

    Attributes:
        prepare: our op's keyword arguments -> Prepared. May raise NotApplicable. Conversion happens here, untimed.
        graph: whether the work may be captured in a CUDA graph. False for code that launches outside the current
            stream or synchronizes: some such code ends the process when it is captured.
        devices: where it runs.
    """

    prepare: Callable[[dict[str, Any]], Prepared]
    graph: bool = True
    devices: tuple[str, ...] = ("cpu", "cuda")


@dataclass(frozen=True)
class Peer:
    """A package to compare with.

    Attributes:
        name: on the command line and in the first word of its arms.
        module: what to import.
        adapters: op name -> label -> Adapter. The label "" is the peer's plain arm; others are appended to the name.
        own_process: it patches other packages when imported, so its arms run in a process of their own.
    """

    name: str
    module: str
    adapters: Mapping[str, Mapping[str, Adapter]] = field(default_factory=dict)
    own_process: bool = False

    def missing(self) -> str | None:
        """Why it cannot be used here, in one line, or None. Imports the package unless it needs its own process."""
        try:
            if not self.own_process:
                importlib.import_module(self.module)
            elif importlib.util.find_spec(self.module) is None:
                return "not installed"
        except ModuleNotFoundError as error:
            return "not installed" if error.name == self.module else f"needs {error.name}"
        except Exception as error:  # a peer's import can fail in any way, and that is its own affair
            return f"import failed: {(str(error) or type(error).__name__).splitlines()[0]}"
        return None

    def version(self) -> str:
        """The installed version, or "unknown"."""
        try:
            return importlib.metadata.version(self.module)
        except importlib.metadata.PackageNotFoundError:
            return "unknown"

    def arms(self, op: str, device: str) -> dict[str, Adapter]:
        """Arm name -> adapter for the op on that device type."""
        return {
            f"{self.name} {label}".strip(): adapter
            for label, adapter in self.adapters.get(op, {}).items()
            if device in adapter.devices
        }


# The file in this package, in the order in which arms run. "torch" is always timed: it is the dense baseline.
PEER_FILES = {
    "torch": "torch_baseline",
    "without": "without_adapter",
    "peftkern": "own_optimizer",
    "bitsandbytes": "bitsandbytes",
    "peft": "peft",
    "torchao": "torchao",
    "unsloth": "unsloth",
}


def load(name: str) -> Peer:
    """The peer of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in PEER_FILES:
        raise ValueError(f"benchmarks: no peer {name!r}; there are {', '.join(PEER_FILES)}")
    return importlib.import_module(f"benchmarks.peers.{PEER_FILES[name]}").PEER
