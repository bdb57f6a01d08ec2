// Dropout in lora_gemm: which of 16 neighbouring elements of a row are kept, and what is done with that.
//
// A call of the generator is split: what its first three rounds need of the row alone or of the column alone is made
// once for many calls, which leaves 9 of 14 wide products. Numbers are compared two at a time, as halves: order is that
// of their bits, and those that are no number are larger than any threshold here.
#pragma once

#include <cuda_fp16.h>

#include "common/hopper.cuh"
#include "common/philox.h"
#include "gemm/gemm_shared.cuh"

namespace peftkern {

struct DropoutRow {
  uint32_t high, low;
};

struct DropoutColumn {
  uint32_t x, y, z, u;
};

struct WideProduct {
  uint32_t high, low;
};

__device__ __forceinline__ WideProduct wide_product(uint32_t a, uint32_t b) {
  const uint64_t v = uint64_t{a} * b;
  return {static_cast<uint32_t>(v >> 32), static_cast<uint32_t>(v)};
}

// Calls with counter (column / 16, row, 0, 0): the counter's third word is 0 for fewer than 2^32 rows.
class DropoutCalls {
 public:
  // Reads the seed anew for each use: its round keys would be kept in registers beside the sums.
  __device__ __forceinline__ explicit DropoutCalls(const int64_t* seed) {
    uint32_t k0, k1;
    asm volatile("ld.global.v2.b32 {%0, %1}, [%2];" : "=r"(k0), "=r"(k1) : "l"(seed));
#pragma unroll
    for (int i = 0; i < 7; ++i) {
      key0_[i] = k0 + i * kPhiloxKeyStep0;
      key1_[i] = k1 + i * kPhiloxKeyStep1;
    }
  }

  __device__ __forceinline__ DropoutRow row(int m) const {
    const WideProduct p = wide_product(static_cast<uint32_t>(m) ^ key0_[0], kPhiloxMultiplier0);
    return {p.high, p.low};
  }

  __device__ __forceinline__ DropoutColumn column(int call) const {
    const WideProduct a = wide_product(static_cast<uint32_t>(call), kPhiloxMultiplier0);
    const WideProduct b = wide_product(a.high ^ key1_[0], kPhiloxMultiplier1);
    const WideProduct c = wide_product(b.high ^ key0_[1], kPhiloxMultiplier0);
    return {a.low ^ key1_[1], b.low ^ key0_[2], c.high ^ key1_[2], c.low ^ key1_[3]};
  }

  // Pair i of the 16 elements: all bits of a half are set where its element is kept.
  __device__ __forceinline__ void kept(const DropoutRow& r, const DropoutColumn& c, uint32_t threshold,
                                       uint32_t (&pairs)[8]) const {
    const WideProduct a = wide_product(r.high ^ c.x, kPhiloxMultiplier1);
    const WideProduct b = wide_product(a.high ^ c.y, kPhiloxMultiplier0);
    const WideProduct d = wide_product(r.low ^ c.z, kPhiloxMultiplier1);
    uint32_t w[4] = {d.high ^ a.low ^ key0_[3], d.low, b.high ^ c.u, b.low};
#pragma unroll
    for (int i = 4; i < 7; ++i) {
      const WideProduct e = wide_product(w[0], kPhiloxMultiplier0), f = wide_product(w[2], kPhiloxMultiplier1);
      w[0] = f.high ^ w[1] ^ key0_[i];
      w[1] = f.low;
      w[2] = e.high ^ w[3] ^ key1_[i];
      w[3] = e.low;
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint32_t low = dropout_mix(w[j]);
      pairs[2 * j] = kept_pair(__byte_perm(low, w[j], 0x5140), threshold);
      pairs[2 * j + 1] = kept_pair(__byte_perm(low, w[j], 0x7362), threshold);
    }
  }

 private:
  // Bit 15 of a number is not its own: the sign, which the comparison leaves out.
  static __device__ __forceinline__ uint32_t kept_pair(uint32_t numbers, uint32_t threshold) {
    uint32_t mask;
    asm("{\n"
        ".reg .b32 positive;\n"
        "abs.f16x2 positive, %1;\n"
        "set.geu.u32.f16x2 %0, positive, %2;\n"
        "}"
        : "=r"(mask)
        : "r"(numbers), "r"(threshold));
    return mask;
  }

  uint32_t key0_[7], key1_[7];
};

// ---- masks of operands in shared memory
// Where the first call of a warpgroup's thread begins in a box of 64 columns under the 128-byte swizzle: two
// neighbouring chunks of 16 bytes. Its others are kDropoutRows below, one after the other. Free of bank conflicts.
inline constexpr int kDropoutRows = 32;

__device__ __forceinline__ uint32_t dropout_place(int thread) {
  const int row = thread / 4, chunk = 2 * (thread % 4);
  return row * 128 + (chunk ^ row % 8) * 16;
}

// Zeroes what is dropped of a thread's calls: kRows in each of kBoxes boxes, `box_stride` bytes apart.
template <int kRows, int kBoxes>
__device__ __forceinline__ void drop_elements(uint32_t place, int box_stride, const DropoutCalls& calls,
                                              const DropoutRow (&rows)[kRows], const DropoutColumn (&columns)[kBoxes],
                                              uint32_t threshold) {
  constexpr int kCalls = kRows * kBoxes;
  const auto at = [&](int call, int half) {
    return (place ^ (16 * half)) + call / kRows * box_stride + call % kRows * kDropoutRows * 128;
  };
  uint32_t v[kCalls][8];
#pragma unroll
  for (int i = 0; i < 2 * kCalls; ++i) {
    uint32_t* to = v[i / 2] + 4 * (i % 2);
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(at(i / 2, i % 2))
                 : "memory");
  }
#pragma unroll
  for (int call = 0; call < kCalls; ++call) {
    uint32_t kept[8];
    calls.kept(rows[call % kRows], columns[call / kRows], threshold, kept);
#pragma unroll
    for (int i = 0; i < 8; ++i) v[call][i] &= kept[i];
  }
#pragma unroll
  for (int i = 0; i < 2 * kCalls; ++i) {
    const uint32_t* from = v[i / 2] + 4 * (i % 2);
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(at(i / 2, i % 2)), "r"(from[0]), "r"(from[1]),
                 "r"(from[2]), "r"(from[3])
                 : "memory");
  }
}

// ---- the mask of dX as bits, by one warp of the producer's for both consumer warpgroups
// A row's 256 outs are eight words, of 16 pairs each: pair 4 n + q is bits 4 q + n and 16 + 4 q + n. They lie where the
// outs before them have gone out from. A warpgroup hands over its buffer with its tile, and waits for the bits at the
// tile's end.
struct DropoutBits {
  static constexpr int kThreads = 128 + 32;  // of a warpgroup and the warp
  static constexpr int kRowBytes = kGemmOuts / 8;

  static __device__ __forceinline__ int free_barrier(int group) { return 4 + group; }
  static __device__ __forceinline__ int made_barrier(int group) { return 6 + group; }

  // All threads of a warpgroup. token0 -1: no tile follows.
  static __device__ __forceinline__ void hand_over(GemmShared& s, int group, bool leader, int token0, int out0) {
    if (leader) {
      tensor_store_wait<0>();
      s.mask_tiles[group] = make_int2(token0, out0);
    }
    named_barrier_arrive(free_barrier(group), kThreads);
  }

  static __device__ __forceinline__ void wait(int group) { named_barrier(made_barrier(group), kThreads); }

  // A lane's bits of a word from bit 0 on: out 8 n + 2 (lane % 4) + b of the word's 32 is bit n + 16 b.
  static __device__ __forceinline__ uint32_t of_lane(uint32_t word, int lane) { return word >> lane % 4 * 4; }

  // The warp.
  static __device__ __forceinline__ void make(GemmShared& s, const GemmProblem& p) {
    const int lane = threadIdx.x % 32;
    for (int group = 0;; group ^= 1) {
      named_barrier(free_barrier(group), kThreads);
      const int2 tile = s.mask_tiles[group];
      if (tile.x < 0) {
        if (group == 1) return;
        continue;
      }
      uint8_t* bits = s.out[group][0] + lane / 8 * kRowBytes + lane % 8 * 4;
      const DropoutCalls calls(p.seed);
      const int call = (tile.y + lane % 8 * 32) / kDropoutColumns;
      const DropoutColumn columns[2] = {calls.column(call), calls.column(call + 1)};
#pragma unroll 1
      for (int i = 0; i < 64; i += 4) {
        const DropoutRow row = calls.row(tile.x + i + lane / 8);
        uint32_t word = 0, kept[2][8];
        calls.kept(row, columns[0], p.threshold, kept[0]);
        calls.kept(row, columns[1], p.threshold, kept[1]);
#pragma unroll
        for (int k = 0; k < 16; ++k) word |= kept[k / 8][k % 8] & 0x10001u << (k % 4 * 4 + k / 4);
        *reinterpret_cast<uint32_t*>(bits + i * kRowBytes) = word;
      }
      named_barrier_arrive(made_barrier(group), kThreads);
    }
  }
};

}  // namespace peftkern
