"""Sharded parameters: a DTensor's own part, and states sharded as it is.

Optimizers work on the local part. The states' tensors are DTensors too, so that a checkpoint is whole and loads under
any number of ranks: moments as the parameter, block scales split where it is. Blocks run over the whole parameter, so
every shard must begin with a block of its own; states then do not depend on the sharding.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from peftkern.ops._frozen_weight import is_sharded


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a DTensor on this rank; any other tensor is its own."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def rewrap(old: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """`part` in the place of the old tensor's local part."""
    return _wrap(old, part, old.shape) if is_sharded(old) else part


def moment(param: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """A moment of the parameter, given this rank's part of it."""
    return _wrap(param, part, param.shape) if is_sharded(param) else part


def scale(param: torch.Tensor, part: torch.Tensor, blocksize: int) -> torch.Tensor:
    """Block scales of the parameter, given those of this rank's blocks, flat."""
    if not is_sharded(param):
        return part
    shape = scales_shape(param.shape, _shards(param), blocksize)
    assert shape is not None
    return _wrap(param, part.view(-1, *shape[1:]), shape)


def placement(param: torch.Tensor) -> tuple[Any, Any] | None:
    """On what mesh and how a DTensor is split."""
    dtensor: Any = param
    return (dtensor.device_mesh, dtensor.placements) if is_sharded(param) else None


def first_element(param: torch.Tensor) -> int:
    """Where this rank's rows begin among the parameter's elements."""
    if not is_sharded(param) or param.dim() == 0:
        return 0
    _, offsets = _window(param)
    return offsets[0] * math.prod(param.shape[1:])


def sum_over_shards(value: torch.Tensor, where: tuple[Any, Any] | None) -> torch.Tensor:
    """The sum of a value of each shard; `where` is the `placement`."""
    if where is not None:
        mesh, placements = where
        for dim, placed in enumerate(placements):
            if not placed.is_replicate():
                torch.distributed.all_reduce(value, group=mesh.get_group(dim))
    return value


def own_gradient(param: torch.Tensor) -> torch.Tensor:
    """This rank's part of the gradient, split as the parameter, contiguous."""
    grad: Any = param.grad
    if is_sharded(param) and is_sharded(grad) and not _same(param, grad):
        grad = grad.redistribute(param.device_mesh, param.placements)  # type: ignore[attr-defined]
    return contiguous(local(grad))


def contiguous(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.is_contiguous() else tensor.contiguous()


def own_moment(param: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """This rank's part of a checkpoint's moment, which may be sharded in any way or not at all."""
    if not is_sharded(param):
        return _whole(whole)
    if is_sharded(whole) and _same(param, whole):
        return local(whole)
    whole = _whole(whole)
    for size, offset, dim in zip(*_window(param), range(whole.dim())):
        whole = whole.narrow(dim, offset, size)
    return whole


def own_scale(param: torch.Tensor, whole: torch.Tensor, blocksize: int) -> torch.Tensor:
    """This rank's part of a checkpoint's block scales, flat."""
    whole = _whole(whole).reshape(-1)
    if not is_sharded(param):
        return whole
    sizes, offsets = _window(param)
    row = math.prod(param.shape[1:])
    count = -(-math.prod(sizes) // blocksize)
    return whole.narrow(0, min(offsets[0] * row // blocksize, whole.numel()), count) if sizes else whole


def unfit(param: torch.Tensor, blocksize: int) -> str | None:
    """Why 8-bit states cannot be sharded as the DTensor is, or None."""
    dtensor: Any = param
    sharded = [p for p in dtensor.placements if not p.is_replicate()]
    if len(sharded) > 1 or any(not p.is_shard(0) or type(p).__name__ != "Shard" for p in sharded):
        return f"it is placed as {dtensor.placements}, and only rows can be split"
    if scales_shape(param.shape, _shards(param), blocksize) is None:
        return f"{_shards(param)} shards of {list(param.shape)} do not hold whole blocks of {blocksize}"
    return None


def scales_shape(shape: Sequence[int], shards: int, blocksize: int) -> tuple[int, ...] | None:
    """A shape of block scales whose rows, split as DTensor splits, are those of the parameter's rows split so.

    None where there is none: a shard would begin within a block.
    """
    numel = math.prod(shape)
    blocks = -(-numel // blocksize)
    if shards == 1:
        return (blocks,)
    row = math.prod(shape[1:])
    rows = -(-shape[0] // shards)
    if rows * row % blocksize == 0 and -(-blocks // shards) == rows * row // blocksize:
        return (blocks,)
    return (shape[0], row // blocksize) if row % blocksize == 0 else None


def agree(flag: torch.Tensor, params: Iterable[torch.Tensor]) -> torch.Tensor:
    """The largest flag of all ranks that share a parameter; the host does not wait for it."""
    meshes = {param.device_mesh for param in params if is_sharded(param)}  # type: ignore[attr-defined]
    if meshes:
        flag = flag.clone()
        for mesh in sorted(meshes, key=str):
            for dim in range(mesh.ndim):
                torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX, mesh.get_group(dim))
    return flag


def _wrap(like: torch.Tensor, part: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    from torch.distributed.tensor import DTensor

    dtensor: Any = like
    stride = torch.empty(tuple(shape), device="meta").stride()
    mesh, placements = dtensor.device_mesh, dtensor.placements
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride)


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def _same(a: Any, b: Any) -> bool:
    return a.device_mesh == b.device_mesh and a.placements == b.placements


def _shards(param: Any) -> int:
    return math.prod(
        param.device_mesh.size(dim) for dim, placement in enumerate(param.placements) if placement.is_shard()
    )


def _window(param: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and offsets of this rank's part."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    return compute_local_shape_and_global_offset(param.shape, param.device_mesh, param.placements)  # type: ignore[return-value]
