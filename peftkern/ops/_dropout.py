"""Dropout without a stored mask: a counter-based generator that forward, backward and recomputation all evaluate anew.

The mask of a matrix [M, K] is a pure function of a 64-bit seed. Element (m, k) belongs to the Philox4x32-7 call (Salmon
et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"; seven rounds are the fewest that pass BigCrush) with counter
(k // 16, m & 0xffffffff, m >> 32, 0) and key (seed & 0xffffffff, seed >> 32). Each byte of the call's four words serves
one element, the low byte of the first word first: its low seven bits are the high ones of the element's 15-bit number.
The low eight, which decide only where the high ones equal the threshold's, are the same byte of `_mix(word)`. An
element is kept iff its number is at least `dropout_threshold(p)`. Every backend computes exactly this;
`csrc/common/philox.h` is the same thing in C++ and CUDA. 15 bits because a GPU compares two such numbers in one
subtraction, whose borrows the sixteenth bits take.

Over all 2**32 words the share of numbers below T is T / 32768 within 4e-7, for every T and every byte. Two bytes of a
word are dropped together as often as independent ones would be: their correlation is below 4e-6 at p = 0.005, 0.05, 0.1
and 0.5.

The seed is a tensor drawn from torch's generator of x's device. So `torch.manual_seed`, the RNG replay of activation
checkpointing and CUDA graphs work, the host never waits for it, and every call has a mask of its own.
"""

from __future__ import annotations

import torch

RESOLUTION = 1 << 15  # p is honoured in steps of 1/32768
_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 7
_MIX = 0x9E3779B1
_COLUMNS = 16  # of a row that one call serves


def check_dropout(op: str, dropout_p: float) -> None:
    """Raises ValueError unless 0 <= dropout_p < 1."""
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"{op}: dropout_p must be in [0, 1), got {dropout_p}; it is the share of elements dropped")


def dropout_threshold(dropout_p: float) -> int:
    """The smallest 15-bit number that is kept: round(p * 32768), at most 32767 so that p just below 1 keeps some."""
    return min(round(dropout_p * RESOLUTION), RESOLUTION - 1)


def dropout_scale(dropout_p: float) -> float:
    """What the kept elements are multiplied by: the reciprocal of the exact share kept, so the expectation is exact."""
    return RESOLUTION / (RESOLUTION - dropout_threshold(dropout_p))


def draw_seed(device: torch.device) -> torch.Tensor:
    """A seed from torch's generator of `device`: int64 [1] there, without a host sync."""
    return draw_seeds(device, 1)


def draw_seeds(device: torch.device, count: int) -> torch.Tensor:
    """Seeds of masks that have nothing to do with each other: int64 [count], drawn at once."""
    return torch.randint(0, 2**63 - 1, (count,), dtype=torch.int64, device=device)


def philox4x32(
    counter: tuple[torch.Tensor, ...], key: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Philox4x32-7: four 32-bit words from four counter and two key words.

    All words are int64 tensors holding 0 to 2**32 - 1; they broadcast. int64 products wrap, and wrapping keeps the 64
    bits that the two halves are taken from.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> 32 & _WORD) ^ c1 ^ k0, p1 & _WORD, (p0 >> 32 & _WORD) ^ c3 ^ k1, p0 & _WORD
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return c0, c1, c2, c3


def _mix(word: torch.Tensor) -> torch.Tensor:
    """The two halves of a 64-bit product, folded: every byte depends on all of the word."""
    product = word * _MIX
    return (product ^ product >> 32) & _WORD


def dropout_numbers(row: torch.Tensor, calls: int, seed: torch.Tensor) -> torch.Tensor:
    """The 15-bit numbers of the first `calls` calls of each row: int64 [len(row), 16 * calls]."""
    call = torch.arange(calls, device=row.device)
    row, zero = row.unsqueeze(1), torch.zeros((), dtype=torch.int64, device=row.device)
    words = torch.stack(philox4x32((call, row & _WORD, row >> 32, zero), (seed & _WORD, seed >> 32 & _WORD)), dim=-1)
    low = _mix(words)
    numbers = torch.stack([(words >> i & 0x7F) << 8 | (low >> i & 0xFF) for i in (0, 8, 16, 24)], dim=-1)
    return numbers.reshape(row.numel(), calls * _COLUMNS)


def dropout_mask(seed: torch.Tensor, rows: int, columns: int, dropout_p: float) -> torch.Tensor:
    """The kept elements of a matrix: bool [rows, columns] on the seed's device. Every backend follows this."""
    row = torch.arange(rows, device=seed.device)
    numbers = dropout_numbers(row, (columns + _COLUMNS - 1) // _COLUMNS, seed)
    return numbers[:, :columns] >= dropout_threshold(dropout_p)


def masked(x: torch.Tensor, seed: torch.Tensor | None, dropout_p: float) -> torch.Tensor:
    """x [M, K] with the dropped elements zero and the kept ones unscaled; x itself when `seed` is None.

    Callers fold `dropout_scale` into a later float32 factor, which saves a rounding.
    """
    if seed is None:
        return x
    return torch.where(dropout_mask(seed, x.shape[0], x.shape[1], dropout_p), x, 0)
