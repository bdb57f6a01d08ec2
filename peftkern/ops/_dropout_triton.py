"""The dropout mask of `_dropout.py` in Triton kernels."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """Philox4x32-7 of the counter (c0, c1, c2, c3). `tl.philox` gives the same words with twice the multiplications:
    one for either half of each product."""
    for _ in tl.static_range(7):
        p0, p1 = c0.to(tl.uint64) * 0xD2511F53, c2.to(tl.uint64) * 0xCD9E8D57
        c0, c1 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0, p1.to(tl.uint32)
        c2, c3 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1, p0.to(tl.uint32)
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def kept(seed_ptr, threshold, row, first_column, COLUMNS: tl.constexpr):
    """The dropout mask of rows `row`, int64, and COLUMNS columns from a multiple of 16 on: see `ops/_dropout.py`."""
    call = (first_column // 16 + tl.arange(0, COLUMNS // 16)).to(tl.uint32)[None, :]
    low, high = row.to(tl.uint32)[:, None], (row >> 32).to(tl.uint32)[:, None]
    seed = tl.load(seed_ptr)
    w0, w1, w2, w3 = philox(call, low, high, tl.zeros_like(call), seed.to(tl.uint32), (seed >> 32).to(tl.uint32))
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    product = words.to(tl.uint64) * 0x9E3779B1
    low = product.to(tl.uint32) ^ (product >> 32).to(tl.uint32)
    kept0 = ((words << 8 & 0x7F00) | (low & 0xFF)).to(tl.int32) >= threshold
    kept1 = ((words & 0x7F00) | (low >> 8 & 0xFF)).to(tl.int32) >= threshold
    kept2 = ((words >> 8 & 0x7F00) | (low >> 16 & 0xFF)).to(tl.int32) >= threshold
    kept3 = ((words >> 16 & 0x7F00) | (low >> 24)).to(tl.int32) >= threshold
    return tl.interleave(tl.interleave(kept0, kept2), tl.interleave(kept1, kept3))
