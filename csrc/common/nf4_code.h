// The NF4 code book (Dettmers et al. 2023, arXiv:2305.14314, appendix E) and its decision thresholds.
#pragma once

#include <cstdint>

#define PEFTKERN_NF4_CODE \
  {-1.0f,                 \
   -0.6961928009986877f,  \
   -0.5250730514526367f,  \
   -0.39491748809814453f, \
   -0.28444138169288635f, \
   -0.18477343022823334f, \
   -0.09105003625154495f, \
   0.0f,                  \
   0.07958029955625534f,  \
   0.16093020141124725f,  \
   0.24611230194568634f,  \
   0.33791524171829224f,  \
   0.44070982933044434f,  \
   0.5626170039176941f,   \
   0.7229568362236023f,   \
   1.0f}

namespace peftkern {

inline constexpr int kNF4Zero = 7;  // the code of 0.0

inline constexpr float kNF4Code[16] = PEFTKERN_NF4_CODE;

#ifdef __CUDACC__
static __constant__ float kNF4CodeDevice[16] = PEFTKERN_NF4_CODE;
#endif

// Midpoint between codes i and i + 1, rounded to float32 as (code[i] + code[i + 1]) / 2. A value on it takes code i.
constexpr float nf4_threshold(int i) {
  return (kNF4Code[i] + kNF4Code[i + 1]) / 2;
}

}  // namespace peftkern
