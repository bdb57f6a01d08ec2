// Shapes of the NF4 matmul for 17 to 128 tokens and the choice among them: pure functions, tested on the CPU through
// peftkern._host. The kernel (nf4/mid_m.cuh) says what the pieces are.
#pragma once

#include <cstdint>

namespace peftkern {

inline constexpr int kMidDepth = 64;  // of the contraction per step: no finer than a scale
inline constexpr int kMidChunk = 4;   // steps whose weights are loaded together, and stages of the tokens' ring they meet

// What a kernel is compiled for.
struct MidMShape {
  int tokens;   // of a tile
  int rows;     // of a tile at most
  int stages;   // chunks of weights in their ring
  int rounds;   // chunks of tokens in their ring
  int slices;   // warpgroups that share 64 rows, each taking every slices-th step
  int buffers;  // fragments of 32 columns that a consumer hands to the tensor cores before it waits
  int blocks;   // on a multiprocessor

  constexpr bool operator==(const MidMShape& o) const {
    return tokens == o.tokens && rows == o.rows && stages == o.stages && rounds == o.rounds && slices == o.slices &&
           buffers == o.buffers && blocks == o.blocks;
  }
  constexpr int groups() const { return (rows + 63) / 64; }  // of 64 rows
  constexpr int consumers() const { return groups() * slices * 128; }
  constexpr int threads() const { return 128 + consumers(); }
};

}  // namespace peftkern
