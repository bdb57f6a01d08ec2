"""dx of a LoRA matmul added to the dx of others, as layers of one x have it."""

from __future__ import annotations

import pytest
import torch

from peftkern.testing.checks import poisoned_memory

ops = torch.ops.peftkern
SCALING = 1.5


def problem(M, N, K, r, dtype, device):
    def normal(*shape, std=1.0):
        return (torch.randn(shape, device=device) * std).to(dtype)

    tensors = (
        normal(M, N),
        normal(M, K),
        normal(N, K, std=K**-0.5),
        normal(r, K, std=K**-0.5),
        normal(N, r),
        normal(M, r),
    )
    return tensors, normal(M, K)


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("M", "N", "K", "r"), [(3, 5, 7, 2), (1024, 128, 264, 8), (1100, 520, 392, 24), (1300, 264, 1032, 16)]
)
def test_adds_what_the_backward_gives(M, N, K, r, dtype, dropout_p, needs, device):
    """Bitwise: rounded once, then added and rounded again."""
    (dy, x, weight, A, B, S), before = problem(M, N, K, r, dtype, device)
    need_dA, need_dB = needs
    seed = torch.tensor([77], device=device) if dropout_p else None
    common = (x if need_dA else None, weight, A, B, S if need_dB else None, seed, SCALING, dropout_p)
    dx, *gradients = ops.lora_matmul_bwd(dy, *common, True, *needs)
    total = before.clone()
    with poisoned_memory():
        added = ops.lora_matmul_bwd_add(dy, *common, *needs, total)
    assert torch.equal(total, before + dx)
    for got, want, need in zip(added, gradients, needs):
        assert torch.equal(got, want)
        assert got.numel() > 0 or not need


@pytest.mark.parametrize("M", [2, 1100])
def test_a_sum_in_strides_or_another_dtype(M, device):
    """What the kernel does not take is added all the same."""
    (dy, x, weight, A, B, S), before = problem(M, 64, 128, 8, torch.bfloat16, device)
    common = (x, weight, A, B, S, None, SCALING, 0.0)
    dx, *_ = ops.lora_matmul_bwd(dy, *common, True, True, True)
    strided = torch.empty(128, M, dtype=before.dtype, device=device).t().copy_(before)
    wide = before.float()
    for total in (strided, wide):
        ops.lora_matmul_bwd_add(dy, *common, True, True, total)
    assert torch.equal(strided, before + dx)
    torch.testing.assert_close(wide, before.float() + dx.float(), atol=0.02, rtol=0.02)


def test_opcheck(device):
    (dy, x, weight, A, B, S), before = problem(3, 5, 7, 2, torch.float32, device)
    torch.library.opcheck(ops.lora_matmul_bwd_add, (dy, x, weight, A, B, S, None, SCALING, 0.0, True, True, before))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_sums_follow_each_other_without_gaps():
    """Launch upon launch into one sum; a kernel that started too early would miss what the one before it added."""
    problems = [problem(2048, 512, 1024, 16, torch.bfloat16, "cuda")[0] for _ in range(4)]
    expected = None
    for _ in range(50):
        total = torch.zeros(2048, 1024, dtype=torch.bfloat16, device="cuda")
        for dy, x, weight, A, B, S in problems:
            ops.lora_matmul_bwd_add(dy, x, weight, A, B, S, None, SCALING, 0.0, True, True, total)
        if expected is None:
            expected = torch.zeros_like(total)
            for dy, x, weight, A, B, S in problems:
                expected += ops.lora_matmul_bwd(dy, x, weight, A, B, S, None, SCALING, 0.0, True, True, True)[0]
        assert torch.equal(total, expected)
