"""NF4 quantize and dequantize: launch configurations, the encode's lookup table, and what only a GPU can show."""

from __future__ import annotations

import math

import pytest
import torch

from peftkern import backends, dequantize_nf4, quantize_nf4
from peftkern.ops._code_tables import dynamic_map, nf4_code
from peftkern.ops.nf4 import reference
from peftkern.ops.nf4.weight import BLOCKSIZES
from peftkern.testing.checks import poisoned_memory
from peftkern.testing.nf4 import random_nf4

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
# Around the tiles of the CUDA kernels (4096 weights to quantize, 2048 to 8192 to dequantize), odd numbers included.
NUMELS = [1, 31, 64, 4095, 4096, 4097, 8191, 8192, 3 * 8192 + 77]


def dense(numel: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    w = torch.randn(numel, device=device).mul_(0.02).to(dtype)
    w[numel // 2 : numel // 2 + 300] = 0  # whole blocks of zeros
    return w


def assert_quantizes_as_reference(weight: torch.Tensor, blocksize: int) -> None:
    with poisoned_memory():
        packed, absmax = torch.ops.peftkern.nf4_quantize(weight, blocksize)
    expected_packed, expected_absmax = reference.quantize(weight, blocksize)
    assert torch.equal(packed, expected_packed)
    torch.testing.assert_close(absmax, expected_absmax, rtol=0, atol=0, equal_nan=True)


def dequantize_reference(q, dtype: torch.dtype) -> torch.Tensor:  # type: ignore[no-untyped-def]
    out = torch.empty(q.shape, dtype=dtype, device=q.device)
    reference.dequantize_out(*q.tensors(), q.blocksize, q.nested_blocksize, out)
    return out


@pytest.mark.parametrize("itemsize", [1, 2, 4, 8])
def test_dequantize_config_covers_every_weight(itemsize):
    host = pytest.importorskip("peftkern._host")
    for numel in (1, 8, 9, 8191, 8192, 8193, 2**31 - 1, 2**31 + 64, 2**40):
        ctas, threads, tile = host.nf4_dequantize_config(numel, itemsize)
        assert ctas * tile >= numel > (ctas - 1) * tile
        assert tile % (threads * 16 // itemsize) == 0
        assert threads % 32 == 0


def test_quantize_config_keeps_blocks_within_a_cta():
    host = pytest.importorskip("peftkern._host")
    for numel in (1, 4095, 4096, 4097, 2**31 - 1, 2**31 + 64, 2**40):
        ctas, threads, tile = host.nf4_quantize_config(numel)
        assert ctas * tile >= numel > (ctas - 1) * tile
        assert all(tile % blocksize == 0 for blocksize in BLOCKSIZES)
        assert threads % 32 == 0


def test_quantize_absmax_config_is_resident():
    host = pytest.importorskip("peftkern._host")
    for numel, blocksize in [(1, 256), (256, 256), (2**25, 256), (2**40, 256), (1000, 1), (5000, 4096)]:
        for multiprocessors in (1, 108, 132):
            ctas, threads = host.nf4_quantize_absmax_config(numel, blocksize, multiprocessors)
            blocks = -(-numel // blocksize)
            assert 1 <= ctas <= max(1, min(blocks, 16 * multiprocessors))
            assert threads % 32 == 0


def test_encode_table_separates_the_thresholds():
    """code = base + (value > threshold) for every bin, and bins hold at most one threshold."""
    host = pytest.importorskip("peftkern._host")
    bins = host.nf4_encode_table()
    code = nf4_code()
    midpoints = (code[:-1] + code[1:]) / 2
    thresholds = [t for t, _ in bins if not math.isinf(t)]
    assert thresholds == midpoints.tolist()
    assert [base for _, base in bins] == [sum(t in thresholds for t, _ in bins[:i]) for i in range(len(bins))]
    # Every midpoint, its neighbours, and a sweep, encoded as the kernel does it.
    around = torch.cat([midpoints, midpoints.nextafter(midpoints + 1), midpoints.nextafter(midpoints - 1)])
    values = torch.cat([around, torch.linspace(-1, 1, 100_001), torch.tensor([-1.0, 1.0, 0.0, -0.0, 1e-30, math.nan])])
    shifted = (values.double() * 15.5 + 65551.75).float()  # one rounding, as the multiply-add's
    bits = shifted.view(torch.int32).masked_fill(shifted.isnan(), 0x7FFFFFFF)  # CUDA's NaN
    at = (bits >> 7) & 31
    table = torch.tensor([t for t, _ in bins])[at]
    base = torch.tensor([b for _, b in bins])[at]
    assert torch.equal(base + (values > table), torch.bucketize(values, midpoints))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_quantize_is_bitwise_the_reference(blocksize, dtype, device):
    for numel in NUMELS:
        weight = dense(numel + 1, dtype, device)
        assert_quantizes_as_reference(weight[:-1], blocksize)
        assert_quantizes_as_reference(weight[1:], blocksize)  # not aligned


def test_quantize_every_threshold(device):
    """Ties, and values one unit in the last place beside them, for several scales."""
    code = nf4_code(device)
    ties = (code[:-1] + code[1:]) / 2
    values = torch.cat([ties, ties.nextafter(ties + 1), ties.nextafter(ties - 1), code])
    for scale in (1.0, 0.5, 3.0, 0.0173, 2.0**-120):
        weight = torch.cat([torch.ones(1, device=device), values]) * scale
        assert_quantizes_as_reference(weight.repeat(67), 64)
        assert_quantizes_as_reference(weight.repeat_interleave(64)[: 64 * weight.numel()], 4096)


@pytest.mark.parametrize("dtype", FLOATS)
def test_quantize_every_bfloat16_and_float16(dtype, device):
    """Every 16-bit pattern, NaN and infinity included."""
    bits = torch.arange(-(2**15), 2**15, device=device, dtype=torch.int16)
    source = torch.float16 if dtype == torch.float16 else torch.bfloat16
    assert_quantizes_as_reference(bits.view(source).to(dtype), 64)


@pytest.mark.parametrize("blocksize", [32, 256, 4096])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_quantize_of_what_is_not_finite(bad, blocksize, device):
    for numel in (4096, 4097, 65):
        weight = dense(numel, torch.float32, device)
        weight[numel // 3] = bad
        assert_quantizes_as_reference(weight, blocksize)


@pytest.mark.parametrize("blocksize", [1, 100, 256, 257, 4096])
def test_quantize_absmax_is_bitwise_the_reference(blocksize, device):
    for numel in (1, 7, 255, 256, 257, 5000):
        for aligned in (True, False):
            absmax = torch.rand(numel + 1, device=device)[int(not aligned) :][:numel] * 0.05
            for code in (dynamic_map(True, device), torch.randn(256, device=device).mul(0.4).sort().values):
                args = (absmax, absmax.mean(), code, blocksize)
                with poisoned_memory():
                    codes, nested = torch.ops.peftkern.nf4_quantize_absmax(*args)
                expected_codes, expected_nested = reference.quantize_absmax(*args)
                assert torch.equal(codes, expected_codes)
                assert torch.equal(nested, expected_nested)


def test_quantize_absmax_takes_the_lower_code_on_ties(device):
    code = dynamic_map(True, device)
    ties = (code[:-1] + code[1:]) / 2
    absmax = torch.cat([ties, torch.ones(1, device=device)])  # 256, the last is the largest
    codes, nested = torch.ops.peftkern.nf4_quantize_absmax(absmax, torch.zeros((), device=device), code, 256)
    assert codes.tolist() == list(range(256))
    assert nested.tolist() == [1.0]


def test_quantize_reads_a_strided_weight_in_row_major_order(device):
    weight = dense(48 * 80, torch.bfloat16, device).view(80, 48)
    for strided in (weight.t(), weight[:, ::2], weight[::3]):
        q, expected = quantize_nf4(strided), quantize_nf4(strided.contiguous())
        assert all(torch.equal(a, b) for a, b in zip(q.tensors(), expected.tensors()))


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("blocksize", [32, 64, 1024, 4096])
def test_dequantize_is_bitwise_the_reference(blocksize, double_quant, dtype, device):
    for numel in NUMELS:
        q = quantize_nf4(dense(numel, torch.float32, device), blocksize, double_quant)
        expected = dequantize_reference(q, dtype)
        buffer = torch.full((numel + 9,), math.nan, dtype=dtype, device=device)
        for skip in (8, 1):  # aligned and not
            out = buffer[skip : skip + numel]
            assert torch.equal(dequantize_nf4(q, out=out), expected)
            assert buffer[skip + numel :].isnan().all()
            assert buffer[:1].isnan().all()
            buffer.fill_(math.nan)


@pytest.mark.parametrize("double_quant", [False, True])
def test_dequantize_of_packed_bytes_that_are_not_aligned(double_quant, device):
    q = quantize_nf4(dense(8192 + 64, torch.float32, device), 64, double_quant)
    packed = torch.empty(q.packed.numel() + 1, 1, dtype=torch.uint8, device=device)[1:].copy_(q.packed)
    shifted = q.with_tensors((packed, *q.tensors()[1:]))
    assert torch.equal(dequantize_nf4(shifted, torch.bfloat16), dequantize_nf4(q, torch.bfloat16))


def test_runs_on_the_current_stream(device):
    if device.type != "cuda":
        pytest.skip("streams are CUDA's")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        weight = torch.zeros(1 << 22, dtype=torch.bfloat16, device=device)
        torch.cuda._sleep(100_000_000)  # whoever runs on another stream reads zeros
        weight.copy_(dense(weight.numel(), torch.bfloat16, device))
        q = quantize_nf4(weight)
        out = dequantize_nf4(q)
    torch.cuda.synchronize()
    packed, absmax = reference.quantize(weight, 64)
    assert torch.equal(q.packed, packed)
    assert torch.equal(out, dequantize_reference(q, torch.bfloat16))
    assert absmax.count_nonzero() > 0


def test_replays_in_a_graph_with_new_data(device):
    if device.type != "cuda":
        pytest.skip("graphs are CUDA's")
    weight = dense(33 * 257, torch.bfloat16, device).view(33, 257)
    out = torch.empty_like(weight)
    dequantize_nf4(quantize_nf4(weight), out=out)  # the code tables reach the device before the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        q = quantize_nf4(weight)
        dequantize_nf4(q, out=out)
    for _ in range(3):
        weight.copy_(torch.randn_like(weight).mul_(0.02))
        out.fill_(math.nan)
        graph.replay()
        torch.cuda.synchronize()
        expected = quantize_nf4(weight)
        assert all(torch.equal(a, b) for a, b in zip(q.tensors(), expected.tensors()))
        assert torch.equal(q.packed, reference.quantize(weight, 64)[0])
        assert torch.equal(out, dequantize_reference(q, torch.bfloat16))


def test_quantize_needs_at_most_three_launches(device):
    """Quantize, the mean, double quantization; and no copy back to the host."""
    if device.type != "cuda":
        pytest.skip("launches are CUDA's")
    if backends()["nf4_quantize"]["CUDA"] == "reference":
        pytest.skip("no kernel of its own")
    weight = dense(1 << 20, torch.bfloat16, device)
    quantize_nf4(weight)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        quantize_nf4(weight)
        torch.cuda.synchronize()
    names = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert not any("Memcpy" in name for name in names), names
    assert len([name for name in names if "Mem" not in name]) <= 3, names


@pytest.mark.parametrize("dtype", FLOATS)
def test_triton_quantizes_the_same_bits(dtype, device):
    triton_kernels = pytest.importorskip("peftkern.ops.nf4.triton_kernels")
    if device.type == "cpu" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter truncates to bfloat16")
    for blocksize in BLOCKSIZES:
        for numel in (0, 65, 4097):
            weight = dense(numel, dtype, device)
            for got, expected in zip(triton_kernels.quantize(weight, blocksize), reference.quantize(weight, blocksize)):
                assert torch.equal(got, expected)
    weight = dense(4097, dtype, device)
    weight[::500] = math.nan
    weight[3::700] = math.inf
    assert torch.equal(triton_kernels.quantize(weight, 64)[0], reference.quantize(weight, 64)[0])
    for blocksize in (100, 256):
        for numel in (0, 1, 256, 300):
            absmax = torch.rand(numel, device=device) * 0.05
            args = (absmax, torch.full((), 0.02, device=device), dynamic_map(True, device), blocksize)
            for got, expected in zip(triton_kernels.quantize_absmax(*args), reference.quantize_absmax(*args)):
                assert torch.equal(got, expected)


def test_a_value_on_a_midpoint_takes_the_lower_code(device):
    triton_kernels = pytest.importorskip("peftkern.ops.nf4.triton_kernels")
    code = nf4_code(device)
    midpoints = (code[:-1] + code[1:]) / 2
    one, expected = torch.ones(1, device=device), torch.arange(15, device=device, dtype=torch.uint8)
    for values, codes in ((midpoints, expected), (torch.nextafter(midpoints, one), expected + 1)):
        weight = torch.cat([one, values, one.repeat(16)])  # scaled by exactly one
        compiled = quantize_nf4(weight, 32, False).packed
        for packed in (compiled, triton_kernels.quantize(weight, 32)[0], reference.quantize(weight, 32)[0]):
            packed = packed.flatten()
            got = torch.stack((packed >> 4, packed & 15), dim=1).flatten()
            assert torch.equal(got[1:16], codes)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_triton_multiplies_by_the_same_bits(dtype, double_quant, device):
    triton_kernels = pytest.importorskip("peftkern.ops.nf4.triton_kernels")
    if device.type == "cpu" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter truncates to bfloat16")
    q = random_nf4((33, 65), 32, double_quant, device=device)
    x, dy = (torch.randn(5, n, device=device).to(dtype) for n in (65, 33))
    bias = torch.randn(33, device=device)
    sizes = (q.blocksize, q.nested_blocksize)
    y = triton_kernels.matmul(x, *q.tensors(), bias, *sizes, 33)
    assert torch.equal(y, reference.matmul(x, *q.tensors(), bias, *sizes, 33))
    assert torch.equal(
        triton_kernels.matmul_dx(dy, *q.tensors(), *sizes, 65), reference.matmul_dx(dy, *q.tensors(), *sizes, 65)
    )
