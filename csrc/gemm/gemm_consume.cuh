// lora_gemm's consumers: two warpgroups that multiply what the producer loads, and write the results.
#pragma once

#include "gemm/gemm_fused.cuh"
#include "gemm/gemm_main.cuh"
#include "gemm/gemm_skinny.cuh"

namespace peftkern {

template <typename T, int kR, bool kDx, bool kDropout>
__device__ __forceinline__ void gemm_consume(GemmShared& s, const GemmProblem& p, const GemmMaps& maps) {
  using Main = GemmMainTiles<T, kR, kDx, kDropout>;
  GemmWarpgroup w(s);
  Main main(w, p, maps);
  GemmSkinnyJobs<T, kR, kDx, kDropout> skinny(w, p);
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
        if constexpr (kDx && GemmSkinny<kR>::kFuses) {
          fused = p.schedule.fused;
          if (fused) gemm_fused_project<T, kR>(w, p, job);
        }
        if (!fused) skinny.project(job.tile);
      } else if (kDx && GemmSkinny<kR>::kFuses && job.kind == kGemmSum) {
        if constexpr (kDx && GemmSkinny<kR>::kFuses) skinny.sum(job.tile);
      } else {
        skinny.gradient(job.kind == kGemmGradientA, job.tile, job.other);
      }
      job = w.next();
    }
  }
  main.finish();
}

}  // namespace peftkern
