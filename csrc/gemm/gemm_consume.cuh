// lora_gemm's consumers: two warpgroups that multiply what the producer loads, and write the results.
#pragma once

#include "gemm/gemm_fused.cuh"
#include "gemm/gemm_main.cuh"
#include "gemm/gemm_skinny.cuh"

namespace peftkern {

template <typename T, int kR, bool kDx, bool kDropout, int kLayers>
__device__ __forceinline__ void gemm_consume(GemmShared& s, const GemmProblem<kLayers>& p,
                                             const GemmMaps<kLayers>& maps) {
  using Main = GemmMainTiles<T, kR, kDx, kDropout, kLayers>;
  constexpr bool kMayFuse = kDx && gemm_may_fuse(kR, kLayers);
  GemmWarpgroup w(s);
  Main main(w, p, maps);
  GemmSkinnyJobs<T, kR, kDx, kDropout, kLayers> skinny(w, p);
  GemmJob job = w.next();
  while (job.kind != kGemmFinish) {
    if (job.kind == kGemmMain) {
      typename Main::Outs outs;
      main.template tile<false>(job, outs);
      job = w.next();
      while (job.kind == kGemmMain) {
        main.template tile<true>(job, outs);
        job = w.next();
      }
      main.write(outs);
    } else {
      if (job.kind == kGemmProject) {
        bool fused = false;
        if constexpr (kMayFuse) {
          fused = p.schedule.fused;
          if (fused) gemm_fused_project<T>(w, p, job);
        }
        if (!fused) skinny.project(job);
      } else if (kMayFuse && job.kind == kGemmSum) {
        if constexpr (kMayFuse) gemm_fused_sum<T>(w, p, job);
      } else {
        skinny.gradient(job);
      }
      job = w.next();
    }
  }
  main.finish();
}

}  // namespace peftkern
