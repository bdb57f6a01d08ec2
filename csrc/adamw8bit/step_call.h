// What the CUDA kernels are told: the tensors of a launch and the step's numbers. Both are kernel parameters, 32,764
// bytes at most, so that no pointer table has to be copied to the device, and a captured graph holds its own.
#pragma once

#include <cstdint>

namespace peftkern {

inline constexpr int kAdamWTile = 256;  // elements that a warp updates at a time, 8 per lane
inline constexpr int kLog2Tile = 8;
inline constexpr int kAdamWPiece = 2048;      // that a warp looks at in a row
inline constexpr int kAdamWChunk = 8192;      // of one tensor, updated by a CTA; holds whole blocks
inline constexpr int kAdamWMaxTensors = 472;  // of a launch: as many as its parameters hold
inline constexpr int kAdamWPieces = kAdamWChunk / kAdamWPiece;

inline constexpr int kAdamWPlace = 64;  // elements: the shortest blocks

enum AdamWType : uint8_t { kAdamWFloat = 0, kAdamWHalf = 1, kAdamWBFloat16 = 2, kAdamWUnaligned = 4 };

inline constexpr int64_t kAdamWMaxPart = int64_t{1} << 30;  // elements of an entry, so that 32 bits index it

// A tensor of a launch, or a part of a larger one: 64 bytes, so that what a tile takes from it is in one line of the
// cache of kernel parameters.
struct AdamWEntry {
  void* param;
  const void* grad;
  uint8_t* code[2];  // of the first moment, of the second
  float* absmax[2];
  uint32_t numel;
  uint32_t place;  // of its first element among the random numbers, in units of kAdamWPlace
  uint8_t param_type;
  uint8_t grad_type;  // kAdamWUnaligned: not all to 16 bytes
};
static_assert(sizeof(AdamWEntry) == 64, "a line, and the bits of AdamWTurn");

// How the chunks of a launch's entries can be moved: four bits.
enum AdamWKind : uint32_t {
  kAdamWFetched = 2,  // its tiles are whole and can be moved 16 bytes at a time
  kAdamWPlain = 4,    // they are blocks besides, whose scales can be, too
  kAdamWPartial = 8,  // it is not full, which only plain ones may be
};

// Where to find a chunk's entry, and its kind: what a CTA keeps in shared memory, since reading entries themselves,
// each in a line of its own, would cost it a miss for every turn that it looks up.
struct AdamWIndex {
  uint32_t first_chunk[kAdamWMaxTensors + 1];  // chunks of one entry follow those of the one before
  uint8_t kinds[kAdamWMaxTensors];             // of an entry's last chunk, and times 16 of those before
};
static_assert(sizeof(AdamWIndex) % 4 == 0, "copied by words");

struct AdamWTensors {
  AdamWEntry entries[kAdamWMaxTensors];
  AdamWIndex index;
  int count;
};

// The gradients alone, for the look at them.
struct AdamWGradients {
  const void* grad[kAdamWMaxTensors];
  uint32_t first_chunk[kAdamWMaxTensors + 1];
  uint32_t numel[kAdamWMaxTensors];
  uint8_t grad_type[kAdamWMaxTensors];
  int count;
};

// A number that the host knows, or where the device finds it.
struct AdamWNumber {
  enum Type : int { kHost, kFloat, kDouble, kLong };
  double value;
  const void* pointer;
  Type type;
};

// Worked out in float64, rounded once. See Hyper in block.h.
struct AdamWRates {
  float decay, step_size, inverse_bias2;
};

struct AdamWCall {
  AdamWNumber lr, step;
  AdamWRates rates;  // where the host knows lr and step
  double beta1, beta2, weight_decay;
  double max_norm;  // of all gradients together, where `norm` is given
  float beta1_rounded, one_minus_beta1, beta2_rounded, one_minus_beta2, eps;
  float inverse_eps;            // rounded up
  const float* grad_scale;      // or null
  const float* found_inf;       // or null; not zero: the launch does nothing
  const float* norm;            // or null
  const uint32_t* code_tables;  // as code_tables.h lays them out
  uint64_t seed;
  int log2_blocksize;
  bool maximize;
};

static_assert(sizeof(AdamWTensors) + sizeof(AdamWCall) <= 32764, "kernel parameters");

}  // namespace peftkern
