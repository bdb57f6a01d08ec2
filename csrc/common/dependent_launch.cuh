// Programmatic dependent launch: a kernel starts beside the end of the one before it in the stream. Source: PTX ISA,
// section on griddepcontrol. Before sm_90 a kernel starts when the earlier ones have ended, and these do nothing.
#pragma once

namespace peftkern {

// Waits until the earlier kernels of the stream are done and their writes are visible.
__device__ __forceinline__ void wait_for_earlier_kernels() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel of the stream start its own prologue.
__device__ __forceinline__ void allow_next_kernel() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Brings the line of `pointer` into the L2 cache, where writes of earlier kernels land: right at any time, even before
// they have ended.
__device__ __forceinline__ void prefetch_l2(const void* pointer) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(pointer));
}

}  // namespace peftkern
