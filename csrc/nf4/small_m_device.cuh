// Pieces of the small-M NF4 matmul: the pair table and copy instructions.
#pragma once

#include <cstdint>

#include "common/mma.cuh"
#include "common/nf4_code.h"
#include "common/shared_memory.cuh"
#include "nf4/decode.cuh"

namespace peftkern {

// Shared memory is addressed as it lies, from kSharedStart on: a constant that instructions hold, where a pointer would
// cost an addition per access. The system keeps the first kilobyte of it, or nothing, to itself.
inline constexpr uint32_t kSharedStart = 1024;

// ---- The pair table: byte value -> its two codes in T, the even element (high nibble) in the low half. Entry e lies
// in all 32 banks at (e & 127) * 256 + (e >> 7) * 128, so a lane that reads its own bank never meets another, and one
// PRMT makes an address out of a word's bytes. Codes are rounded to T; the scale is applied in fp32 to sums of 64.
template <typename T>
__device__ __forceinline__ uint32_t code_pair(int byte) {
  const T even = round_to<T>(kNF4CodeDevice[byte >> 4]);
  const T odd = round_to<T>(kNF4CodeDevice[byte & 15]);
  return static_cast<uint32_t>(*reinterpret_cast<const uint16_t*>(&even)) |
         static_cast<uint32_t>(*reinterpret_cast<const uint16_t*>(&odd)) << 16;
}

// The table begins at kSharedStart.
template <typename T>
__device__ __forceinline__ void fill_pair_table(int thread, int threads) {
  for (int entry = thread; entry < 256; entry += threads) {
    const uint32_t pair = code_pair<T>(entry);
    const uint32_t row = kSharedStart + (entry & 127) * 256 + (entry >> 7) * 128;
#pragma unroll
    for (int i = 0; i < 8; ++i) {  // neighbours start at different banks
      asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(row + ((i + entry) & 7) * 16), "r"(pair)
                   : "memory");
    }
  }
}

// The pairs of a word's four bytes. bank = 4 * lane in each byte.
__device__ __forceinline__ void look_up(uint32_t word, uint32_t bank, uint32_t (&pairs)[4]) {
  const uint32_t low = word & 0x7f7f7f7fu;
  const uint32_t high = (word & 0x80808080u) | bank;
#pragma unroll
  for (int b = 0; b < 4; ++b) {
    uint32_t offset;  // byte 0 from high, byte 1 from low, then low's sign bit, which is clear, twice
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(offset) : "r"(low), "r"(high), "r"(0x8804 + b * 0x1111));
    asm("ld.shared.u32 %0, [%1 + %2];" : "=r"(pairs[b]) : "r"(offset), "n"(kSharedStart));
  }
}

// ---- Asynchronous copies. Without valid they read nothing and write zeros.
__device__ __forceinline__ void copy16(uint32_t to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void copy4(uint32_t to, const void* from, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(valid ? 4 : 0) : "memory");
}
__device__ __forceinline__ void copy_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace peftkern
