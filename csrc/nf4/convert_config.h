// Launch configurations of NF4 quantize and dequantize: pure functions of the problem, tested on the CPU through
// peftkern._host.
#pragma once

#include <cstdint>

namespace peftkern {

inline constexpr int kDequantizeThreads = 256;
inline constexpr int kDequantizeWords = 4;  // 4-byte words (8 weights each) per thread, loaded before the first use

struct DequantizeConfig {
  int64_t ctas;
  int threads;
};

// One word of 8 weights per thread and step; neighbours in a warp take neighbouring words.
inline DequantizeConfig nf4_dequantize_config(int64_t numel) {
  const int64_t words = (numel + 7) / 8;
  const int64_t per_cta = static_cast<int64_t>(kDequantizeThreads) * kDequantizeWords;
  return {(words + per_cta - 1) / per_cta, kDequantizeThreads};
}

}  // namespace peftkern
