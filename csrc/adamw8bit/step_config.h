// Launch configurations of the CUDA step and of the look at its gradients: pure functions of the problem, tested on the
// CPU through peftkern._host.
#pragma once

#include <cstdint>

#include "adamw8bit/code_tables.h"
#include "adamw8bit/step_call.h"

namespace peftkern {

struct AdamWConfig {
  int ctas;
  bool staged;       // with copies of decode tables in shared memory and tiles fetched into it ahead
  int shared_bytes;  // of a CTA, dynamic
  bool early;        // started beside the end of the kernel before it
};

inline constexpr int kStepStatic = 4096;  // bytes for the kernel's own variables in shared memory
inline constexpr int kLookCtas = 4;       // of a multiprocessor; half as many where the norm is asked for

// Chunks of a tensor of `numel` elements.
inline constexpr int64_t adamw_chunks(int64_t numel) {
  return (numel + kAdamWChunk - 1) / kAdamWChunk;
}

// Entries of a launch that a tensor takes.
inline constexpr int64_t adamw_entries(int64_t numel) {
  return (numel + kAdamWMaxPart - 1) / kAdamWMaxPart;
}

// How the chunks of an entry of `numel` elements can be moved, as AdamWIndex has it. aligned: its parameters, gradients
// and codes are, to 16 bytes. blocks: its blocks are tiles, and their scales are aligned, too.
inline constexpr uint8_t adamw_kinds(uint32_t numel, bool aligned, bool blocks) {
  if (!aligned) return 0;
  const uint32_t full = blocks ? kAdamWFetched | kAdamWPlain : kAdamWFetched;
  const uint32_t left = numel % kAdamWChunk;
  uint32_t last = full;
  if (left != 0) last = blocks && left % (4 * kAdamWTile) == 0 ? full | kAdamWPartial : 0;
  return static_cast<uint8_t>(full << 4 | last);
}

// One CTA of a multiprocessor, which take chunks in turn. major: of the compute capability. shared_limit: bytes that a
// CTA may have.
inline constexpr AdamWConfig adamw_step_config(int64_t chunks, int multiprocessors, int major, int shared_limit) {
  const bool staged =
      major >= 9 && shared_limit >= static_cast<int>(AdamWLayout<DecodeTables::kBanks>::kStagedEnd) + kStepStatic;
  const int bytes =
      static_cast<int>(staged ? AdamWLayout<DecodeTables::kBanks>::kStagedEnd : AdamWLayout<DecodeTables::kOnce>::kEnd);
  return {static_cast<int>(chunks < multiprocessors ? chunks : multiprocessors), staged, bytes, major >= 9};
}

inline constexpr int adamw_look_ctas(int64_t chunks, int multiprocessors, bool norm) {
  const int64_t resident = int64_t{multiprocessors} * (norm ? kLookCtas / 2 : kLookCtas);
  return static_cast<int>(chunks < resident ? chunks : resident);
}

}  // namespace peftkern
