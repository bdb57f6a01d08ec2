"""Which LoRA matmuls the CUDA kernel takes; the others are made of pieces."""

from __future__ import annotations

import pytest

_host = pytest.importorskip("peftkern._host")


def covers(M: int = 8192, N: int = 4096, K: int = 4096, rank: int = 16, **traits: object) -> bool:
    return _host.lora_gemm_covers(M, N, K, rank, **traits)


@pytest.mark.parametrize("rank", [8, 16, 24, 40, 64, 128, 248, 256])
def test_ranks_of_whole_vectors(rank):
    assert covers(rank=rank)
    assert not covers(rank=rank + 1)
    assert not covers(rank=rank + 4)


@pytest.mark.parametrize("rank", [0, 1, 4, 264, 512])
def test_ranks_that_no_instance_holds(rank):
    assert not covers(rank=rank)


@pytest.mark.parametrize(("M", "expected"), [(0, False), (1, False), (1023, False), (1024, True), (100_003, True)])
def test_few_tokens_are_the_gemm_librarys(M, expected):
    assert covers(M=M) == expected


@pytest.mark.parametrize("side", ["N", "K"])
def test_rows_are_whole_vectors(side):
    for size in (8, 72, 4096, 11008, 28672):
        assert covers(**{side: size})
        assert not covers(**{side: size + 1})
        assert not covers(**{side: size + 4})
    assert not covers(**{side: 0})


def test_dropout_of_nearly_everything_is_not_a_halfs():
    assert covers(threshold=31 * 1024)
    assert not covers(threshold=31 * 1024 + 1)


@pytest.mark.parametrize("slow", [{"half": False}, {"aligned": False}, *({side: 2**31} for side in "MNK")], ids=str)
def test_what_the_kernel_cannot_read(slow):
    assert not covers(**slow)


@pytest.mark.parametrize("compute_capability", [75, 80, 86, 89, 100, 120])
def test_hopper_only(compute_capability):
    assert not covers(compute_capability=compute_capability)
