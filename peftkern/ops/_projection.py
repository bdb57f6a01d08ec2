"""One linear layer with its adapter, `LoRAProjection`: what it holds, what it may hold, and how ops take several.

Ops over several projections take lists in the projections' order: lora_A and lora_B, [0, K] and [N, 0] for one without
an adapter; and the frozen weights as they are stored, as `pieces` and `layouts`, PIECES tensors and LAYOUT constants
each: a dense weight and None four times, with four zeros; or `NF4Weight.tensors()`, with (N, K, blocksize,
nested_blocksize). So a backend decides when a weight is made dense, and need not hold all of them at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from peftkern.ops import _recompute
from peftkern.ops._frozen_weight import (
    COMPUTE_DTYPES,
    FrozenWeight,
    check_frozen,
    dense_slice,
    dense_weight,
    is_sharded,
)
from peftkern.ops.nf4.weight import NF4Weight

PIECES, LAYOUT = 5, 4
_DENSE = (0,) * LAYOUT


@dataclass(frozen=True)
class LoRAProjection:
    """x -> x @ weight.T + scaling * (dropout(x) @ lora_A.T) @ lora_B.T + bias

    Attributes:
        weight: [N, K], frozen: dense, or an NF4Weight.
        lora_A, lora_B: [r, K] and [N, r] of any float dtype, r >= 1; both None for a layer without an adapter.
        scaling: a number, or a 0-dim tensor, which is then read at run time and gets its gradient.
        bias: [N] of any float dtype.

    A pytree node: its leaves are its tensors and `scaling`. Source: Hu et al. 2021, arXiv:2106.09685, eq. 3.
    """

    weight: FrozenWeight
    lora_A: torch.Tensor | None = None
    lora_B: torch.Tensor | None = None
    scaling: float | torch.Tensor = 1.0
    bias: torch.Tensor | None = None


def _flatten(p: LoRAProjection) -> tuple[list, None]:
    return [p.weight, p.lora_A, p.lora_B, p.scaling, p.bias], None


def _unflatten(leaves, context: None) -> LoRAProjection:  # type: ignore[no-untyped-def]
    return LoRAProjection(*leaves)


torch.utils._pytree.register_pytree_node(
    LoRAProjection, _flatten, _unflatten, serialized_type_name="peftkern.LoRAProjection"
)


class Packed(NamedTuple):
    """Projections as ops take them."""

    lora_A: tuple[torch.Tensor, ...]
    lora_B: tuple[torch.Tensor, ...]
    biases: tuple[torch.Tensor | None, ...]
    scalings: tuple[float, ...]
    pieces: tuple[torch.Tensor | None, ...]
    layouts: tuple[int, ...]


def pack(projections: Sequence[LoRAProjection], x: torch.Tensor) -> Packed:
    """The projections in lists; a tensor's scaling goes into lora_B. `x` is what they are applied to."""
    compiling = torch.compiler.is_compiling()
    lora_A, lora_B, scalings = [], [], []
    pieces: list[torch.Tensor | None] = []
    layouts: list[int] = []
    for p in projections:
        N, K = p.weight.shape
        if p.lora_A is None or p.lora_B is None:
            lora_A.append(x.new_empty((0, K)))
            lora_B.append(x.new_empty((N, 0)))
            scalings.append(1.0)
        else:
            # Of a list of numbers torch.compile makes constants, and a new graph for every other value.
            folded = compiling or isinstance(p.scaling, torch.Tensor)
            lora_A.append(p.lora_A)
            lora_B.append(p.lora_B * p.scaling if folded else p.lora_B)
            scalings.append(1.0 if folded else float(p.scaling))
        if isinstance(p.weight, NF4Weight):
            pieces += p.weight.tensors()
            layouts += (N, K, p.weight.blocksize, p.weight.nested_blocksize)
        else:
            own, layout = as_pieces(p.weight)
            pieces += own
            layouts += layout
    biases = [p.bias for p in projections]
    if compiling:  # its autograd.Function takes no tensor twice, and NF4 weights share their code table
        lora_A = [t.view_as(t) for t in lora_A]
        biases, pieces = ([None if t is None else t.view_as(t) for t in tensors] for tensors in (biases, pieces))
    return Packed(tuple(lora_A), tuple(lora_B), tuple(biases), tuple(scalings), tuple(pieces), tuple(layouts))


def as_pieces(weight: torch.Tensor) -> tuple[list[torch.Tensor | None], tuple[int, ...]]:
    """(pieces, layouts) of one dense weight."""
    return [weight, *(None,) * (PIECES - 1)], _DENSE


def unpack_weight(
    pieces: Sequence[torch.Tensor | None],
    layouts: Sequence[int],
    index: int,
    dtype: torch.dtype,
    forward: bool = False,
) -> torch.Tensor:
    """One of the weights as a dense matrix [N, K], in its own dtype, or from NF4 in `dtype`; see `dense_weight`."""
    own, layout = pieces[PIECES * index : PIECES * (index + 1)], tuple(layouts[LAYOUT * index : LAYOUT * (index + 1)])
    if layout == _DENSE:
        return dense_weight((own[0],), None, dtype)
    return dense_weight(tuple(own), layout, dtype, forward)  # type: ignore[arg-type]


def take_kept(
    pieces: Sequence[torch.Tensor | None], layouts: Sequence[int], dtype: torch.dtype
) -> tuple[list[torch.Tensor | None], list[int]]:
    """(pieces, layouts), dense where a recomputed forward has left an NF4 weight in `dtype`."""
    pieces, layouts = list(pieces), list(layouts)
    for index in range(len(layouts) // LAYOUT):
        packed = pieces[PIECES * index]
        if packed is None or not layouts[LAYOUT * index]:
            continue
        kept = _recompute.take(packed, dtype)
        if kept is not None:
            pieces[PIECES * index : PIECES * (index + 1)], layouts[LAYOUT * index : LAYOUT * (index + 1)] = as_pieces(
                kept
            )
    return pieces, layouts


def slice_weights(
    pieces: Sequence[torch.Tensor | None],
    layouts: Sequence[int],
    dtype: torch.dtype,
    rows: slice = slice(None),
    columns: slice = slice(None),
) -> tuple[list[torch.Tensor | None], list[int]]:
    """(pieces, layouts) of some rows and columns of every weight, dense in `dtype`; see `dense_slice`."""
    sliced: list[torch.Tensor | None] = []
    for index in range(len(layouts) // LAYOUT):
        own = tuple(pieces[PIECES * index : PIECES * (index + 1)])
        layout = tuple(layouts[LAYOUT * index : LAYOUT * (index + 1)])
        if own[0] is None:
            sliced += own
        elif layout == _DENSE:
            sliced += as_pieces(dense_slice(own[:1], None, dtype, rows, columns))[0]
        else:
            sliced += as_pieces(dense_slice(own, layout, dtype, rows, columns))[0]  # type: ignore[arg-type]
    return sliced, [0] * len(layouts)


def out_features(pieces: Sequence[torch.Tensor | None], layouts: Sequence[int]) -> list[int]:
    """N of every weight."""
    sizes: list[int] = []
    for index in range(len(layouts) // LAYOUT):
        weight = pieces[PIECES * index]
        assert weight is not None
        sizes.append(layouts[LAYOUT * index] or weight.shape[0])
    return sizes


def check_projection(
    where: str, x: torch.Tensor, p: LoRAProjection, input_shape: tuple[int, ...] | None = None
) -> None:
    """Raises ValueError or TypeError, beginning with `where`, for a projection that no op can apply.

    Args:
        where: the op and the name of the projection, such as "lora_qkv: projections[1]".
        x: what it is applied to, or what that takes its dtype and device from.
        input_shape: of what it is applied to, where that is not x.
    """
    if not isinstance(p, LoRAProjection):
        raise TypeError(f"{where} must be a LoRAProjection, got {type(p).__name__}")
    try:
        check_base(where, x, p.weight, p.bias, input_shape)
    except ValueError as error:
        if str(error).startswith(where):
            raise
        raise ValueError(f"{where}: weight: {error}") from None
    if p.lora_A is None and p.lora_B is None:
        return
    if p.lora_A is None or p.lora_B is None:
        missing = "lora_A" if p.lora_A is None else "lora_B"
        raise ValueError(f"{where}: {missing} is None; give lora_A and lora_B both, or neither for no adapter")
    check_adapter(where, p.weight, p.lora_A, p.lora_B, p.scaling)


def check_base(
    op: str,
    x: torch.Tensor,
    weight: FrozenWeight,
    bias: torch.Tensor | None,
    input_shape: tuple[int, ...] | None = None,
) -> None:
    """Raises ValueError or TypeError for a frozen layer that cannot be applied to x; reads no tensor's values.

    `input_shape` is x's unless given.
    """
    check_frozen(op, weight)
    N, K = weight.shape
    _check_tensor(op, "x", x, weight)
    if bias is not None:
        _check_tensor(op, "bias", bias, weight)
    shape = x.shape if input_shape is None else input_shape
    if not shape or shape[-1] != K:
        raise ValueError(
            f"{op}: {'x' if input_shape is None else 'its input'} [*, K] and weight [N, K] must share K, got "
            f"{tuple(shape)} and {tuple(weight.shape)}; is weight transposed?"
        )
    if bias is not None and tuple(bias.shape) != (N,):
        raise ValueError(f"{op}: bias must have shape [{N}], got {tuple(bias.shape)}")


def check_adapter(
    op: str, weight: FrozenWeight, lora_A: torch.Tensor, lora_B: torch.Tensor, scaling: float | torch.Tensor
) -> None:
    """Raises ValueError or TypeError for an adapter that does not fit a sound weight; reads no tensor's values."""
    N, K = weight.shape
    _check_tensor(op, "lora_A", lora_A, weight)
    _check_tensor(op, "lora_B", lora_B, weight)
    if lora_A.dim() != 2 or lora_A.shape[1] != K:
        raise ValueError(f"{op}: lora_A must be [r, K] with K = {K}, got {tuple(lora_A.shape)}; is it transposed?")
    if lora_B.dim() != 2 or lora_B.shape[0] != N:
        raise ValueError(f"{op}: lora_B must be [N, r] with N = {N}, got {tuple(lora_B.shape)}; is it transposed?")
    if lora_A.shape[0] != lora_B.shape[1]:
        raise ValueError(
            f"{op}: lora_A [r, K] and lora_B [N, r] must share the rank, got {tuple(lora_A.shape)} and "
            f"{tuple(lora_B.shape)}; were they saved by different adapters?"
        )
    if lora_A.shape[0] == 0:
        raise ValueError(
            f"{op}: the rank must be at least 1, got lora_A {tuple(lora_A.shape)}; drop the adapter instead"
        )
    if isinstance(scaling, torch.Tensor):
        if scaling.dim() != 0:
            raise ValueError(f"{op}: scaling must be a number or a 0-dim tensor, got shape {tuple(scaling.shape)}")
    elif not abs(scaling) <= sys.float_info.max:
        raise ValueError(f"{op}: scaling must be finite, got {scaling}; it is lora_alpha / r")


def check_dtype(op: str, x: torch.Tensor, weight: FrozenWeight) -> None:
    """Raises ValueError when x and a dense weight differ in dtype and autocast does not bring them together."""
    if isinstance(weight, NF4Weight) or x.dtype == weight.dtype:
        return
    if not torch.is_autocast_enabled(x.device.type):
        raise ValueError(
            f"{op}: x is {x.dtype} but weight is {weight.dtype}; cast one of them or run under torch.autocast"
        )


def _check_tensor(op: str, name: str, tensor: torch.Tensor, weight: FrozenWeight) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(tensor).__name__}")
    if is_sharded(tensor):
        raise ValueError(
            f"{op}: {name} is a sharded DTensor; call the module that FSDP or tensor parallelism wraps, or pass "
            f"{name}.full_tensor()"
        )
    if tensor.dtype not in COMPUTE_DTYPES:
        raise ValueError(f"{op}: {name} must be float32, float16 or bfloat16, got {tensor.dtype}; cast it first")
    if tensor.device != weight.device:
        meta = "meta" in (tensor.device.type, weight.device.type)
        cure = "load its values, or materialize it with to_empty()" if meta else "move one of them"
        raise ValueError(f"{op}: {name} is on {tensor.device} but weight is on {weight.device}; {cure}")
