// lora_gemm's main tiles: 128 tokens x 256 outs.
#pragma once

#include <type_traits>

#include "common/numbers.cuh"
#include "gemm/gemm_dropout.cuh"
#include "gemm/gemm_warpgroup.cuh"

namespace peftkern {

template <typename T, int kR, bool kDx, bool kDropout, int kLayers>
class GemmMainTiles {
  using Skinny = GemmSkinny<kR>;
  static constexpr bool kBFloat16 = std::is_same<T, __nv_bfloat16>::value;
  static constexpr bool kMasked = kDropout && kDx;
  static constexpr int kParts = kGemmOuts / 64;                // that a tile's outs are written in
  static constexpr int kX = 64 * 128, kW = kGemmTokens * 128;  // a warpgroup's rows of x in a stage; where W begins

 public:
  // Rounded outs that wait to be written.
  struct Outs {
    uint32_t packed[kGemmOuts / 4];
    int token0, out0, layer;
  };

  __device__ __forceinline__ GemmMainTiles(GemmWarpgroup& w, const GemmProblem<kLayers>& p,
                                           const GemmMaps<kLayers>& maps)
      : w_(w), p_(p), maps_(maps) {}

  // The outs of the tile before go out beside the first steps.
  // First steps are apart from the others everywhere: that they overwrite the sums must be plain to the compiler, or it
  // keeps registers for sums from job to job.
  template <bool kPending>
  __device__ __forceinline__ void tile(const GemmJob& job, Outs& outs) {
    const int token0 = job.tile * kGemmTokens + w_.group * 64, out0 = job.other * kGemmOuts;
    const int own = kLayers == 1 || kDx ? 0 : job.layer;  // y's layer
    float d[kGemmOuts / 2];
    int previous = -1, step = 1;
    if (kPending && p_.steps >= kParts) {
      main_step(d, previous, 0);
      write(outs, 0);
#pragma unroll
      for (; step < kParts; ++step) {
        main_step(d, previous, 1);
        write(outs, step);
      }
    } else {
      if constexpr (kPending) write(outs);
      main_step(d, previous, 0);
    }
    Kept kept;
    if constexpr (kMasked) make_kept(d, previous, step, token0, out0, kept);
#pragma unroll 1
    for (; step < p_.steps; ++step) main_step(d, previous, 1);
    if constexpr (kMasked) {
      extend_masked(d, previous, kept, outs);
    } else {
      extend(d, previous);
      const T* bias = static_cast<const T*>(p_.layers[own].bias);
      if (kDx || bias == nullptr) {
        w_.finish(d, previous);
        pack(d, outs);
      } else {
        uint32_t pairs[kGemmOuts / 8];
#pragma unroll
        for (int i = 0; i < kGemmOuts / 8; ++i) {
          const int column = out0 + 8 * i + 2 * (w_.lane % 4);
          pairs[i] = column < p_.layers[own].outs ? *reinterpret_cast<const uint32_t*>(bias + column) : 0;
        }
        w_.finish(d, previous);
#pragma unroll
        for (int i = 0; i < kGemmOuts / 4; ++i) {
          const T* pair = reinterpret_cast<const T*>(&pairs[i / 2]);
          outs.packed[i] = pack_pair<T>(d[2 * i] + to_float(pair[0]), d[2 * i + 1] + to_float(pair[1]));
        }
      }
    }
    outs.token0 = token0;
    outs.out0 = out0;
    outs.layer = own;
  }

  __device__ __forceinline__ void write(const Outs& outs) {
#pragma unroll
    for (int part = 0; part < kParts; ++part) write(outs, part);
  }

  // After the last tile.
  __device__ __forceinline__ void finish() {
    if (w_.leader) tensor_store_finish();
  }

 private:
  __device__ __forceinline__ void main_step(float (&d)[kGemmOuts / 2], int& previous, int accumulate) {
    const uint32_t stage = w_.open();
    const uint64_t x = wgmma_descriptor(stage + w_.group * kX);
    const uint64_t w = kDx ? wgmma_descriptor_mn<64>(stage + kW, 8192) : wgmma_descriptor(stage + kW);
    wgmma_fence();
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      WgmmaSS<kGemmOuts>::template mma<kBFloat16, false, kDx>(d, x + 2 * q, w + (kDx ? 128 : 2) * q,
                                                              q == 0 ? accumulate : 1);
    }
    w_.close(previous);
  }

  // 64 of the packed outs to rows of Y, through shared memory under the 128-byte swizzle.
  __device__ __forceinline__ void write(const Outs& outs, int part) {
    const int out = outs.out0 + part * 64;
    if (out >= p_.layers[outs.layer].outs || outs.token0 >= p_.tokens) return;
    // stmatrix: lane l addresses row l % 8 of an 8x8 block: rows 0-7 and 8-15 of the warp, then the next 8 columns.
    const uint32_t base = shared_address(w_.s.out[w_.group][part % 2]) + (w_.warp * 16 + w_.lane % 16) * 128;
    if (w_.leader) tensor_store_wait<1>();
    w_.synchronize();  // the buffer is free
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
      const uint32_t* words = outs.packed + part * 16 + 2 * j;
      const uint32_t place = base + ((j + w_.lane / 16) ^ (w_.lane % 8)) * 16;
      asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(place), "r"(words[0]),
                   "r"(words[1]), "r"(words[2]), "r"(words[3])
                   : "memory");
    }
    shared_writes_fence();
    w_.synchronize();
    if (!w_.leader) return;
    if (kDx && p_.add) {
      tensor_add(&maps_.y[0], w_.s.out[w_.group][part % 2], out, outs.token0);
    } else {
      tensor_store(&maps_.y[outs.layer], w_.s.out[w_.group][part % 2], out, outs.token0);
    }
  }

  __device__ __forceinline__ void pack(const float (&d)[kGemmOuts / 2], Outs& outs) {
#pragma unroll
    for (int i = 0; i < kGemmOuts / 4; ++i) outs.packed[i] = pack_pair<T>(d[2 * i], d[2 * i + 1]);
  }

  template <int kProducts>
  __device__ __forceinline__ void extend_step(float (&d)[kGemmOuts / 2], int& previous) {
    const uint32_t stage = w_.open();
    const uint64_t x = wgmma_descriptor(stage + w_.group * kX), w = wgmma_descriptor(stage + kW);
    wgmma_fence();
#pragma unroll
    for (int q = 0; q < kProducts; ++q) {
      WgmmaSS<kGemmOuts>::template mma<kBFloat16, false, false>(d, x + 2 * q, w + 2 * q, 1);
    }
    w_.close(previous);
  }

  // As often for each layer, and one product or all of a step: with counts that it does not know to be the same in all
  // warps, the compiler has products wait for each other.
  __device__ __forceinline__ void extend(float (&d)[kGemmOuts / 2], int& previous) {
    if (p_.extension == 0) return;
    if (kLayers > 1 && p_.extension == 1) return extend_step<1>(d, previous);
    const int steps = kLayers == 1 ? Skinny::kExtensionSteps : (p_.extension + 3) / 4;
#pragma unroll 1
    for (int step = 0; step < steps; ++step) extend_step<Skinny::kExtensionProducts>(d, previous);
  }

  // 64 outs of the extension in sums of their own.
  __device__ __forceinline__ void extend_part(float (&e)[32], const uint32_t (&stages)[Skinny::kExtensionSteps],
                                              int part) {
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < Skinny::kExtensionSteps; ++step) {
      const uint64_t x = wgmma_descriptor(stages[step] + w_.group * kX);
      const uint64_t w = wgmma_descriptor(stages[step] + kW + part * 64 * 128);
#pragma unroll
      for (int q = 0; q < Skinny::kExtensionProducts; ++q) {
        WgmmaSS<64>::template mma<kBFloat16, false, false>(e, x + 2 * q, w + 2 * q, step + q > 0);
      }
    }
    wgmma_commit();
  }

  // What a thread's sums are kept of. Bit 16 (w / 2) + 8 b + 4 (w % 2) + n of bits[row][half] is out 128 half + 32 w +
  // 8 n + 2 (lane % 4) + b, in either of its rows.
  struct Kept {
    uint32_t bits[2][2];
  };

  // Makes the mask beside a tile's steps. Four neighbouring lanes share their rows: of each 128 outs a lane makes two
  // calls of 16, one beside the other, and gets its outs' bits from the others in two exchanges.
  __device__ __forceinline__ void make_kept(float (&d)[kGemmOuts / 2], int& previous, int& step, int token0, int out0,
                                            Kept& kept) {
    const int q = w_.lane % 4, token = token0 + w_.warp * 16 + w_.lane / 4;
    const DropoutCalls calls(p_.seed);
    const uint32_t bytes = q % 2 ? 0x3276u : 0x5410u;  // own low half and the neighbour's, or both high ones
    const uint32_t turn = q / 2 ? 28 : 4, mine = q / 2 ? 0xf0f0f0f0u : 0x0f0f0f0fu;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t words[2] = {0, 0};  // of either row
      const int call = out0 / kDropoutColumns + half * 8 + (q % 2 * 2 + q / 2) * 2;
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        if (step < p_.steps) main_step(d, previous, 1);
        ++step;
        const DropoutColumn column = calls.column(call + c);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          uint32_t signs[8];
          calls.signs(calls.row(token + 8 * i), column, p_.threshold, signs);
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const int bit = j % 2 * 4 + 2 * c + j / 2;
            words[i] |= __byte_perm(signs[2 * j], signs[2 * j + 1], 0x7531) >> (7 - bit) & 0x01010101u << bit;
          }
        }
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t neighbour = __shfl_xor_sync(0xffffffffu, words[i], 1);
        const uint32_t pair = __byte_perm(words[i], neighbour, bytes);
        const uint32_t other = __shfl_xor_sync(0xffffffffu, pair, 2);
        kept.bits[i][half] = (pair & mine) | (__funnelshift_l(other, other, turn) & ~mine);
      }
    }
  }

  // The extension under a mask: parts of it, of which the kept ones are added, one multiplied beside the other's
  // adding.
  __device__ __forceinline__ void extend_masked(float (&d)[kGemmOuts / 2], int previous, const Kept& kept, Outs& outs) {
    constexpr bool kAllStages = Skinny::kExtensionSteps == kGemmStages;  // needs the one of the last step, too
    if constexpr (kAllStages) {
      w_.settle(d);
      w_.release(previous);
    }
    uint32_t stages[Skinny::kExtensionSteps];
    const int first = w_.at.stage;
#pragma unroll
    for (int step = 0; step < Skinny::kExtensionSteps; ++step) {
      stages[step] = w_.open();
      w_.at.advance();
    }
    constexpr int kAhead = Skinny::kExtensionSteps == 1 ? 2 : 1;  // parts in flight: registers do not suffice for more
    float e[kAhead][32];
#pragma unroll
    for (int part = 0; part < kAhead; ++part) extend_part(e[part], stages, part);
    w_.template settle<kAhead - 1>(d);
    if constexpr (!kAllStages) w_.release(previous);
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      float (&sums)[32] = e[part % kAhead];
      if (part + 1 < kParts) {
        w_.template settle<kAhead - 1>(sums);
      } else {
        w_.template settle<0>(sums);
      }
      // In the bits' order, which lets them become predicates many at a time.
#pragma unroll
      for (int row = 0; row < 2; ++row) {
#pragma unroll
        for (int b = 0; b < 2; ++b) {
#pragma unroll
          for (int k = 0; k < 8; ++k) {
            const int i = 4 * k + 2 * row + b;
            if (kept.bits[row][part / 2] & 1u << (16 * (part % 2) + 8 * b + k)) d[part * 32 + i] += sums[i];
          }
        }
      }
#pragma unroll
      for (int i = 0; i < 32; i += 2) {
        outs.packed[part * 16 + i / 2] = pack_pair<T>(d[part * 32 + i], d[part * 32 + i + 1]);
      }
      if (part + kAhead < kParts) extend_part(sums, stages, part + kAhead);
    }
#pragma unroll
    for (int step = 0; step < Skinny::kExtensionSteps; ++step) w_.release((first + step) % kGemmStages);
  }

  GemmWarpgroup& w_;
  const GemmProblem<kLayers>& p_;
  const GemmMaps<kLayers>& maps_;
};

}  // namespace peftkern
