// An NF4 weight of lora_gemm's made dense in memory that its main tiles load from.
//
// A pass of its own would be bound by memory, which main tiles leave idle. So lora_prepare decodes what the first steps
// of the first main tiles read, and the rest is decoded beside main tiles, by the warps of the producer's warpgroup
// that else idle, in the order in which the first tiles read it; those wait for the flag of a piece. Items are drawn
// from a counter, and who draws one waits for nothing: tiles of blocks that run never wait for blocks that do not.
#pragma once

#include "common/dependent_launch.cuh"
#include "gemm/gemm_shared.cuh"
#include "nf4/dequantize.cuh"

namespace peftkern {

template <typename T, bool kNested>
class GemmDecoder {
 public:
  static constexpr int kRows = 8;  // at a time: a lane has 8 weights of each

  __device__ __forceinline__ GemmDecoder(const GemmDecode& p, int lane) : p_(p) {
    unit_.lane = lane;
    unit_.code = kNF4CodeDevice[lane % 16];
    if constexpr (kNested) unit_.offset = __ldg(p.packed.nested_offset);
  }

  // All lanes of a warp, as of the others.
  __device__ __forceinline__ void run() {
    int next = draw();
    while (true) {
      const int number = __shfl_sync(0xffffffffu, next, 0);
      if (number >= p_.plan.items) return;
      const GemmDecodeItem item = gemm_decode_item(p_.plan, number);
      next = draw();
#pragma unroll 1
      for (int row = 0; row < kGemmDecodeRows; row += kRows) rows(item.row + row, item.column);
      __threadfence();
      async_proxy_fence();  // producers read it through the copy engine
      __syncwarp();
      if (unit_.lane == 0) {
        flag_release_add(p_.ready + item.flag, 1);
        flag_release_add(p_.done, 1);
      }
    }
  }

  // kRows rows from `row0` on of kGemmDecodeColumns from `column` on, as far as there are any. Their scales are decoded
  // one a lane, or two of blocks of 32.
  __device__ __forceinline__ void rows(int row0, int column) const {
    const int count = min(kRows, p_.rows - row0), lane = unit_.lane;
    if (count <= 0 || column >= p_.columns) return;
    const uint32_t first = static_cast<uint32_t>(row0) * p_.columns + column;
    uint32_t units[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const uint32_t at = first + min(i, count - 1) * p_.columns;
      units[i] = load_packed<uint32_t>(p_.packed.packed + at / 2 + lane * 4);
    }
    const int log2_across = max(8 - p_.packed.log2_blocksize, 0);  // blocks of a row
    const bool two = log2_across == 3;
    float scales[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (i > 0 && !two) continue;
      const int place = i * 32 + lane, row = min(place >> log2_across, count - 1);
      const uint32_t within = (place & ((1 << log2_across) - 1)) << p_.packed.log2_blocksize;
      const uint32_t at = first + row * p_.columns + within;
      scales[i] = block_scale<kNested>(p_.packed, at >> p_.packed.log2_blocksize, unit_.offset);
    }
    const int block = log2_across == 0 ? 0 : lane * 8 >> p_.packed.log2_blocksize;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const float scale =
          __shfl_sync(0xffffffffu, two && i >= kRows / 2 ? scales[1] : scales[0], (i << log2_across) + block);
      uint32_t words[4];
      unit_.decode(units[i], scale, words);
      T* const to = static_cast<T*>(p_.dense) + (first + i * p_.columns + lane * 8);
      if (i < count) *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
    }
  }

 private:
  // In lane 0: early, so that the number is there at the item's end.
  __device__ __forceinline__ int draw() const {
    return unit_.lane == 0 ? p_.plan.prepared + atomicAdd(p_.drawn, 1) : 0;
  }

  const GemmDecode& p_;
  Dequantizer<T, kNested> unit_{};
};

// f(decoder) of the weight's kind.
template <typename T, typename F>
__device__ __forceinline__ void gemm_with_decoder(const GemmDecode& p, const F& f) {
  const int lane = threadIdx.x % 32;
  if (p.packed.absmax_codes != nullptr) {
    f(GemmDecoder<T, true>(p, lane));
  } else {
    f(GemmDecoder<T, false>(p, lane));
  }
}

// By the warps of the producer's warpgroup but the producer.
template <typename T>
__device__ __forceinline__ void gemm_decode(const GemmDecode& p) {
  wait_for_earlier_kernels();  // which set the counter and the flags to 0
  gemm_with_decoder<T>(p, [](auto decoder) { decoder.run(); });
}

// By warp `number` of lora_prepare's.
template <typename T>
__device__ __forceinline__ void gemm_decode_first(const GemmDecode& p, int number) {
  constexpr int kPerItem = kGemmDecodeRows / GemmDecoder<T, true>::kRows;
  if (number >= p.plan.prepared * kPerItem) return;
  const GemmDecodeItem item = gemm_decode_item(p.plan, number / kPerItem);
  gemm_with_decoder<T>(
      p, [&](const auto& decoder) { decoder.rows(item.row + number % kPerItem * decoder.kRows, item.column); });
  async_proxy_fence();  // producers read it through the copy engine
}

}  // namespace peftkern
