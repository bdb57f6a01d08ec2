"""Arms: our op, its eager baselines and its peers, each made ready to time on several copies of the arguments."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from benchmarks.peers import Adapter, Peer, Prepared
from benchmarks.results import OURS
from benchmarks.timing import Call
from peftkern.testing.spec import Case, Spec

# Copies are made until they exceed this together, so that successive calls find their inputs out of the cache. Of a
# matmul with few tokens the weights alone are over 200 MB then.
ROTATION_BYTES = {"cpu": 256 << 20, "cuda": 256_000_000}
MAX_COPIES = {"cpu": 4, "cuda": 128}

FORWARD, TRAINING = "forward", "forward+backward"


@dataclass(frozen=True)
class Job:
    """What is timed: one op at one size."""

    spec: Spec
    case: Case
    dtype: torch.dtype
    device: torch.device
    training: bool = False
    seed: int = 0

    @property
    def pass_name(self) -> str:
        """ "forward" or "forward+backward"."""
        return TRAINING if self.training else FORWARD

    def arguments(self) -> dict[str, Any]:
        """The op's keyword arguments."""
        return self.spec.make(self.case, self.dtype, self.device, self.seed)

    def cost(self) -> tuple[int, int]:
        """Least bytes and FLOPs of the pass."""
        spec = self.spec
        if self.training:
            assert spec.train_bytes is not None
            assert spec.train_flops is not None
            return spec.train_bytes(self.case, self.dtype), spec.train_flops(self.case, self.dtype)
        return spec.bytes(self.case, self.dtype), spec.flops(self.case, self.dtype)


@dataclass(frozen=True)
class Arm:
    """One way to do the op.

    Attributes:
        peer: its peer's name, where it must run in a process of its own.
        stateful: its first call on new arguments does more than the next ones, as an optimizer's first step does.
        applies: whether it is timed in a case.
    """

    name: str
    adapter: Adapter
    peer: str | None = None
    stateful: bool = False
    applies: Callable[[Case], bool] = lambda case: True


def arms_of(spec: Spec, device: str, peers: list[Peer]) -> list[Arm]:
    """Ours, the spec's eager baselines, then each peer's."""
    found = [Arm(OURS, Adapter(_adapt(spec, spec.run)))]
    for name, function in spec.baselines.items():
        # Eager formulas may build tables or read sizes on the host: not captured.
        found.append(Arm(name, Adapter(_adapt(spec, function), graph=False), applies=spec.times_baselines))
    for peer in peers:
        for name, adapter in peer.arms(spec.op, device).items():
            found.append(Arm(name, adapter, peer.name if peer.own_process else None, stateful=True))
    return found


def find_arm(spec: Spec, device: str, peer: Peer, name: str) -> Arm:
    """A peer's arm by name.

    Raises:
        KeyError: it has none of that name.
    """
    return Arm(name, peer.arms(spec.op, device)[name])


def _adapt(spec: Spec, function: Callable[..., Any]) -> Callable[[dict[str, Any]], Prepared]:
    def prepare(args: dict[str, Any]) -> Prepared:
        leaves = tuple(args[name] for name in spec.grads if isinstance(args.get(name), torch.Tensor))
        return Prepared(lambda: function(**args), leaves)

    return prepare


def calls(job: Job, arm: Arm, base: Mapping[str, Any], copies: int) -> list[Call]:
    """One callable per copy of the arguments; each arm has its own copies, so that ops that write disturb nobody."""
    return [_call(job, arm.adapter.prepare(clone(base, job.spec.grads if job.training else ()))) for _ in range(copies)]


def _call(job: Job, prepared: Prepared) -> Call:
    if not job.training:
        return prepared.call
    with torch.enable_grad():
        outputs = _tensors(prepared.call())
    dys = [torch.randn_like(output) for output in outputs]
    leaves = [leaf for leaf in prepared.leaves if leaf.requires_grad]

    def call() -> tuple[list[torch.Tensor], tuple[torch.Tensor, ...]]:
        outputs = _tensors(prepared.call())
        return outputs, torch.autograd.grad(outputs, leaves, dys)

    return call


def _tensors(output: Any) -> list[torch.Tensor]:
    return [t for t in pytree.tree_leaves(output) if isinstance(t, torch.Tensor) and t.requires_grad]


def clone(args: Mapping[str, Any], grads: tuple[str, ...] = ()) -> dict[str, Any]:
    """The arguments with tensors of their own; those named in `grads` require gradients."""
    copy = pytree.tree_map(lambda t: t.detach().clone() if isinstance(t, torch.Tensor) else t, dict(args))
    for name in grads:
        if isinstance(copy.get(name), torch.Tensor):
            copy[name].requires_grad_()
    return copy


def count_copies(args: Mapping[str, Any], device: str) -> int:
    """Enough copies of the arguments to exceed the cache, at least two."""
    nbytes = sum(t.nbytes for t in pytree.tree_leaves(dict(args)) if isinstance(t, torch.Tensor))
    return max(2, min(MAX_COPIES[device], math.ceil(ROTATION_BYTES[device] / max(nbytes, 1)) + 1))
