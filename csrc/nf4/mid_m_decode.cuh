// nf4_mid_m's decoding: packed bytes and scales in shared memory to wgmma's A fragments, in three moves that a consumer
// makes for different pieces at a time.
#pragma once

#include <cstdint>

#include "nf4/mid_m_shared.cuh"
#include "nf4/tile_decode.cuh"

namespace peftkern {

// A piece is a warp's 16 outs x 32 columns: two fragments. A lane has rows lane / 4 and lane / 4 + 8 of the outs.
template <typename T, class Shape>
class MidDecoder {
 public:
  __device__ __forceinline__ MidDecoder(const MidShared<Shape>& s, int out, int lane)
      : s_(s), row_(out + lane / 4), table_(shared_address(s.pairs) + lane * 4), selector_(128u << 8 * (lane % 4)) {
    codes_at_ = row_ * 128 + lane / 4 * 16;
    // Kept in registers: the compiler would compute them anew for every piece.
    asm volatile("" : "+r"(table_), "+r"(selector_), "+r"(codes_at_), "+r"(row_));
  }

  // Codes lie [rows][128 bytes]; the 128-byte swizzle permutes a row's 16-byte pieces by row % 8.
  __device__ __forceinline__ void load_words(int stage, int piece) {
    const uint8_t* base = s_.codes[stage] + (codes_at_ ^ (piece * 16));
    words_[0] = *reinterpret_cast<const uint4*>(base);
    words_[1] = *reinterpret_cast<const uint4*>(base + 8 * 128);
  }

  // Of the two pieces of step `sub`.
  __device__ __forceinline__ void load_scales(int stage, int sub, int buffer) {
    scales_[buffer][0] = s_.scales[stage][sub][row_];
    scales_[buffer][1] = s_.scales[stage][sub][row_ + 8];
  }

  // Starts the lookups of the piece whose words are loaded.
  __device__ __forceinline__ void look_up() {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      pairs_[0][r] = pair(words_[r].x);
      pairs_[0][2 + r] = pair(words_[r].y);
      pairs_[1][r] = pair(words_[r].z);
      pairs_[1][2 + r] = pair(words_[r].w);
    }
  }

  // Fragments of the piece looked up.
  __device__ __forceinline__ void finish(uint32_t (&a)[2][4], int buffer) const {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uint2 scale = scales_[buffer][i % 2];
      const auto codes = as_pair(pairs_[i / 4][i % 4], T());
      const auto weights = __hfma2(codes, as_pair(scale.x, T()), __hmul2(codes, as_pair(scale.y, T())));
      a[i / 4][i % 4] = *reinterpret_cast<const uint32_t*>(&weights);
    }
  }

 private:
  __device__ __forceinline__ uint32_t pair(uint32_t word) const {
    uint32_t codes;  // of the lane's byte, times the 128 bytes of an entry
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(codes) : "r"(__dp4a(word, selector_, table_)));
    return codes;
  }

  const MidShared<Shape>& s_;
  int row_;
  uint32_t table_, selector_, codes_at_;
  uint4 words_[2] = {};
  uint2 scales_[Shape::kBuffers][2] = {};  // with two, of the step being finished and of the next
  uint32_t pairs_[2][4] = {};
};

}  // namespace peftkern
