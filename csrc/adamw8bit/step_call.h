// What the CUDA step is told: the tensors of a launch and the step's numbers. Both are kernel parameters, 32,764 bytes
// at most, so that no pointer table has to be copied to the device, and a captured graph holds its own.
#pragma once

#include <cstdint>

namespace peftkern {

inline constexpr int kAdamWTile = 256;        // elements that a warp updates at a time, 8 per lane
inline constexpr int kAdamWPiece = 2048;      // that a warp looks at in a row
inline constexpr int kAdamWChunk = 8192;      // of one tensor, updated by a CTA; holds whole blocks
inline constexpr int kAdamWMaxTensors = 512;  // of a launch
inline constexpr int kAdamWPieces = kAdamWChunk / kAdamWPiece;

enum AdamWType : uint8_t { kAdamWFloat = 0, kAdamWHalf = 1, kAdamWBFloat16 = 2, kAdamWUnaligned = 4 };

inline constexpr uint32_t kAdamWMaxPart = 1u << 30;  // elements of an entry, so that 32 bits index it

// Tensors of a launch, larger ones in several entries.
struct AdamWTensors {
  void* param[kAdamWMaxTensors];
  const void* grad[kAdamWMaxTensors];
  uint8_t *m_code[kAdamWMaxTensors], *v_code[kAdamWMaxTensors];
  float *m_absmax[kAdamWMaxTensors], *v_absmax[kAdamWMaxTensors];
  uint32_t first_chunk[kAdamWMaxTensors + 1];  // chunks of one entry follow those of the one before
  uint32_t numel[kAdamWMaxTensors];
  uint32_t tensor[kAdamWMaxTensors];  // place of the tensor in the list, and in the high byte of the entry in it
  uint8_t param_type[kAdamWMaxTensors];
  uint8_t grad_type[kAdamWMaxTensors];  // kAdamWUnaligned: float data not to 16 bytes or codes not to 8
  int count;
};

// A number that the host knows, or where the device finds it.
struct AdamWNumber {
  enum Type : int { kHost, kFloat, kDouble, kLong };
  double value;
  const void* pointer;
  Type type;
};

struct AdamWCall {
  AdamWNumber lr, step;
  double beta1, beta2, weight_decay;
  double max_norm;  // of all gradients together
  float beta1_rounded, one_minus_beta1, beta2_rounded, one_minus_beta2, eps;
  const float* grad_scale;      // or null
  const float* found_inf;       // believed where given, else the gradients are looked at
  const float* norm;            // likewise, where clip is set
  float* norm_out;              // or null
  float* step_out;              // or null: `step` is then the count before this one, and is moved on
  int64_t* skipped;             // or null: counts steps with gradients that are not finite
  float* piece_sums;            // [kAdamWPieces * chunks], scratch
  uint32_t* found;              // [CTAs], scratch
  const uint32_t* code_tables;  // as code_tables.cuh lays them out
  uint64_t seed;
  int log2_blocksize;
  int kept_chunks;  // a CTA's first chunks, whose gradients it keeps in shared memory between look and update
  int l2_chunks;    // a CTA's last chunks, whose gradients should stay in the L2 cache
  int hints;
  bool look, update, clip, maximize;
};

static_assert(sizeof(AdamWTensors) + sizeof(AdamWCall) <= 32764, "kernel parameters");

}  // namespace peftkern
