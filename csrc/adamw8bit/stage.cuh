// Where a warp has its tile before it updates it.
#pragma once

#include "adamw8bit/step_call.h"
#include "adamw8bit/tile.cuh"
#include "common/hopper.cuh"

namespace peftkern {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
inline constexpr bool kHasCopyEngine = false;
#else
inline constexpr bool kHasCopyEngine = true;
#endif

// A tile of entry t: n elements from `offset` on, 0 where a block's other warps hold all of it.
template <typename Format>
struct AdamWTile {
  int t, n;
  uint32_t offset;
};

// Whether a tile can be read and written 16 bytes at a time.
template <typename Format>
__device__ __forceinline__ bool is_whole(const AdamWTile<Format>& tile, const AdamWTensors& tensors) {
  return tile.n == kAdamWTile && tensors.grad_type[tile.t] < kAdamWUnaligned;
}

template <typename Format>
__device__ __forceinline__ int param_type(const AdamWTensors& tensors, int t) {
  return Format::kMixed ? tensors.param_type[t] : Format::kType;
}

template <typename Format>
__device__ __forceinline__ int grad_type(const AdamWTensors& tensors, int t) {
  return Format::kMixed ? tensors.grad_type[t] & 3 : Format::kType;
}

// A warp's stage in shared memory, which holds a tile's parameters, gradients and codes.
template <typename Format>
class AdamWStage {
 public:
  static constexpr uint32_t kValues = Format::kWords * 128, kCodes = kAdamWTile;
  static constexpr uint32_t kBytes = 2 * kValues + 2 * kCodes;
  static constexpr uint32_t kGrad = kValues, kFirst = 2 * kValues, kSecond = kFirst + kCodes;  // what lies where

  AdamWStage() = default;
  __device__ AdamWStage(uint32_t address, uint32_t barrier) : address_(address), barrier_(barrier) {}

  // Lets the copy engine bring a whole tile, when all lanes have read the one before.
  __device__ __forceinline__ void fetch(const AdamWTile<Format>& tile, const AdamWTensors& tensors) const {
    if (threadIdx.x % 32 != 0) return;
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier_), "n"(kBytes) : "memory");
    constexpr int kSize = Format::kWords / 2;
    copy(address_, peftkern::address<kSize>(tensors.param[tile.t], tile.offset), kValues);
    copy(address_ + kGrad, peftkern::address<kSize>(tensors.grad[tile.t], tile.offset), kValues);
    copy(address_ + kFirst, tensors.m_code[tile.t] + tile.offset, kCodes);
    copy(address_ + kSecond, tensors.v_code[tile.t] + tile.offset, kCodes);
  }

  __device__ __forceinline__ void wait() {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "WAIT:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra DONE;\n"
        "bra WAIT;\n"
        "DONE:\n"
        "}" ::"r"(barrier_),
        "r"(parity_)
        : "memory");
    parity_ ^= 1;
  }

  // Brings any tile, lane by lane; each reads what it wrote.
  __device__ __forceinline__ void load(const AdamWTile<Format>& tile, const AdamWTensors& tensors, bool whole) const {
    const int lane = threadIdx.x % 32, t = tile.t;
    uint32_t values[Format::kWords], codes[2];
    load_values<Format>(values, tensors.grad[t], tile.offset, tile.n, whole, grad_type<Format>(tensors, t), lane);
    write(kGrad, values);
    load_codes<Format>(codes, tensors.m_code[t], tile.offset, tile.n, whole, lane);
    write(kFirst, codes);
    load_codes<Format>(codes, tensors.v_code[t], tile.offset, tile.n, whole, lane);
    write(kSecond, codes);
    load_values<Format>(values, tensors.param[t], tile.offset, tile.n, whole, param_type<Format>(tensors, t), lane);
    write(0, values);
    shared_writes_fence();  // the copy engine writes there next
  }

  __device__ __forceinline__ void params(uint32_t (&words)[Format::kWords]) const { read(0, words); }
  __device__ __forceinline__ void grads(uint32_t (&words)[Format::kWords]) const { read(kGrad, words); }
  __device__ __forceinline__ void codes(uint32_t (&first)[2], uint32_t (&second)[2]) const {
    read(kFirst, first);
    read(kSecond, second);
  }

 private:
  __device__ __forceinline__ void read(uint32_t from, uint32_t (&words)[Format::kWords]) const {
    const uint32_t at = address_ + from + threadIdx.x % 32 * 16;
    put(words, 0, read16(at));
    if constexpr (Format::kWords == 8) put(words, 4, read16(at + 512));
  }
  __device__ __forceinline__ void read(uint32_t from, uint32_t (&codes)[2]) const {
    const uint32_t at = address_ + from, lane = threadIdx.x % 32;
    if constexpr (Format::kSplit) {
      codes[0] = read4(at + lane * 4);
      codes[1] = read4(at + lane * 4 + 128);
    } else {
      asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(codes[0]), "=r"(codes[1]) : "r"(at + lane * 8) : "memory");
    }
  }
  __device__ __forceinline__ void copy(uint32_t to, const void* from, uint32_t bytes) const {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                 "l"(from), "r"(bytes), "r"(barrier_)
                 : "memory");
  }
  __device__ __forceinline__ void write(uint32_t to, const uint32_t (&words)[Format::kWords]) const {
    const uint32_t at = address_ + to + threadIdx.x % 32 * 16;
#pragma unroll
    for (int i = 0; i < Format::kWords; i += 4) {
      asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(at + i * 128), "r"(words[i]), "r"(words[i + 1]),
                   "r"(words[i + 2]), "r"(words[i + 3])
                   : "memory");
    }
  }
  __device__ __forceinline__ void write(uint32_t to, const uint32_t (&codes)[2]) const {
    const uint32_t at = address_ + to + threadIdx.x % 32 * (Format::kSplit ? 4 : 8);
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(at), "r"(codes[0]) : "memory");
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(at + (Format::kSplit ? 128 : 4)), "r"(codes[1]) : "memory");
  }
  static __device__ __forceinline__ uint4 read16(uint32_t at) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(at)
                 : "memory");
    return v;
  }
  static __device__ __forceinline__ uint32_t read4(uint32_t at) {
    uint32_t v;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(at) : "memory");
    return v;
  }

  uint32_t address_, barrier_;  // of shared memory
  uint32_t parity_ = 0;
};

// The same in registers, where shared memory has no room.
template <typename Format>
class AdamWHeld {
 public:
  __device__ __forceinline__ void load(const AdamWTile<Format>& tile, const AdamWTensors& tensors, bool whole) {
    const int lane = threadIdx.x % 32, t = tile.t;
    load_values<Format>(grad_, tensors.grad[t], tile.offset, tile.n, whole, grad_type<Format>(tensors, t), lane);
    load_codes<Format>(first_, tensors.m_code[t], tile.offset, tile.n, whole, lane);
    load_codes<Format>(second_, tensors.v_code[t], tile.offset, tile.n, whole, lane);
    load_values<Format>(param_, tensors.param[t], tile.offset, tile.n, whole, param_type<Format>(tensors, t), lane);
  }
  __device__ __forceinline__ void params(uint32_t (&words)[Format::kWords]) const { assign(words, param_); }
  __device__ __forceinline__ void grads(uint32_t (&words)[Format::kWords]) const { assign(words, grad_); }
  __device__ __forceinline__ void codes(uint32_t (&first)[2], uint32_t (&second)[2]) const {
    assign(first, first_);
    assign(second, second_);
  }

 private:
  template <int kCount>
  static __device__ __forceinline__ void assign(uint32_t (&to)[kCount], const uint32_t (&from)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) to[i] = from[i];
  }

  uint32_t param_[Format::kWords], grad_[Format::kWords], first_[2], second_[2];
};

}  // namespace peftkern
