// wgmma (sm_90a): D[64, kN] += A[64, 16] B[kN, 16]^T with A in registers (RS) or shared memory (SS), B in shared
// memory, D in fp32 registers. Source: PTX ISA, section "Asynchronous warpgroup level matrix instructions".
#pragma once

#include <cstdint>

namespace peftkern {

__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Until at most kPending committed groups of this warpgroup are in flight.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Descriptor of a K-major operand in rows of 128 bytes under the 128-byte swizzle, from a 1024-byte aligned tile on;
// 16 columns further along K are 32 bytes further.
__device__ __forceinline__ uint64_t wgmma_descriptor(uint32_t shared_address) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62, kEightRows = uint64_t{1024 >> 4} << 32, kUnused = 1 << 16;
  return kSwizzle128 | kEightRows | kUnused | ((shared_address & 0x3ffff) >> 4);
}

// Descriptor of an MN-major operand: boxes of kWidth columns along M or N (64, 32 or 16: rows of 128, 64 or 32 bytes,
// swizzled over that many bytes), one row for each k, `box_stride` bytes from one box to the next kWidth columns. 16
// further along K are 16 rows further.
template <int kWidth>
__device__ __forceinline__ uint64_t wgmma_descriptor_mn(uint32_t shared_address, uint32_t box_stride) {
  static_assert(kWidth == 64 || kWidth == 32 || kWidth == 16);
  constexpr uint64_t kSwizzle = uint64_t{kWidth == 64 ? 1 : kWidth == 32 ? 2 : 3} << 62;
  constexpr uint64_t kEightRows = uint64_t{(8 * kWidth * 2) >> 4} << 32;
  return kSwizzle | kEightRows | uint64_t{box_stride >> 4} << 16 | ((shared_address & 0x3ffff) >> 4);
}

#define PEFTKERN_WGMMA_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define PEFTKERN_WGMMA_ASM(n, type, registers, a_and_b, flag, transposed, ...)                        \
  asm volatile("{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, " flag                             \
               ", 0;\n"                                                                               \
               "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" registers a_and_b \
               ", accumulate, 1, 1, " transposed ";\n}\n"                                             \
               : __VA_ARGS__                                                                          \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate), "n"(int{kTransposedB}))
#define PEFTKERN_WGMMA_RS(n, registers, a_and_b, flag, transposed, ...)               \
  if constexpr (kBFloat16) {                                                          \
    PEFTKERN_WGMMA_ASM(n, "bf16", registers, a_and_b, flag, transposed, __VA_ARGS__); \
  } else {                                                                            \
    PEFTKERN_WGMMA_ASM(n, "f16", registers, a_and_b, flag, transposed, __VA_ARGS__);  \
  }

// a: the fragment of mma.m16n8k16 for the warp's 16 rows. d[4 j + i]: columns 8 j + 2 (lane % 4) + (i & 1), row
// lane / 4 + 8 (i >> 1) of the warp's 16. `accumulate` 0 overwrites d. kTransposedB: B is MN-major.
template <int kN>
struct WgmmaRS;

template <>
struct WgmmaRS<16> {
  template <bool kBFloat16, bool kTransposedB = false>
  static __device__ __forceinline__ void mma(float (&d)[8], const uint32_t (&a)[4], uint64_t b, int accumulate) {
    PEFTKERN_WGMMA_RS(16, "%0, %1, %2, %3, %4, %5, %6, %7}, ", "{%8, %9, %10, %11}, %12", "%13", "%14",
                      PEFTKERN_WGMMA_D4(0), PEFTKERN_WGMMA_D4(4));
  }
};

template <>
struct WgmmaRS<32> {
  template <bool kBFloat16, bool kTransposedB = false>
  static __device__ __forceinline__ void mma(float (&d)[16], const uint32_t (&a)[4], uint64_t b, int accumulate) {
    PEFTKERN_WGMMA_RS(32, "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, ",
                      "{%16, %17, %18, %19}, %20", "%21", "%22", PEFTKERN_WGMMA_D4(0), PEFTKERN_WGMMA_D4(4),
                      PEFTKERN_WGMMA_D4(8), PEFTKERN_WGMMA_D4(12));
  }
};

template <>
struct WgmmaRS<64> {
  template <bool kBFloat16, bool kTransposedB = false>
  static __device__ __forceinline__ void mma(float (&d)[32], const uint32_t (&a)[4], uint64_t b, int accumulate) {
    PEFTKERN_WGMMA_RS(64,
                      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, ",
                      "{%32, %33, %34, %35}, %36", "%37", "%38", PEFTKERN_WGMMA_D4(0), PEFTKERN_WGMMA_D4(4),
                      PEFTKERN_WGMMA_D4(8), PEFTKERN_WGMMA_D4(12), PEFTKERN_WGMMA_D4(16), PEFTKERN_WGMMA_D4(20),
                      PEFTKERN_WGMMA_D4(24), PEFTKERN_WGMMA_D4(28));
  }
};

template <>
struct WgmmaRS<128> {
  template <bool kBFloat16, bool kTransposedB = false>
  static __device__ __forceinline__ void mma(float (&d)[64], const uint32_t (&a)[4], uint64_t b, int accumulate) {
    PEFTKERN_WGMMA_RS(128,
                      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
                      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
                      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, ",
                      "{%64, %65, %66, %67}, %68", "%69", "%70", PEFTKERN_WGMMA_D4(0), PEFTKERN_WGMMA_D4(4),
                      PEFTKERN_WGMMA_D4(8), PEFTKERN_WGMMA_D4(12), PEFTKERN_WGMMA_D4(16), PEFTKERN_WGMMA_D4(20),
                      PEFTKERN_WGMMA_D4(24), PEFTKERN_WGMMA_D4(28), PEFTKERN_WGMMA_D4(32), PEFTKERN_WGMMA_D4(36),
                      PEFTKERN_WGMMA_D4(40), PEFTKERN_WGMMA_D4(44), PEFTKERN_WGMMA_D4(48), PEFTKERN_WGMMA_D4(52),
                      PEFTKERN_WGMMA_D4(56), PEFTKERN_WGMMA_D4(60));
  }
};

template <>
struct WgmmaRS<256> {
  template <bool kBFloat16, bool kTransposedB = false>
  static __device__ __forceinline__ void mma(float (&d)[128], const uint32_t (&a)[4], uint64_t b, int accumulate) {
    PEFTKERN_WGMMA_RS(
        256,
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
        "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
        "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
        "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
        "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, ",
        "{%128, %129, %130, %131}, %132", "%133", "%134", PEFTKERN_WGMMA_D4(0), PEFTKERN_WGMMA_D4(4),
        PEFTKERN_WGMMA_D4(8), PEFTKERN_WGMMA_D4(12), PEFTKERN_WGMMA_D4(16), PEFTKERN_WGMMA_D4(20),
        PEFTKERN_WGMMA_D4(24), PEFTKERN_WGMMA_D4(28), PEFTKERN_WGMMA_D4(32), PEFTKERN_WGMMA_D4(36),
        PEFTKERN_WGMMA_D4(40), PEFTKERN_WGMMA_D4(44), PEFTKERN_WGMMA_D4(48), PEFTKERN_WGMMA_D4(52),
        PEFTKERN_WGMMA_D4(56), PEFTKERN_WGMMA_D4(60), PEFTKERN_WGMMA_D4(64), PEFTKERN_WGMMA_D4(68),
        PEFTKERN_WGMMA_D4(72), PEFTKERN_WGMMA_D4(76), PEFTKERN_WGMMA_D4(80), PEFTKERN_WGMMA_D4(84),
        PEFTKERN_WGMMA_D4(88), PEFTKERN_WGMMA_D4(92), PEFTKERN_WGMMA_D4(96), PEFTKERN_WGMMA_D4(100),
        PEFTKERN_WGMMA_D4(104), PEFTKERN_WGMMA_D4(108), PEFTKERN_WGMMA_D4(112), PEFTKERN_WGMMA_D4(116),
        PEFTKERN_WGMMA_D4(120), PEFTKERN_WGMMA_D4(124));
  }
};

// The same with A in shared memory. kTransposedA, kTransposedB: that operand is MN-major. d as above.
template <int kN>
struct WgmmaSS;

#define PEFTKERN_WGMMA_LIST4 "%0, %1, %2, %3"
#define PEFTKERN_WGMMA_LIST8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define PEFTKERN_WGMMA_LIST16 \
  PEFTKERN_WGMMA_LIST8        \
  ", %8, %9, %10, %11, %12, %13, %14, %15"
#define PEFTKERN_WGMMA_LIST32 \
  PEFTKERN_WGMMA_LIST16       \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define PEFTKERN_WGMMA_LIST64                                                        \
  PEFTKERN_WGMMA_LIST32                                                              \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define PEFTKERN_WGMMA_LIST128                                                                   \
  PEFTKERN_WGMMA_LIST64                                                                          \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"             \
  ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"             \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
  ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define PEFTKERN_WGMMA_D8(i) PEFTKERN_WGMMA_D4(i), PEFTKERN_WGMMA_D4(i + 4)
#define PEFTKERN_WGMMA_D16(i) PEFTKERN_WGMMA_D8(i), PEFTKERN_WGMMA_D8(i + 8)
#define PEFTKERN_WGMMA_D32(i) PEFTKERN_WGMMA_D16(i), PEFTKERN_WGMMA_D16(i + 16)
#define PEFTKERN_WGMMA_D64(i) PEFTKERN_WGMMA_D32(i), PEFTKERN_WGMMA_D32(i + 32)
#define PEFTKERN_WGMMA_D128(i) PEFTKERN_WGMMA_D64(i), PEFTKERN_WGMMA_D64(i + 64)
#define PEFTKERN_WGMMA_SS_ASM(n, type, registers, a_, b_, flag, transposed)                                        \
  asm volatile("{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, " flag                                          \
               ", 0;\n"                                                                                            \
               "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" PEFTKERN_WGMMA_LIST##registers \
               "}, " a_ ", " b_ ", accumulate, 1, 1, " transposed ";\n}\n"                                         \
               : PEFTKERN_WGMMA_D##registers(0)                                                                    \
               : "l"(a), "l"(b), "r"(accumulate), "n"(int{kTransposedA}), "n"(int{kTransposedB}))
#define PEFTKERN_WGMMA_SS(n, registers, a_, b_, flag, transposed)                                               \
  template <>                                                                                                   \
  struct WgmmaSS<n> {                                                                                           \
    template <bool kBFloat16, bool kTransposedA, bool kTransposedB>                                             \
    static __device__ __forceinline__ void mma(float (&d)[registers], uint64_t a, uint64_t b, int accumulate) { \
      if constexpr (kBFloat16) {                                                                                \
        PEFTKERN_WGMMA_SS_ASM(n, "bf16", registers, a_, b_, flag, transposed);                                  \
      } else {                                                                                                  \
        PEFTKERN_WGMMA_SS_ASM(n, "f16", registers, a_, b_, flag, transposed);                                   \
      }                                                                                                         \
    }                                                                                                           \
  };
PEFTKERN_WGMMA_SS(8, 4, "%4", "%5", "%6", "%7, %8")
PEFTKERN_WGMMA_SS(16, 8, "%8", "%9", "%10", "%11, %12")
PEFTKERN_WGMMA_SS(32, 16, "%16", "%17", "%18", "%19, %20")
PEFTKERN_WGMMA_SS(64, 32, "%32", "%33", "%34", "%35, %36")
PEFTKERN_WGMMA_SS(128, 64, "%64", "%65", "%66", "%67, %68")
PEFTKERN_WGMMA_SS(256, 128, "%128", "%129", "%130", "%131, %132")

#undef PEFTKERN_WGMMA_SS
#undef PEFTKERN_WGMMA_SS_ASM
#undef PEFTKERN_WGMMA_D128
#undef PEFTKERN_WGMMA_D64
#undef PEFTKERN_WGMMA_D32
#undef PEFTKERN_WGMMA_D16
#undef PEFTKERN_WGMMA_D8
#undef PEFTKERN_WGMMA_LIST128
#undef PEFTKERN_WGMMA_LIST64
#undef PEFTKERN_WGMMA_LIST32
#undef PEFTKERN_WGMMA_LIST16
#undef PEFTKERN_WGMMA_LIST8
#undef PEFTKERN_WGMMA_LIST4
#undef PEFTKERN_WGMMA_RS
#undef PEFTKERN_WGMMA_ASM
#undef PEFTKERN_WGMMA_D4

}  // namespace peftkern
