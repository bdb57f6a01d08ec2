"""The Triton backend of 8-bit AdamW against the reference, bit for bit: compiled on a GPU, else interpreted."""

from __future__ import annotations

import pytest
import torch
from adamw8bit_step import assert_same_bits, step_by

from peftkern.ops.adamw8bit import reference
from peftkern.ops.adamw8bit.spec import SPECS, WRITTEN
from peftkern.testing.spec import Case

triton_kernels = pytest.importorskip("peftkern.ops.adamw8bit.triton_kernels")

(SPEC,) = SPECS
CASES = [case for case in SPEC.cases if not case.bench]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LARGE = ("several-threads", "clipped-many-pieces")  # half a minute each in the interpreter


@pytest.fixture
def device(device):
    if device.type == "cpu" and torch.cuda.is_available():
        pytest.skip("Triton interprets only where there is no GPU")
    return device


def contiguous(args):
    """The op's tensors are."""
    return args | {name: [t.contiguous() for t in args[name]] for name in ("grads", *WRITTEN)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bits_of_the_reference(case: Case, dtype, device):
    if device.type == "cpu" and case.name in LARGE and (case.name, dtype) != (LARGE[1], torch.float32):
        pytest.skip("takes too long in the interpreter")
    ours, theirs = (contiguous(SPEC.make(case, dtype, device, 3)) for _ in range(2))
    flag, norm = step_by(triton_kernels, ours)
    expected_flag, expected_norm = step_by(reference, theirs)
    assert torch.equal(flag, expected_flag)
    assert norm is None or torch.equal(norm, expected_norm)
    assert_same_bits(ours, theirs)


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.int64], ids=str)
def test_numbers_on_the_device(kind, device):
    """The step's count and the rate may be tensors."""
    case = next(case for case in CASES if case.name == "ragged")
    results = []
    for on_device in (False, True):
        args = contiguous(SPEC.make(case, torch.float32, device, 5))
        step = torch.tensor(7, dtype=kind, device=device) if on_device else None
        lr = torch.tensor(1e-3, dtype=torch.float64, device=device) if on_device else None
        states = (args[name] for name in WRITTEN[1:])
        books = args["exp_avg_qmap"], args["exp_avg_sq_qmap"]
        triton_kernels.step_(
            args["params"],
            args["grads"],
            *states,
            *books,
            1e-3,
            lr,
            7.0,
            step,
            0.9,
            0.999,
            1e-8,
            0.01,
            256,
            None,
            None,
            False,
        )
        results.append([t for name in WRITTEN for t in args[name]])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_a_part_has_the_numbers_of_its_place(device):
    case = next(case for case in CASES if case.name == "stochastic")
    whole, parts = (contiguous(SPEC.make(case, torch.bfloat16, device, 7)) for _ in range(2))
    index = max(range(len(whole["params"])), key=lambda i: whole["params"][i].numel())
    hyper = (1e-3, None, 7.0, None, 0.9, 0.999, 1e-8, 0.01, 256, None, None, False, 0.0, None, 11, None)
    books = whole["exp_avg_qmap"], whole["exp_avg_sq_qmap"]

    def tensors(args, start, stop):
        one = [args[name][index].view(-1) for name in ("params", "grads", "exp_avg", "exp_avg_sq")]
        scales = [args[name][index] for name in ("exp_avg_absmax", "exp_avg_sq_absmax")]
        cut = [t[start:stop] for t in one] + [t[start // 256 : -(-stop // 256)] for t in scales]
        return [[t] for t in cut]

    numel = whole["params"][index].numel()
    triton_kernels.step_(*tensors(whole, 0, numel), *books, *hyper, [640])
    for start, stop in ((0, 1024), (1024, numel)):
        triton_kernels.step_(*tensors(parts, start, stop), *books, *hyper, [640 + start])
    assert torch.equal(whole["params"][index], parts["params"][index])
    assert torch.equal(whole["exp_avg"][index], parts["exp_avg"][index])
