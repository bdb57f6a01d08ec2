"""The random weights and row slices that NF4's tests are made of."""

from __future__ import annotations

import pytest
import torch

from peftkern.testing.nf4 import dense_nf4, random_nf4, row_slice


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("blocksize", [32, 64, 4096])
@pytest.mark.parametrize("shape", [(0, 4), (1, 1), (33, 65), (64, 128)])
def test_random_weights_are_valid_and_trained_like(shape, blocksize, double_quant, device):
    q = random_nf4(shape, blocksize, double_quant, torch.float32, device)
    q.check()
    dense = q.dequantize()
    assert torch.equal(dense, dense_nf4(q, torch.float32))
    assert (dense.abs() < 0.2).all()
    assert torch.equal(random_nf4(shape, blocksize, double_quant, torch.float32, device).packed, q.packed)


@pytest.mark.parametrize("double_quant", [True, False])
def test_slices_of_rows_decode_to_slices_of_the_weight(double_quant, device):
    q = random_nf4((70, 1024), 32, double_quant, device=device)
    dense = q.dequantize()
    for first, last in ((0, 70), (8, 24), (64, 70)):  # eight rows are one block of scales
        part = row_slice(q, first, last)
        part.check()
        assert torch.equal(part.dequantize(), dense[first:last])
    if double_quant:
        with pytest.raises(ValueError, match="row 3 of 1024 columns starts inside a block"):
            row_slice(q, 3, 9)
    with pytest.raises(ValueError, match="inside a block"):
        row_slice(random_nf4((4, 40), double_quant=False), 1, 2)
