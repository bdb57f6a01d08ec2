"""Dropout: the generator is Philox4x32-7, its masks are fair, and every backend regenerates the same ones."""

from __future__ import annotations

import math

import pytest
import torch

from peftkern.ops._dropout import (
    check_dropout,
    draw_seed,
    dropout_mask,
    dropout_numbers,
    dropout_scale,
    dropout_threshold,
    masked,
    philox4x32,
)
from peftkern.ops.bottleneck import reference as bottleneck_reference
from peftkern.ops.lora_matmul import reference as lora_reference

# Known answers of the Random123 distribution: counter, key, result.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A),
    ),
]
SEEDS = [0, 1, -1, 2**63 - 1, -(2**63), 0x0123456789ABCDEF]


def seed_on(device, value):
    return torch.tensor([value], device=device)


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_philox_gives_the_published_answers(counter, key, answer, device):
    words = philox4x32(
        tuple(torch.tensor(c, device=device) for c in counter), tuple(torch.tensor(k, device=device) for k in key)
    )
    assert tuple(int(w) for w in words) == answer


def philox_in_integers(counter, key):
    """Philox4x32-7 once more, from the paper, in Python's unbounded integers."""
    c, k = list(counter), list(key)
    for _ in range(7):
        high0, low0 = divmod(0xD2511F53 * c[0], 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c[2], 2**32)
        c = [high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


@pytest.mark.parametrize("seed", SEEDS)
def test_mask_follows_its_definition(seed, device):
    p, rows, columns = 0.37, 5, 37
    mask = dropout_mask(seed_on(device, seed), rows, columns, p).cpu()
    key = (seed % 2**64 % 2**32, seed % 2**64 >> 32)
    for m in range(rows):
        for k in range(columns):
            word = philox_in_integers((k // 16, m, 0, 0), key)[k % 16 // 4]
            high, low = divmod(0x9E3779B1 * word, 2**32)
            number = 256 * (word >> 8 * (k % 4) & 0x7F) + ((high ^ low) >> 8 * (k % 4) & 0xFF)
            assert mask[m, k] == (number >= round(p * 32768)), (m, k)


def masks_seen_by_the_op(seed, rows, columns, p, dtype):
    """The masks that one LoRA op applies in its forward, to dx and to dA, each isolated by unit matrices."""
    ops, device, factor = torch.ops.peftkern, seed.device, dropout_scale(p)
    x = torch.ones(rows, columns, dtype=dtype, device=device)
    no_weight = torch.zeros(1, columns, dtype=dtype, device=device)
    unit = torch.eye(columns, device=device)
    _, S = ops.lora_matmul_fwd(x, no_weight, unit, torch.ones(1, columns, device=device), None, 1.0, p, seed)
    one = torch.ones(1, 1, device=device)
    dy = torch.ones(rows, 1, dtype=dtype, device=device)
    row = torch.ones(1, columns, device=device)
    dx, _, _ = ops.lora_matmul_bwd(dy, None, no_weight, row, one, None, seed, 1.0, p, True, False, False)
    unit = torch.eye(rows, device=device)
    adapter = torch.ones(rows, columns, device=device)
    _, dA, _ = ops.lora_matmul_bwd(unit.to(dtype), x, None, adapter, unit, None, seed, 1.0, p, False, True, False)
    for gradient in (dx, dA):
        torch.testing.assert_close(gradient.max().item(), factor, rtol=torch.finfo(gradient.dtype).eps, atol=0)
    return S != 0, dx != 0, dA != 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(
    ("rows", "columns"), [(1, 1), (5, 7), (3, 8), (3, 16), (9, 17), (70, 33), (2, 1023), (3, 1025), (700, 1040)]
)
def test_every_pass_of_the_op_sees_the_reference_mask(rows, columns, dtype, device):
    seeds = SEEDS if rows * columns < 5000 else SEEDS[-1:]
    for seed in (seed_on(device, s) for s in seeds):
        for p in (0.5,) if rows * columns > 5000 else (0.05, 0.5, 0.95):
            expected = dropout_mask(seed, rows, columns, p)
            if not expected.any():
                continue
            for name, seen in zip(("S", "dx", "dA"), masks_seen_by_the_op(seed, rows, columns, p, dtype)):
                assert torch.equal(seen, expected), f"{name} under seed {int(seed)}, p {p}"


def test_the_bottleneck_masks_its_activation_alike(device):
    seed, p, rows, b = seed_on(device, SEEDS[-1]), 0.3, 37, 29
    h = torch.ones(rows, b, device=device)
    unit, nothing = torch.eye(b, device=device), torch.zeros(rows, b, device=device)
    y, _ = torch.ops.peftkern.bottleneck_fwd(h, unit, None, unit, None, nothing, "relu", 1.0, p, seed)
    _, _, _, d_up, _ = torch.ops.peftkern.bottleneck_bwd(
        torch.eye(rows, device=device),
        None,
        torch.ones(b, rows, device=device),
        torch.ones(rows, b, device=device),
        h,
        seed,
        "relu",
        1.0,
        p,
        False,
        False,
        False,
        False,
        True,
        False,
    )
    expected = dropout_mask(seed, rows, b, p)
    assert torch.equal(y != 0, expected)
    assert torch.equal(d_up != 0, expected)


def test_masks_are_the_same_on_every_device(device):
    for seed in SEEDS:
        expected = dropout_mask(torch.tensor([seed]), 40, 130, 0.2)
        assert torch.equal(dropout_mask(seed_on(device, seed), 40, 130, 0.2).cpu(), expected)


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_rate_blocks_and_lags_are_those_of_independent_draws(p):
    rows, columns = 512, 2048
    kept = dropout_mask(torch.tensor([20240607]), rows, columns, p).double()
    q = 1 - dropout_threshold(p) / 32768
    centred = kept - q
    count, variance = kept.numel(), q * (1 - q)
    assert abs(centred.sum()) < 5 * math.sqrt(count * variance), "rate"

    blocks = centred.view(16, 32, 64, 32).sum((1, 3))
    for name, sums, size in [
        ("32x32 blocks", blocks, 1024),
        ("columns", centred.sum(0), rows),
        ("rows", centred.sum(1), columns),
        ("places within a call", centred.view(-1, 16).sum(0), count // 16),
    ]:
        chi_square, freedom = (sums.square() / (size * variance)).sum().item(), sums.numel()
        assert abs(chi_square - freedom) < 5 * math.sqrt(2 * freedom), f"{name}: {chi_square} for {freedom}"

    flat = centred.view(-1)
    for lag in (1, 2, 3, 4, 5, 8, 12, 15, 16, 17, 64, 256, columns - 16, columns, columns + 16, 2 * columns):
        products = flat[lag:] * flat[:-lag]
        assert abs(products.sum()) < 5 * variance * math.sqrt(products.numel()), f"lag {lag}"
    for other in (20240608, 20240607 + 2**32):
        products = flat * (dropout_mask(torch.tensor([other]), rows, columns, p).double() - q).view(-1)
        assert abs(products.sum()) < 5 * variance * math.sqrt(count), f"seed {other}"


def test_scale_makes_the_expectation_exact():
    for p in (0.0, 1e-6, 0.05, 0.1, 1 / 3, 0.5, 0.999, 1 - 1e-9):
        threshold = dropout_threshold(p)
        assert 0 <= threshold <= 32767
        assert dropout_scale(p) * (32768 - threshold) / 32768 == pytest.approx(1.0, abs=1e-15)
    assert dropout_threshold(1e-6) == 0
    assert dropout_threshold(0.5) == 16384


def test_seeds_come_from_torchs_generator(device):
    torch.manual_seed(5)
    first, second = draw_seed(device), draw_seed(device)
    assert first.dtype == torch.int64
    assert first.shape == (1,)
    assert first.device.type == device.type
    assert not torch.equal(first, second)
    torch.manual_seed(5)
    assert torch.equal(draw_seed(device), first)


def test_dropped_elements_are_zero_whatever_they_were(device):
    seed = seed_on(device, 3)
    x = torch.full((4, 16), math.nan, device=device)
    mask = dropout_mask(seed, 4, 16, 0.5)
    result = masked(x, seed, 0.5)
    assert (result[~mask] == 0).all()
    assert result[mask].isnan().all()
    assert masked(x, None, 0.5) is x
    weight, adapter = torch.zeros(1, 16, device=device), torch.eye(16, device=device)
    for forward in (torch.ops.peftkern.lora_matmul_fwd, lora_reference.lora_matmul_fwd):
        one = torch.ones(1, 16, device=device)
        _, S = forward(torch.ones(4, 16, device=device) / mask, weight, adapter, one, None, 1.0, 0.5, seed)
        assert torch.equal(S, mask.float())


def test_dropout_probability_is_checked():
    for p in (0.0, 0.5, 0.999):
        check_dropout("op", p)
    for p in (-0.1, 1.0, 1.5, math.nan):
        with pytest.raises(ValueError, match=r"op: dropout_p must be in \[0, 1\)"):
            check_dropout("op", p)


def test_reference_backends_take_the_same_seed_as_the_compiled_ones(device):
    seed = seed_on(device, 77)
    sizes = ((9, 40), (24, 40), (5, 40), (24, 5))
    x, w, a, b = (torch.randint(-3, 4, size, device=device).float() for size in sizes)  # sums are exact in any order
    args = (x, w, a, b, None, 2.0, 0.25, seed)
    for got, expected in zip(torch.ops.peftkern.lora_matmul_fwd(*args), lora_reference.lora_matmul_fwd(*args)):
        torch.testing.assert_close(got, expected)
    args = (x, a, None, a.t(), None, None, "gelu", 1.0, 0.25, seed)
    for got, expected in zip(torch.ops.peftkern.bottleneck_fwd(*args), bottleneck_reference.bottleneck_fwd(*args)):
        torch.testing.assert_close(got, expected)


def test_both_bytes_of_the_numbers_are_uniform():
    """A byte of the words and the one mixed from it: every pair of values equally often."""
    numbers = dropout_numbers(torch.arange(4096), 64, torch.tensor([-5]))
    counts = torch.bincount(numbers.flatten(), minlength=32768).double()
    mean = numbers.numel() / 32768
    assert abs(((counts - mean) ** 2 / mean).sum() - 32767) < 5 * math.sqrt(2 * 32767)
    for place in range(4):
        counts = torch.bincount(numbers[:, place::4].flatten() & 0xFF, minlength=256).double()
        mean = numbers.numel() / 4 / 256
        assert abs(((counts - mean) ** 2 / mean).sum() - 255) < 5 * math.sqrt(2 * 255)
