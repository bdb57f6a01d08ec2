"""What the tests of paging share: parameters, gradients, and an optimizer that pages on the CPU."""

from __future__ import annotations

from typing import Any

import torch

from peftkern.optim import PagedAdamW8bit
from peftkern.testing.queues import Queues

# Small ones that share pages, one that is cut, one of 32 bits, one that ends within a block, one of no elements.
SHAPES = ((64, 64), (80, 64), (100,), (300, 130), (64, 70), (0, 8), (4097,), (70, 64))
SEGMENT = 20_000


class OnQueues(PagedAdamW8bit):
    """Pages tensors of the CPU."""

    seed, host, queues = 0, 1 << 40, None

    def _open(self, device: torch.device) -> Any:
        self.queues = Queues(self.seed, host=self.host)
        return self.queues

    def _apply(self, bucket: Any, grads: Any, states: Any, verdict: Any) -> None:
        super()._apply(bucket, grads, states, verdict)
        if not any(self._pagers[grads[0].device].is_paged(self.state[p]) for p in self.state):
            self.queues.touch([state[name] for state in states for name in ("exp_avg", "exp_avg_sq")])


def parameters(device: torch.device, dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(s, generator=generator).to(device, dtype)) for s in SHAPES]


def groups(params: list[Any]) -> list[dict[str, Any]]:
    return [{"params": params[:4], "weight_decay": 0.1}, {"params": []}, {"params": params[4:], "lr": 3e-3}]


def set_gradients(params: list[Any], step: int, rest: bool = False) -> None:
    generator = torch.Generator().manual_seed(1000 + step)
    for i, p in enumerate(params):
        grad = torch.randn(p.shape, generator=generator) * 10 ** (-4 * torch.rand(p.shape, generator=generator))
        p.grad = None if rest and (step + i) % 3 == 2 else grad.to(p.device, p.dtype)


def run(optimizer: Any, params: list[Any], steps: range, rest: bool = False) -> None:
    for step in steps:
        set_gradients(params, step, rest)
        optimizer.step()


def snapshot(optimizer: Any, params: list[Any]) -> list[torch.Tensor]:
    states = [t.cpu().clone() for p in params for _, t in sorted(optimizer.state.get(p, {}).items())]
    return [p.detach().cpu().clone() for p in params] + states


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b))


def on_host(optimizer: Any) -> int:
    return sum(host for _, host in optimizer.memory().values())


def on_device(optimizer: Any) -> int:
    return sum(near for near, _ in optimizer.memory().values())
