"""What the NF4 benchmark promises: its sizes, rotated weights larger than the cache, and bounded memory."""

from __future__ import annotations

import torch

from benchmarks import arms
from peftkern.testing.spec import all_specs


def test_the_rotated_nf4_weights_exceed_200_mb_and_memory_stays_bounded() -> None:
    spec = all_specs()["nf4_matmul"]
    for case in spec.bench_cases("cuda"):
        M, N, K = (case.sizes[key] for key in "MNK")
        packed = N * K // 2 + N * K // 64
        x, y, dense = (count * torch.bfloat16.itemsize for count in (M * K, M * N, N * K))
        copies = arms.count_copies({"q": torch.empty(packed + x, dtype=torch.uint8, device="meta")}, "cuda")
        assert M > 64 or copies * packed > 200_000_000, case.name
        held = copies * (2 * (packed + x + y) + dense + x + y)  # ours, bitsandbytes, dense cuBLAS
        assert held < 20e9, case.name


def test_nf4_is_timed_at_the_shapes_and_tokens_promised() -> None:
    specs = all_specs()
    shapes = {(4096, 4096), (11008, 4096), (28672, 8192)}
    tokens = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 8192}
    for op, wanted in (("nf4_matmul", tokens), ("nf4_matmul_dx", {2048, 8192}), ("nf4_quantize", {None})):
        for N, K in shapes:
            cases = [c.sizes for c in specs[op].bench_cases("cuda") if (c.sizes["N"], c.sizes["K"]) == (N, K)]
            assert wanted <= {sizes.get("M") for sizes in cases}
            assert all(sizes["double_quant"] and sizes["blocksize"] == 64 for sizes in cases)
        assert sum(specs[op].times_baselines(c) for c in specs[op].bench_cases("cuda")) <= 3
    assert [c.name for c in specs["nf4_quantize"].bench_cases()] == [
        c.name for c in specs["nf4_dequantize"].bench_cases()
    ]
