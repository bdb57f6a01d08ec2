"""NF4's specs: nf4_quantize, nf4_dequantize, nf4_matmul and nf4_matmul_dx."""

from __future__ import annotations

import math
from collections.abc import Iterable
from types import ModuleType
from typing import Any

import torch

from peftkern.ops._code_tables import dynamic_map
from peftkern.ops.nf4 import reference
from peftkern.ops.nf4.function import dequantize_nf4, nf4_matmul, quantize_nf4
from peftkern.ops.nf4.weight import BLOCKSIZES, NESTED_BLOCKSIZE, NF4Weight
from peftkern.testing.spec import Case, Spec

WEIGHT_STD = 0.02  # of a trained projection
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 8192)
DX_TOKENS = (512, 2048, 8192)  # a backward has a training batch's tokens
CPU_TOKENS = (1, 16, 512)
SHAPES = ((4096, 4096), (11008, 4096), (28672, 8192))  # (N, K): 7B attention, 7B gate, 70B gate


def _weight_case(name: str, N: int, K: int, blocksize: int = 64, double_quant: bool = True, **more: Any) -> Case:
    flags = {key: more.pop(key) for key in ("bench", "devices") if key in more}
    return Case(name, {"N": N, "K": K, "blocksize": blocksize, "double_quant": double_quant, **more}, **flags)


def _weight_cases() -> tuple[Case, ...]:
    """Ragged shapes for quantize and dequantize, then the shapes to time."""
    cases = [
        _weight_case("one-block", 1, 64),
        _weight_case("one-element", 1, 1),
        _weight_case("odd-numel", 33, 65),
        _weight_case("odd-numel-single", 33, 65, double_quant=False),
        _weight_case("blocks-straddle-rows", 7, 100, blocksize=32),
        _weight_case("nested-tail", 130, 257, blocksize=32),  # 1045 scales: four nested blocks and a tail
        _weight_case("zero-blocks", 16, 130, zeros=192),
        _weight_case("all-zero-single", 4, 64, double_quant=False, zeros=256),
        _weight_case("no-rows", 0, 64),
        _weight_case("no-columns", 64, 0, double_quant=False),
        _weight_case("transposed", 48, 80, transposed=True),
        _weight_case("into-out", 24, 72, out=True),
    ]
    for blocksize in BLOCKSIZES:  # 5330 elements: a tail at every blocksize
        cases += [
            _weight_case(f"block{blocksize}-{dq}", 41, 130, blocksize, dq == "double") for dq in ("double", "single")
        ]
    for N, K in SHAPES:
        devices = ("cpu", "cuda") if N == K else ("cuda",)
        cases.append(_weight_case(f"{K}x{N}", N, K, bench=True, devices=devices))
    return tuple(cases)


def _matmul_cases(gpu_tokens: tuple[int, ...]) -> tuple[Case, ...]:
    cases = [
        _weight_case("one-token", 48, 128, M=1),
        _weight_case("one-token-bias", 33, 65, M=1, bias=True),
        _weight_case("odd-everything", 37, 101, M=5, bias=True),
        _weight_case("K-of-one", 3, 1, M=2),
        _weight_case("N-of-one", 1, 96, M=3),
        _weight_case("blocks-straddle-rows", 24, 100, M=17, blocksize=128, double_quant=False, bias=True),
        _weight_case("block32", 64, 160, M=33, blocksize=32),
        _weight_case("block4096", 70, 130, M=65, blocksize=4096, bias=True),
        _weight_case("several-tiles", 136, 320, M=130),
        _weight_case("three-dimensional", 40, 64, M=6, batch=(2, 3), bias=True),
        _weight_case("strided", 40, 64, M=7, transposed=True),
        _weight_case("zero-blocks", 16, 128, M=4, zeros=256),
        _weight_case("no-tokens", 16, 64, M=0, bias=True),
        _weight_case("no-rows", 0, 64, M=3),
    ]
    for N, K in SHAPES:
        for M in sorted({*gpu_tokens, *CPU_TOKENS} if N == K else gpu_tokens):
            on_cpu, on_gpu = N == K and M in CPU_TOKENS, M in gpu_tokens
            devices = ("cpu",) * on_cpu + ("cuda",) * on_gpu
            cases.append(_weight_case(f"{K}->{N} M={M}", N, K, M=M, bench=True, devices=devices))
    return tuple(cases)


def _normal(shape: Iterable[int], generator: torch.Generator, dtype: torch.dtype, std: float = 1.0) -> torch.Tensor:
    return torch.randn(tuple(shape), generator=generator, device=generator.device).mul_(std).to(dtype)


def _dense_weight(case: Case, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    sizes = case.sizes
    weight = _normal((sizes["N"], sizes["K"]), generator, dtype, WEIGHT_STD)
    weight.view(-1)[: sizes.get("zeros", 0)] = 0
    return weight


def _nf4_weight(case: Case, dtype: torch.dtype, generator: torch.Generator) -> NF4Weight:
    weight = _dense_weight(case, dtype, generator)
    return _quantize_reference(weight, case.sizes["blocksize"], case.sizes["double_quant"])


def _quantize_with(backend: ModuleType, weight: torch.Tensor, blocksize: int, double_quant: bool) -> NF4Weight:
    packed, absmax = backend.quantize(weight, blocksize)
    if not double_quant:
        return NF4Weight(packed, absmax, weight.shape, weight.dtype, blocksize)
    offset = absmax.mean() if absmax.numel() else absmax.new_zeros(())
    code = dynamic_map(signed=True, device=weight.device)
    codes, nested_absmax = backend.quantize_absmax(absmax, offset, code, NESTED_BLOCKSIZE)
    return NF4Weight(packed, codes, weight.shape, weight.dtype, blocksize, nested_absmax, code, offset)


def _quantize_reference(weight: torch.Tensor, blocksize: int, double_quant: bool) -> NF4Weight:
    return _quantize_with(reference, weight, blocksize, double_quant)


def _quantize_triton(weight: torch.Tensor, blocksize: int, double_quant: bool) -> NF4Weight:
    from peftkern.ops.nf4 import triton_kernels

    return _quantize_with(triton_kernels, weight, blocksize, double_quant)


def _make_quantize(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> dict[str, Any]:
    weight = _dense_weight(case, dtype, torch.Generator(device).manual_seed(seed))
    if case.sizes.get("transposed"):
        weight = weight.t().contiguous().t()
    return {"weight": weight, "blocksize": case.sizes["blocksize"], "double_quant": case.sizes["double_quant"]}


def _make_dequantize(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> dict[str, Any]:
    q = _nf4_weight(case, dtype, torch.Generator(device).manual_seed(seed))
    if case.sizes.get("out"):
        return {"q": q, "dtype": dtype, "out": torch.full(q.shape, math.nan, dtype=dtype, device=device)}
    return {"q": q, "dtype": dtype}


def _make_matmul(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> dict[str, Any]:
    generator = torch.Generator(device).manual_seed(seed)
    sizes = case.sizes
    q = _nf4_weight(case, dtype, generator)
    x = _normal((*sizes.get("batch", (sizes["M"],)), sizes["K"]), generator, dtype)
    if sizes.get("transposed"):
        x = x.t().contiguous().t()
    return {"x": x, "q": q, "bias": _normal((sizes["N"],), generator, dtype, 0.1) if sizes.get("bias") else None}


def _make_dx(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> dict[str, Any]:
    generator = torch.Generator(device).manual_seed(seed)
    q = _nf4_weight(case, dtype, generator)
    return {"dy": _normal((case.sizes["M"], case.sizes["N"]), generator, dtype), "q": q}


def _dequantize_reference(q: NF4Weight, dtype: torch.dtype, out: torch.Tensor | None = None) -> torch.Tensor:
    result = torch.empty(q.shape, dtype=dtype, device=q.device)
    reference.dequantize_out(*q.tensors(), q.blocksize, q.nested_blocksize, result)  # type: ignore[call-arg]
    return result


def _dequantize_triton(q: NF4Weight, dtype: torch.dtype, out: torch.Tensor | None = None) -> torch.Tensor:
    from peftkern.ops.nf4 import triton_kernels

    result = torch.empty(q.shape, dtype=dtype, device=q.device) if out is None else out
    triton_kernels.dequantize_out(*q.tensors(), q.blocksize, q.nested_blocksize, result)  # type: ignore[call-arg]
    return result


def _matmul_reference(x: torch.Tensor, q: NF4Weight, bias: torch.Tensor | None) -> torch.Tensor:
    weight = _dequantize_reference(q, x.dtype)
    return torch.nn.functional.linear(x, weight, bias)


def _dx(dy: torch.Tensor, q: NF4Weight) -> torch.Tensor:
    return torch.ops.peftkern.nf4_matmul_dx(dy, *q.tensors(), q.blocksize, q.nested_blocksize, q.shape[1])


def _dx_reference(dy: torch.Tensor, q: NF4Weight) -> torch.Tensor:
    return dy @ _dequantize_reference(q, dy.dtype)


def _stored_bytes(case: Case) -> int:
    """Codes and scales of the weight, code book and offset included."""
    numel = case.sizes["N"] * case.sizes["K"]
    blocks = -(-numel // case.sizes["blocksize"])
    scales = blocks + 4 * -(-blocks // NESTED_BLOCKSIZE) + 4 * 256 + 4 if case.sizes["double_quant"] else 4 * blocks
    return (numel + 1) // 2 + scales


def _convert_bytes(case: Case, dtype: torch.dtype) -> int:
    """Quantize reads the dense weight and writes the stored one; dequantize the reverse."""
    return case.sizes["N"] * case.sizes["K"] * dtype.itemsize + _stored_bytes(case)


def _matmul_bytes(case: Case, dtype: torch.dtype) -> int:
    """The stored weight and the activations in, the activations out; the same for dX."""
    sizes = case.sizes
    bias = sizes["N"] if sizes.get("bias") else 0
    return _stored_bytes(case) + (sizes["M"] * (sizes["N"] + sizes["K"]) + bias) * dtype.itemsize


def _times_baselines(case: Case) -> bool:
    """The eager formulas at one shape and few token counts: elsewhere they take gigabytes to say the same."""
    return case.sizes["N"] == case.sizes["K"] and case.sizes.get("M", 1) in CPU_TOKENS


def _no_flops(case: Case, dtype: torch.dtype) -> int:
    return 0


def _matmul_flops(case: Case, dtype: torch.dtype) -> int:
    return 2 * case.sizes["M"] * case.sizes["N"] * case.sizes["K"]


_WEIGHT_CASES = _weight_cases()

SPECS = (
    Spec(
        op="nf4_quantize",
        cases=tuple(c for c in _WEIGHT_CASES if "out" not in c.sizes),
        make=_make_quantize,
        run=quantize_nf4,
        reference=_quantize_reference,
        bytes=_convert_bytes,
        flops=_no_flops,
        exact=True,
        backends={"triton": _quantize_triton},
        baselines={"eager": _quantize_reference},
        times_baselines=_times_baselines,
    ),
    Spec(
        op="nf4_dequantize",
        cases=tuple(c for c in _WEIGHT_CASES if "transposed" not in c.sizes),
        make=_make_dequantize,
        run=dequantize_nf4,
        reference=_dequantize_reference,
        bytes=_convert_bytes,
        flops=_no_flops,
        exact=True,
        backends={"triton": _dequantize_triton},
        baselines={"eager": _dequantize_reference},
        times_baselines=_times_baselines,
    ),
    Spec(
        op="nf4_matmul",
        cases=_matmul_cases(TOKENS),
        make=_make_matmul,
        run=nf4_matmul,
        reference=_matmul_reference,
        bytes=_matmul_bytes,
        flops=_matmul_flops,
        grads=("x", "bias"),
        baselines={"eager": _matmul_reference},
        times_baselines=_times_baselines,
    ),
    Spec(
        op="nf4_matmul_dx",
        cases=tuple(c for c in _matmul_cases(DX_TOKENS) if not {"batch", "transposed", "bias"} & c.sizes.keys()),
        make=_make_dx,
        run=_dx,
        reference=_dx_reference,
        bytes=_matmul_bytes,
        flops=_matmul_flops,
        baselines={"eager": _dx_reference},
        times_baselines=_times_baselines,
    ),
)
