"""NF4Weight: a weight quantized to 4-bit NormalFloat, in bitsandbytes' bytes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from peftkern.ops.nf4.settled import Settled

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCKSIZE = 256
FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# packed, absmax, nested_absmax, nested_code, nested_offset
NF4Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


@dataclass(frozen=True)
class NF4Weight:
    """A tensor of `shape` in NF4 (Dettmers et al. 2023, arXiv:2305.14314), byte for byte as bitsandbytes stores it.

    Blocks of `blocksize` run over the flattened tensor. Two codes share a byte, the even element in the high nibble.

    Attributes:
        packed: uint8 [(numel + 1) // 2, 1], the codes.
        absmax: one scale per block. float32 [blocks], or uint8 [blocks] codes into `nested_code` when double quantized.
        shape: of the unpacked weight.
        dtype: of the original weight, and what `dequantize` returns by default.
        blocksize: 32 to 4096, a power of two.
        nested_absmax, nested_code, nested_offset: float32 [ceil(blocks / 256)], [256] and [], when double quantized;
            absmax = nested_code[code] * nested_absmax[block // 256] + nested_offset.
    """

    packed: torch.Tensor
    absmax: torch.Tensor
    shape: torch.Size
    dtype: torch.dtype
    blocksize: int = 64
    nested_absmax: torch.Tensor | None = None
    nested_code: torch.Tensor | None = None
    nested_offset: torch.Tensor | None = None
    nested_blocksize: int = NESTED_BLOCKSIZE

    @property
    def double_quant(self) -> bool:
        """Whether the absmax values are themselves quantized to 8 bits."""
        return self.nested_absmax is not None

    @property
    def device(self) -> torch.device:
        """The device of the packed bytes."""
        return self.packed.device

    @property
    def numel(self) -> int:
        """Elements of the unpacked weight."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all stored tensors together."""
        return sum(t.nbytes for t in self.tensors() if t is not None)

    @cached_property
    def settled(self) -> Settled:
        """Watches whether the tensors are left alone from one multiplication to the next."""
        return Settled()

    def tensors(self) -> NF4Tensors:
        """(packed, absmax, nested_absmax, nested_code, nested_offset), the order in which ops take them."""
        return self.packed, self.absmax, self.nested_absmax, self.nested_code, self.nested_offset

    def with_tensors(self, tensors: NF4Tensors) -> NF4Weight:
        """The same weight over other tensors, in the order of `tensors()`."""
        packed, absmax, nested_absmax, nested_code, nested_offset = tensors
        return replace(
            self,
            packed=packed,
            absmax=absmax,
            nested_absmax=nested_absmax,
            nested_code=nested_code,
            nested_offset=nested_offset,
        )

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> NF4Weight:
        """Moves the bytes to `device`. `dtype` changes only what `dequantize` returns, never the stored values."""
        return replace(self._map(lambda t: t.to(device=device)), dtype=dtype or self.dtype)

    def clone(self) -> NF4Weight:
        """A copy that shares no memory with this one."""
        return self._map(torch.Tensor.clone)

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> NF4Weight:
        packed, absmax, *nested = self.tensors()
        a, b, c = (None if t is None else function(t) for t in nested)
        return self.with_tensors((function(packed), function(absmax), a, b, c))

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The weight as a dense tensor of `shape`; see `peftkern.dequantize_nf4`."""
        from peftkern.ops.nf4.function import dequantize_nf4

        return dequantize_nf4(self, dtype)

    def check(self) -> None:
        """Raises ValueError, naming the piece, when bytes, scales, shape and blocksize do not fit each other."""
        if self.blocksize not in BLOCKSIZES:
            raise ValueError(f"NF4Weight: blocksize must be one of {BLOCKSIZES}, got {self.blocksize}")
        if self.dtype not in (*FLOAT_DTYPES, torch.float64):
            raise ValueError(f"NF4Weight: dtype must be a float dtype, got {self.dtype}")
        numel = self.numel
        blocks = -(-numel // self.blocksize)
        self._check_piece("packed", self.packed, (torch.uint8,), (numel + 1) // 2, f"shape {tuple(self.shape)}")
        why = f"shape {tuple(self.shape)} in blocks of {self.blocksize}; is the blocksize right?"
        nested = (self.nested_absmax, self.nested_code, self.nested_offset)
        if self.nested_absmax is None or self.nested_code is None or self.nested_offset is None:
            if any(t is not None for t in nested):
                raise ValueError("NF4Weight: nested_absmax, nested_code and nested_offset come together or not at all")
            self._check_piece("absmax", self.absmax, (torch.float32,), blocks, why)
            return
        self._check_piece("absmax", self.absmax, (torch.uint8,), blocks, why)
        if self.nested_blocksize != NESTED_BLOCKSIZE:
            raise ValueError(f"NF4Weight: nested_blocksize must be {NESTED_BLOCKSIZE}, got {self.nested_blocksize}")
        nested_blocks = -(-blocks // self.nested_blocksize)
        self._check_piece("nested_absmax", self.nested_absmax, (torch.float32,), nested_blocks, f"{blocks} blocks")
        self._check_piece("nested_code", self.nested_code, (torch.float32,), 256, "an 8-bit code book")
        self._check_piece("nested_offset", self.nested_offset, (torch.float32,), 1, "one offset")

    def _check_piece(self, name: str, t: torch.Tensor, dtypes: tuple[torch.dtype, ...], numel: int, why: str) -> None:
        if t.dtype not in dtypes:
            hint = "; is this a double-quantized weight without its nested tensors?" if t.dtype == torch.uint8 else ""
            raise ValueError(f"NF4Weight: {name} must be {dtypes[0]}, got {t.dtype}{hint}")
        if t.numel() != numel:
            raise ValueError(f"NF4Weight: {name} must hold {numel} elements for {why}, got {t.numel()}")
        if t.device != self.packed.device:
            raise ValueError(
                f"NF4Weight: {name} is on {t.device} but packed is on {self.packed.device}; move it with to()"
            )
        if not t.is_contiguous():
            raise ValueError(f"NF4Weight: {name} must be contiguous, got strides {t.stride()}; call contiguous() on it")


def _flatten(q: NF4Weight) -> tuple[list[torch.Tensor | None], tuple]:
    return list(q.tensors()), (tuple(q.shape), q.dtype, q.blocksize, q.nested_blocksize)


def _unflatten(tensors, context: tuple) -> NF4Weight:  # type: ignore[no-untyped-def]
    shape, dtype, blocksize, nested_blocksize = context
    packed, absmax, nested_absmax, nested_code, nested_offset = tensors
    return NF4Weight(
        packed, absmax, torch.Size(shape), dtype, blocksize, nested_absmax, nested_code, nested_offset, nested_blocksize
    )


torch.utils._pytree.register_pytree_node(NF4Weight, _flatten, _unflatten, serialized_type_name="peftkern.NF4Weight")
