"""States of sharded parameters: the same as of whole ones, in checkpoints that load under any number of ranks."""

from __future__ import annotations

import copy
import math
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from peftkern.optim import AdamW8bit, PagedAdamW8bit
from peftkern.optim.sharding import scales_shape
from peftkern.testing.queues import Queues

SHAPES = ((64, 256), (512, 16), (100,), (4096,))  # of two LoRA matrices and two norms
NAMES = ("step", "exp_avg", "exp_avg_sq", "exp_avg_absmax", "exp_avg_sq_absmax")


class OnQueues(PagedAdamW8bit):
    def _open(self, device: torch.device) -> Any:
        return Queues()


def chunks(size: int, ranks: int) -> list[int]:
    """How DTensor splits a dimension."""
    step = -(-size // ranks)
    return [min(size, (rank + 1) * step) - min(size, rank * step) for rank in range(ranks)]


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 9), st.sampled_from([8, 16]))
def test_scales_are_split_where_their_blocks_are(rows: int, columns: int, ranks: int, blocksize: int) -> None:
    shape = scales_shape((rows, columns), ranks, blocksize)
    if shape is None:
        return
    assert math.prod(shape) == -(-rows * columns // blocksize)
    per_row = math.prod(shape[1:])
    for own, scales in zip(chunks(rows, ranks), chunks(shape[0], ranks)):
        assert -(-own * columns // blocksize) == scales * per_row
    starts = [sum(chunks(rows, ranks)[:rank]) * columns for rank in range(ranks)]
    assert all(start % blocksize == 0 or start == rows * columns for start in starts)


@pytest.mark.parametrize(
    ("shape", "ranks", "expected"),
    [
        ((16, 4096), 8, (256,)),
        ((16, 4096), 3, (16, 16)),
        ((4096, 16), 8, (256,)),
        ((4096, 16), 3, None),
        ((4096,), 8, (16,)),
        ((5, 100), 1, (2,)),
        ((5, 100), 2, None),
    ],
)
def test_scales_shape(shape: tuple[int, ...], ranks: int, expected: tuple[int, ...] | None) -> None:
    assert scales_shape(shape, ranks, 256) == expected


def gradients(step: int, shapes: tuple[tuple[int, ...], ...] = SHAPES) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(s, generator=generator) * 10 ** (-3 * torch.rand(s, generator=generator)) for s in shapes]


def whole(steps: int, **options: Any) -> tuple[AdamW8bit, list[torch.nn.Parameter]]:
    dtype = options.pop("dtype", torch.float32)
    params = [torch.nn.Parameter(g.to(dtype)) for g in gradients(99)]
    optimizer = AdamW8bit(params, lr=1e-2, **options)
    for step in range(steps):
        for p, grad in zip(params, gradients(step)):
            p.grad = grad.to(dtype)
        optimizer.step()
    return optimizer, params


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def on_ranks(rank: int, world: int, path: str, name: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world)
    try:
        globals()[name](world)
        dist.barrier()
    finally:
        dist.destroy_process_group()


def run_on_ranks(name: str, world: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(on_ranks, (world, str(Path(folder) / "store"), name), world)


def sharded(mesh: Any, cls: type, **options: Any) -> tuple[Any, list[torch.nn.Parameter]]:
    from torch.distributed.tensor import Shard, distribute_tensor

    dtype = options.pop("dtype", torch.float32)
    params = [torch.nn.Parameter(distribute_tensor(g.to(dtype), mesh, [Shard(0)])) for g in gradients(99)]
    return cls(params, lr=1e-2, **options), params


def step_sharded(mesh: Any, optimizer: Any, params: list[Any], step: int, bad: bool = False) -> None:
    from torch.distributed.tensor import Shard, distribute_tensor

    for p, grad in zip(params, gradients(step)):
        p.grad = distribute_tensor(grad.to(p.dtype), mesh, [Shard(0)])
    if bad and dist.get_rank() == dist.get_world_size() - 1:
        params[0].grad.to_local()[0, 0] = math.inf
    optimizer.step()


def check_same(optimizer: Any, params: list[Any], expected: AdamW8bit, values: list[Any]) -> None:
    for p, q in zip(params, values):
        assert torch.equal(full(p.detach()), q)
        for name in NAMES:
            if name in expected.state[q]:
                assert torch.equal(full(optimizer.state[p][name]).reshape(-1), expected.state[q][name].reshape(-1)), (
                    name
                )


def equal_to_whole(world: int) -> None:
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (world,))
    for cls, options in ((AdamW8bit, {}), (OnQueues, {"device_budget": 0})):
        optimizer, params = sharded(mesh, cls, **options)
        for step in range(3):
            step_sharded(mesh, optimizer, params, step)
        check_same(optimizer, params, *whole(3))
        step_sharded(mesh, optimizer, params, 7, bad=True)
        assert optimizer.skipped_steps == 1, "a gradient of one rank that is not finite holds all of them"
        check_same(optimizer, params, *whole(3))

        # A checkpoint of whole tensors into shards, of shards into whole ones, and of shards into shards.
        expected, values = whole(5)
        source, _ = whole(3)
        checkpoint = optimizer.state_dict()
        gathered = checkpoint | {
            "state": {i: {n: full(t) for n, t in state.items()} for i, state in checkpoint["state"].items()}
        }
        other, _ = whole(0)
        other.load_state_dict(gathered)
        for saved in (checkpoint, source.state_dict()):
            resumed, parts = sharded(mesh, cls, **options)
            with torch.no_grad():
                for p, q in zip(parts, params):
                    p.copy_(q)
            resumed.load_state_dict(saved)
            for step in range(3, 5):
                step_sharded(mesh, resumed, parts, step)
            check_same(resumed, parts, expected, values)


def with_options(world: int) -> None:
    """Stochastic rounding has the bits of whole parameters; the norm is that of all shards; a verdict is everyone's."""
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (world,))
    last = dist.get_rank() == world - 1
    for cls, extra in ((AdamW8bit, {}), (OnQueues, {"device_budget": 0})):
        options = {"stochastic_rounding": True, "dtype": torch.bfloat16}
        optimizer, params = sharded(mesh, cls, **options, **extra)
        for step in range(3):
            step_sharded(mesh, optimizer, params, step)
        check_same(optimizer, params, *whole(3, **options))

        optimizer, params = sharded(mesh, cls, max_norm=0.5, **extra)
        for step in range(3):
            step_sharded(mesh, optimizer, params, step)
        _, values = whole(3, max_norm=0.5)
        for p, q in zip(params, values):
            torch.testing.assert_close(full(p.detach()), q.detach(), rtol=1e-4, atol=1e-6)
        before = [full(p.detach()) for p in params]
        step_sharded(mesh, optimizer, params, 3, bad=True)
        assert optimizer.skipped_steps == 1

        unclipped, others = sharded(mesh, cls, check_finite=False, **extra)
        with torch.no_grad():
            for p, q in zip(others, params):
                p.copy_(q)
        unclipped.found_inf = torch.tensor(float(last))
        step_sharded(mesh, unclipped, others, 3)
        assert unclipped.skipped_steps == 1, "what GradScaler found on one rank holds all of them"
        for optimized in (params, others):
            assert all(torch.equal(full(p.detach()), q) for p, q in zip(optimized, before))


def under_fsdp(world: int) -> None:
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )
    from torch.distributed.fsdp import fully_shard

    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (world,))
    options = StateDictOptions(full_state_dict=True)
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(dist.get_rank()))

    def model() -> torch.nn.Module:
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 64))
        return fully_shard(net, mesh=mesh)

    def train(net: torch.nn.Module, optimizer: Any, steps: int) -> None:
        for _ in range(steps):
            net(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    results = []
    for cls, extra in ((AdamW8bit, {}), (OnQueues, {"device_budget": 0})):
        net = model()
        optimizer = cls(net.parameters(), lr=1e-2, **extra)
        train(net, optimizer, 2)
        saved = copy.deepcopy(get_optimizer_state_dict(net, optimizer, options=options))
        weights = [p.detach().clone() for p in net.parameters()]
        train(net, optimizer, 2)
        again = model()
        with torch.no_grad():
            for p, q in zip(again.parameters(), weights):
                p.copy_(q)
        resumed = cls(again.parameters(), lr=1e-2, **extra)
        set_optimizer_state_dict(again, resumed, saved, options=options)
        train(again, resumed, 2)
        for p, q in zip(net.parameters(), again.parameters()):
            assert torch.equal(full(p.detach()), full(q.detach()))
        results.append([full(p.detach()) for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="gloo with a file store")
@pytest.mark.parametrize(
    ("name", "world"), [("equal_to_whole", 2), ("equal_to_whole", 4), ("with_options", 2), ("under_fsdp", 2)]
)
def test_on_ranks(name: str, world: int) -> None:
    run_on_ranks(name, world)


def unfit(world: int) -> None:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (world,))
    split = torch.nn.Parameter(distribute_tensor(torch.randn(101, 100), mesh, [Shard(0)]))
    columns = torch.nn.Parameter(distribute_tensor(torch.randn(64, 128), mesh, [Shard(1)]))
    for param, why in (
        (split, r"2 shards of \[101, 100\] do not hold whole blocks of 256"),
        (columns, "only rows can"),
    ):
        with pytest.raises(ValueError, match=rf"8-bit states of param_groups.*{why}.*min_8bit_size"):
            AdamW8bit([param])
        optimizer = AdamW8bit([param], min_8bit_size=10**6)
        param.grad = param.detach().clone()
        optimizer.step()
        assert optimizer.state[param]["exp_avg"].dtype == torch.float32
    replicated = torch.nn.Parameter(distribute_tensor(torch.randn(101, 100), mesh, [Replicate()]))
    replicated.grad = replicated.detach().clone()
    optimizer = AdamW8bit([replicated])
    optimizer.step()
    assert optimizer.state[replicated]["exp_avg_absmax"].shape == (40,)


def test_shards_without_whole_blocks_are_refused() -> None:
    run_on_ranks("unfit", 2)
