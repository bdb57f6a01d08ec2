// Launch configurations of NF4 quantize and dequantize: pure functions of the problem, tested on the CPU through
// peftkern._host.
#pragma once

#include <cstdint>

namespace peftkern {

// Both directions move units: the codes of as many weights as fill 16 bytes of the dense side.
inline constexpr int kDenseUnitBytes = 16;

inline constexpr int kDequantizeThreads = 128;
inline constexpr int kDequantizeUnits = 8;  // per thread, all loaded before the first use

inline constexpr int kQuantizeThreads = 256;
inline constexpr int kQuantizeTile = 4096;  // weights per CTA: every blocksize divides it, so blocks never leave a CTA

inline constexpr int kQuantizeAbsmaxThreads = 256;  // one warp per nested block
inline constexpr int kQuantizeAbsmaxCtasPerSm = 4;  // each builds the search tree once

struct ConvertConfig {
  int64_t ctas;
  int threads;
};

inline constexpr int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// Weights that one CTA decodes to a dtype of `itemsize` bytes.
inline constexpr int64_t dequantize_tile(int itemsize) {
  return int64_t{kDequantizeThreads} * kDequantizeUnits * (kDenseUnitBytes / itemsize);
}

inline ConvertConfig nf4_dequantize_config(int64_t numel, int itemsize) {
  return {ceil_div(numel, dequantize_tile(itemsize)), kDequantizeThreads};
}

inline ConvertConfig nf4_quantize_config(int64_t numel) {
  return {ceil_div(numel, kQuantizeTile), kQuantizeThreads};
}

// A resident grid: building the search tree costs about as much as encoding one block.
inline ConvertConfig nf4_quantize_absmax_config(int64_t numel, int64_t blocksize, int multiprocessors) {
  const int64_t ctas = ceil_div(ceil_div(numel, blocksize), kQuantizeAbsmaxThreads / 32);
  const int64_t resident = int64_t{multiprocessors} * kQuantizeAbsmaxCtasPerSm;
  return {ctas < resident ? ctas : resident, kQuantizeAbsmaxThreads};
}

}  // namespace peftkern
