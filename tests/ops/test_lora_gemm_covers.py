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


def test_groups_hold_up_to_four_layers_and_128_columns():
    def covers_group(ranks, N=(4096, 1024, 1024, 8), M=8192, **traits):
        return _host.lora_group_covers(M, 4096, list(N[: len(ranks)]), list(ranks), **traits)

    for ranks in ([16, 16, 16], [8, 8], [16, 0, 16], [0, 64], [32, 32, 32, 32], [64, 64]):
        assert covers_group(ranks)
        assert not covers_group(ranks, M=1023)
        assert not covers_group(ranks, half=False)
        assert not covers_group(ranks, compute_capability=100)
    for ranks in ([16], [0, 0], [16, 12], [64, 72], [16] * 5):
        assert not covers_group(ranks, N=(4096,) * 5)
    assert not covers_group([16, 16], N=(4096, 1028))


@pytest.mark.parametrize("compute_capability", [75, 80, 86, 89, 100, 120])
def test_hopper_only(compute_capability):
    assert not covers(compute_capability=compute_capability)
