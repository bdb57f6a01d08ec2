"""What the NF4 ops cannot take is refused by name, by the raw ops as well, before anything is launched."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from peftkern import NF4Weight, dequantize_nf4, nf4_matmul, quantize_nf4
from peftkern.ops import backends
from peftkern.testing.launches import can_count_launches, launches
from peftkern.testing.nf4 import random_nf4

N, K, M = 96, 128, 3
PIECES = ("packed", "absmax", "nested_absmax", "nested_code", "nested_offset")
ops = torch.ops.peftkern


def matmul_args(x: torch.Tensor, q: NF4Weight, bias: torch.Tensor | None = None) -> tuple[Any, ...]:
    return (x, *q.tensors(), bias, q.blocksize, q.nested_blocksize, q.shape[0])


def dx_args(dy: torch.Tensor, q: NF4Weight) -> tuple[Any, ...]:
    return (dy, *q.tensors(), q.blocksize, q.nested_blocksize, q.shape[1])


def dequantize_args(q: NF4Weight, out: torch.Tensor) -> tuple[Any, ...]:
    return (*q.tensors(), q.blocksize, q.nested_blocksize, out)


def slice_args(
    q: NF4Weight, out: torch.Tensor, row: int = 0, column: int = 0, shape: tuple[int, int] = (N, K)
) -> tuple[Any, ...]:
    return (*q.tensors(), q.blocksize, q.nested_blocksize, *shape, row, column, out)


def broken(q: NF4Weight, **pieces: torch.Tensor | None) -> NF4Weight:
    return q.with_tensors(tuple({**dict(zip(PIECES, q.tensors())), **pieces}.values()))


# What is wrong with a weight, and what the message has to name. (weight) -> weight
BAD_WEIGHTS: dict[str, tuple[Callable[[NF4Weight], NF4Weight], str]] = {
    "packed too short": (lambda q: broken(q, packed=q.packed[1:]), "packed"),
    "packed too long": (lambda q: broken(q, packed=torch.cat([q.packed, q.packed[:1]])), "packed"),
    "packed of int8": (lambda q: broken(q, packed=q.packed.view(torch.int8)), "packed"),
    "packed strided": (lambda q: broken(q, packed=q.packed.repeat(1, 2)[:, :1]), "packed"),
    "absmax too short": (lambda q: broken(q, absmax=q.absmax[1:]), "absmax"),
    "absmax too long": (lambda q: broken(q, absmax=torch.cat([q.absmax, q.absmax[:1]])), "absmax"),
    "absmax of floats": (lambda q: broken(q, absmax=q.absmax.float()), "absmax"),
    "absmax strided": (lambda q: broken(q, absmax=q.absmax.repeat_interleave(2)[::2]), "absmax"),
    "codes without nested": (lambda q: broken(q, nested_absmax=None, nested_code=None, nested_offset=None), "absmax"),
    "half nested": (lambda q: broken(q, nested_code=None), "nested"),
    "nested too short": (lambda q: broken(q, nested_absmax=q.nested_absmax[:0]), "nested"),
    "nested of halves": (lambda q: broken(q, nested_absmax=q.nested_absmax.half()), "nested"),
    "short code book": (lambda q: broken(q, nested_code=q.nested_code[1:]), "nested"),
    "two offsets": (lambda q: broken(q, nested_offset=q.nested_offset.expand(2)), "nested"),
    "another blocksize": (lambda q: replace(q, blocksize=128), "absmax"),
    "no blocksize": (lambda q: replace(q, blocksize=48), "blocksize"),
    "blocksize of zero": (lambda q: replace(q, blocksize=0), "blocksize"),
    "negative blocksize": (lambda q: replace(q, blocksize=-64), "blocksize"),
    "another shape": (lambda q: replace(q, shape=torch.Size((N + 1, K))), "packed"),
}
# Pieces on the other device, which only a GPU has.
for _name in PIECES:
    BAD_WEIGHTS[f"{_name} on the CPU"] = (
        lambda q, name=_name: broken(q, **{name: dict(zip(PIECES, q.tensors()))[name].cpu()}),
        _name if not _name.startswith("nested") else "nested",
    )

# Arguments beside a good weight: (weight, device) -> the op's, and what the message has to say (a regular expression).
BAD_CALLS: dict[str, tuple[str, Callable[[NF4Weight, torch.device], tuple[Any, ...]], str]] = {
    "x of int32": ("nf4_matmul", lambda q, d: matmul_args(ones(d).int(), q), "must be float32"),
    "x of another K": ("nf4_matmul", lambda q, d: matmul_args(torch.ones(M, K - 1, device=d), q), r"\bpacked\b"),
    "x strided": ("nf4_matmul", lambda q, d: matmul_args(torch.ones(K, M, device=d).t(), q), r"\bx must be"),
    "x of one dimension": ("nf4_matmul", lambda q, d: matmul_args(ones(d)[0], q), r"\bx must be"),
    "x on the CPU": ("nf4_matmul", lambda q, d: matmul_args(torch.ones(M, K), q), r"\bx\b"),
    "bias too short": ("nf4_matmul", lambda q, d: matmul_args(ones(d), q, torch.ones(N - 1, device=d)), r"\bbias\b"),
    "bias a matrix": ("nf4_matmul", lambda q, d: matmul_args(ones(d), q, torch.ones(1, N, device=d)), r"\bbias\b"),
    "bias on the CPU": ("nf4_matmul", lambda q, d: matmul_args(ones(d), q, torch.ones(N)), r"\bbias\b"),
    "dy of int32": ("nf4_matmul_dx", lambda q, d: dx_args(torch.ones(M, N, device=d).int(), q), "must be float32"),
    "dy of another N": ("nf4_matmul_dx", lambda q, d: dx_args(torch.ones(M, N + 1, device=d), q), r"\bpacked\b"),
    "dy of one dimension": ("nf4_matmul_dx", lambda q, d: dx_args(torch.ones(N, device=d), q), r"\bdy must be"),
    "dy on the CPU": ("nf4_matmul_dx", lambda q, d: dx_args(torch.ones(M, N), q), r"\bdy\b"),
    "out too small": (
        "nf4_dequantize_out",
        lambda q, d: dequantize_args(q, torch.empty(N - 1, K, device=d)),
        r"\bpacked\b",
    ),
    "out strided": (
        "nf4_dequantize_out",
        lambda q, d: dequantize_args(q, torch.empty(K, N, device=d).t()),
        r"\bout must be",
    ),
    "out of int32": (
        "nf4_dequantize_out",
        lambda q, d: dequantize_args(q, torch.empty(N, K, device=d, dtype=torch.int32)),
        "must be float32",
    ),
    "out on the CPU": ("nf4_dequantize_out", lambda q, d: dequantize_args(q, torch.empty(N, K)), r"\bout\b"),
    "slice of another weight": (
        "nf4_dequantize_slice_out",
        lambda q, d: slice_args(q, ones(d), shape=(N + 1, K)),
        r"\bpacked\b",
    ),
    "slice below the weight": (
        "nf4_dequantize_slice_out",
        lambda q, d: slice_args(q, ones(d), row=N - M + 1),
        "must lie in the weight",
    ),
    "slice before the weight": (
        "nf4_dequantize_slice_out",
        lambda q, d: slice_args(q, ones(d), row=-1),
        "must lie in the weight",
    ),
    "slice beside the weight": (
        "nf4_dequantize_slice_out",
        lambda q, d: slice_args(q, ones(d), column=1),
        "must lie in the weight",
    ),
    "slice strided": (
        "nf4_dequantize_slice_out",
        lambda q, d: slice_args(q, torch.empty(K, M, device=d).t()),
        r"\bout must be",
    ),
    "slice of int32": ("nf4_dequantize_slice_out", lambda q, d: slice_args(q, ones(d).int()), "must be float32"),
    "slice on the CPU": ("nf4_dequantize_slice_out", lambda q, d: slice_args(q, torch.empty(M, K)), r"\bout\b"),
    "weight of int32": ("nf4_quantize", lambda q, d: (ones(d).int(), 64), "must be float32"),
    "weight of float64": ("nf4_quantize", lambda q, d: (ones(d).double(), 64), "must be float32"),
    "weight in blocks of 48": ("nf4_quantize", lambda q, d: (ones(d), 48), r"\bblocksize\b"),
    "weight in blocks of 0": ("nf4_quantize", lambda q, d: (ones(d), 0), r"\bblocksize\b"),
}


def ones(device: torch.device) -> torch.Tensor:
    return torch.ones(M, K, device=device)


def skip_unless_possible(what: str, device: torch.device, *names: str) -> None:
    if device.type == "cpu" and what.endswith("on the CPU"):
        pytest.skip("everything is on the CPU")
    for name in names:
        if backends()[name][device.type.upper()] == "reference":
            pytest.skip(f"{name} has no kernel here; the reference is plain PyTorch")


@pytest.fixture(scope="module")
def counts_launches() -> bool:
    return can_count_launches()


def assert_refused(call: Callable[[], Any], message: str, device: torch.device, counts: bool) -> None:
    def refused() -> None:
        with pytest.raises((ValueError, TypeError, RuntimeError)) as error:
            call()
        assert "CUDA error" not in str(error.value)
        assert re.search(message, str(error.value)), str(error.value).splitlines()[0]

    if device.type == "cuda" and counts:
        assert launches(refused) == []
    else:
        refused()
    if device.type == "cuda":
        torch.cuda.synchronize()  # nothing broke behind our back


@pytest.mark.parametrize("what", BAD_WEIGHTS)
@pytest.mark.parametrize("op", ["nf4_matmul", "nf4_matmul_dx", "nf4_dequantize_out", "nf4_dequantize_slice_out"])
def test_raw_ops_refuse_bad_weights(op, what, device, counts_launches):
    skip_unless_possible(what, device, op)
    make, message = BAD_WEIGHTS[what]
    q = make(random_nf4((N, K), device=device))
    x, dy, out = ones(device), torch.ones(M, N, device=device), torch.empty(N, K, device=device)
    if what == "another shape":
        dy, out = torch.ones(M, N + 1, device=device), torch.empty(N + 1, K, device=device)
    args = {
        "nf4_matmul": matmul_args(x, q),
        "nf4_matmul_dx": dx_args(dy, q),
        "nf4_dequantize_out": dequantize_args(q, out),
        "nf4_dequantize_slice_out": slice_args(q, out, shape=out.shape),
    }
    assert_refused(lambda: getattr(ops, op)(*args[op]), rf"\b{message}", device, counts_launches)


@pytest.mark.parametrize("what", BAD_WEIGHTS)
def test_public_functions_refuse_bad_weights(what, device, counts_launches):
    skip_unless_possible(what, device)
    make, message = BAD_WEIGHTS[what]
    q = make(random_nf4((N, K), device=device))
    x = ones(device)
    for call in (lambda: nf4_matmul(x, q), lambda: dequantize_nf4(q)):
        # A packed tensor elsewhere makes x, or the other pieces, the ones that disagree.
        assert_refused(call, "is on" if what == "packed on the CPU" else message, device, counts_launches)


@pytest.mark.parametrize("what", BAD_CALLS)
def test_raw_ops_refuse_bad_arguments(what, device, counts_launches):
    op, make, message = BAD_CALLS[what]
    skip_unless_possible(what, device, op)
    args = make(random_nf4((N, K), device=device), device)
    assert_refused(lambda: getattr(ops, op)(*args), message, device, counts_launches)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda q, x: nf4_matmul(x[:, :-1], q), "x"),
        (lambda q, x: nf4_matmul(x.int(), q), "x"),
        (lambda q, x: nf4_matmul(x, q, x[0, :7]), "bias"),
        (lambda q, x: nf4_matmul(x, q, x.flatten()[:N].cpu()), "bias is on cpu"),
        (lambda q, x: nf4_matmul(x.cpu(), q), "x is on cpu"),
        (lambda q, x: dequantize_nf4(q, out=torch.empty(N, K)), "out is on cpu"),
        (lambda q, x: dequantize_nf4(q, torch.int8), "dtype"),
        (lambda q, x: quantize_nf4(x, 65), "blocksize"),
        (lambda q, x: quantize_nf4(x.double()), "weight"),
    ],
)
def test_public_functions_refuse_bad_arguments(call, message, device):
    if device.type == "cpu" and message.endswith("cpu"):
        pytest.skip("everything is on the CPU")
    q, x = random_nf4((N, K), device=device), ones(device)
    assert_refused(lambda: call(q, x), message, device, counts=False)


def test_a_refusal_leaves_the_op_usable(device):
    q = random_nf4((N, K), device=device)
    with pytest.raises((ValueError, RuntimeError)):
        nf4_matmul(ones(device)[:, :-1], q)
    assert nf4_matmul(ones(device), q).isfinite().all()
