"""NF4 in eager PyTorch, any device and dtype: the oracle, and the backend where nothing compiled is present."""

from __future__ import annotations

from collections.abc import Callable

import torch

from peftkern.ops._code_tables import nf4_code


def quantize(weight: torch.Tensor, blocksize: int) -> tuple[torch.Tensor, torch.Tensor]:
    """float [any shape] -> packed uint8 [(n + 1) // 2, 1], absmax float32 [ceil(n / blocksize)]."""
    scaled, absmax = _scale_blocks(weight.reshape(-1).float(), blocksize)
    if scaled.numel() % 2:
        scaled = torch.nn.functional.pad(scaled, (0, 1))
    code = nf4_code(weight.device)
    # bucketize counts the midpoints strictly below the value, so ties take the lower code.
    codes = torch.bucketize(scaled, (code[:-1] + code[1:]) / 2, out_int32=True).to(torch.uint8)
    return ((codes[::2] << 4) | codes[1::2]).unsqueeze(1), absmax


def quantize_absmax(
    absmax: torch.Tensor, offset: torch.Tensor, code: torch.Tensor, blocksize: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """absmax float32 [b] - offset -> 8-bit codes uint8 [b], nested absmax float32 [ceil(b / blocksize)]."""
    scaled, nested_absmax = _scale_blocks(absmax - offset, blocksize)
    return torch.bucketize(scaled, (code[:-1] + code[1:]) / 2, out_int32=True).to(torch.uint8), nested_absmax


def _scale_blocks(flat: torch.Tensor, blocksize: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Each block over its largest magnitude. As bitsandbytes does it: whole blocks multiply by the reciprocal, a tail
    block divides; the two differ in the last bit."""
    whole = flat.numel() // blocksize * blocksize
    blocks = flat[:whole].reshape(-1, blocksize)
    absmax = blocks.abs().amax(dim=1) if whole else flat.new_empty(0)
    scaled = (blocks * (1.0 / absmax.clamp(min=1e-38)).unsqueeze(1)).reshape(-1)
    if whole < flat.numel():
        tail = flat[whole:]
        tail_absmax = tail.abs().max().clamp(min=1e-38)
        absmax = torch.cat([absmax, tail_absmax.unsqueeze(0)])
        scaled = torch.cat([scaled, tail / tail_absmax])
    return scaled.clamp(-1, 1), absmax


def unnest_absmax(
    absmax: torch.Tensor,
    nested_absmax: torch.Tensor | None,
    nested_code: torch.Tensor | None,
    nested_offset: torch.Tensor | None,
    nested_blocksize: int,
) -> torch.Tensor:
    """The block scales in float32 [blocks]; product and sum are rounded apart, as bitsandbytes' dequantize does."""
    if nested_absmax is None or nested_code is None or nested_offset is None:
        return absmax
    scale = nested_absmax.repeat_interleave(nested_blocksize)[: absmax.numel()]
    return nested_code[absmax.int()] * scale + nested_offset


def dequantize_out(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    nested_absmax: torch.Tensor | None,
    nested_code: torch.Tensor | None,
    nested_offset: torch.Tensor | None,
    blocksize: int,
    nested_blocksize: int,
    out: torch.Tensor,
) -> None:
    """Writes code * absmax, rounded once from float32 to out.dtype, into `out` (contiguous, of the weight's numel)."""
    numel = out.numel()
    if numel == 0:
        return
    scale = unnest_absmax(absmax, nested_absmax, nested_code, nested_offset, nested_blocksize)
    flat = packed.reshape(-1)
    codes = torch.stack((flat >> 4, flat & 0xF), dim=1).reshape(-1)[:numel]
    values = nf4_code(packed.device)[codes.int()]
    whole = numel // blocksize * blocksize
    result = torch.empty(numel, dtype=torch.float32, device=packed.device)
    torch.mul(
        values[:whole].view(-1, blocksize), scale[: whole // blocksize, None], out=result[:whole].view(-1, blocksize)
    )
    if whole < numel:
        torch.mul(values[whole:], scale[-1], out=result[whole:])
    out.copy_(result.view(out.shape))


def slices(dequantize_out: Callable[..., None]) -> Callable[..., None]:
    """The op nf4_dequantize_slice_out as a dequantize of the whole weight by the given op."""

    def dequantize_slice_out(
        packed: torch.Tensor,
        absmax: torch.Tensor,
        nested_absmax: torch.Tensor | None,
        nested_code: torch.Tensor | None,
        nested_offset: torch.Tensor | None,
        blocksize: int,
        nested_blocksize: int,
        out_features: int,
        in_features: int,
        row: int,
        column: int,
        out: torch.Tensor,
    ) -> None:
        weight = out.new_empty(out_features, in_features)
        dequantize_out(packed, absmax, nested_absmax, nested_code, nested_offset, blocksize, nested_blocksize, weight)
        rows, columns = out.shape
        out.copy_(weight[row : row + rows, column : column + columns])

    return dequantize_slice_out


def matmuls(dequantize_out: Callable[..., None]) -> tuple[Callable[..., torch.Tensor], Callable[..., torch.Tensor]]:
    """The ops nf4_matmul and nf4_matmul_dx as a dequantize by the given op, then the GEMM library."""

    def matmul(
        x: torch.Tensor,
        packed: torch.Tensor,
        absmax: torch.Tensor,
        nested_absmax: torch.Tensor | None,
        nested_code: torch.Tensor | None,
        nested_offset: torch.Tensor | None,
        bias: torch.Tensor | None,
        blocksize: int,
        nested_blocksize: int,
        out_features: int,
        settled: bool = False,
    ) -> torch.Tensor:
        weight = x.new_empty(out_features, x.shape[1])
        dequantize_out(packed, absmax, nested_absmax, nested_code, nested_offset, blocksize, nested_blocksize, weight)
        with torch.autocast(x.device.type, enabled=False):  # the dtypes are settled by the caller
            return torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))

    def matmul_dx(
        dy: torch.Tensor,
        packed: torch.Tensor,
        absmax: torch.Tensor,
        nested_absmax: torch.Tensor | None,
        nested_code: torch.Tensor | None,
        nested_offset: torch.Tensor | None,
        blocksize: int,
        nested_blocksize: int,
        in_features: int,
    ) -> torch.Tensor:
        weight = dy.new_empty(dy.shape[1], in_features)
        dequantize_out(packed, absmax, nested_absmax, nested_code, nested_offset, blocksize, nested_blocksize, weight)
        with torch.autocast(dy.device.type, enabled=False):
            return dy @ weight

    return matmul, matmul_dx


dequantize_slice_out = slices(dequantize_out)
matmul, matmul_dx = matmuls(dequantize_out)
