// 8-bit AdamW on the CPU: the blocks of all tensors of a call in one parallel loop. Roundings are those of the
// reference one by one (the build uses -ffp-contract=off), so codes, scales and parameters are bitwise the same.
// Bytes: 16.06 a parameter in float32, 10.06 in bfloat16; the check for non-finite gradients reads them once more.
#include <atomic>
#include <cmath>
#include <vector>

#include "adamw8bit/avx2.h"
#include "adamw8bit/avx512.h"
#include "adamw8bit/block.h"
#include "adamw8bit/code_book.h"
#include "adamw8bit/places.h"
#include "adamw8bit/segments.h"
#include "common/philox.h"
#include "common/stable.h"

namespace peftkern {
namespace {

constexpr int64_t kScanBlock = 1 << 16;
constexpr int64_t kNormChunk = 8192, kNormPiece = 2048, kNormColumns = 256, kNormSums = 512;
constexpr float kGradientLimit = 0x1p63f;  // from here on squares may overflow: treated as infinite

// The largest magnitude as bits, which order as the magnitudes do, with NaN above infinity. Four streams at a time keep
// more of memory busy than one.
template <typename Bits>
inline Bits largest_bits(const void* values, int64_t offset, int64_t n) {
  constexpr Bits kMagnitude = static_cast<Bits>(~Bits{0}) >> 1;
  const Bits* bits = static_cast<const Bits*>(values) + offset;
  const int64_t part = n / 4;
  Bits largest = 0, second = 0, third = 0, fourth = 0;
  for (int64_t i = 0; i < part; ++i) {
    largest = std::max<Bits>(largest, bits[i] & kMagnitude);
    second = std::max<Bits>(second, bits[i + part] & kMagnitude);
    third = std::max<Bits>(third, bits[i + 2 * part] & kMagnitude);
    fourth = std::max<Bits>(fourth, bits[i + 3 * part] & kMagnitude);
  }
  for (int64_t i = 4 * part; i < n; ++i) largest = std::max<Bits>(largest, bits[i] & kMagnitude);
  return std::max(std::max(largest, second), std::max(third, fourth));
}

PEFTKERN_MULTIVERSION uint32_t largest_bits32(const void* values, int64_t offset, int64_t n) {
  return largest_bits<uint32_t>(values, offset, n);
}

PEFTKERN_MULTIVERSION uint16_t largest_bits16(const void* values, int64_t offset, int64_t n) {
  return largest_bits<uint16_t>(values, offset, n);
}

float largest_magnitude(const Block& block) {
  const Segment& s = *block.segment;
  const int64_t offset = block.offset, n = block.n;
  switch (s.grad_type) {
    case ScalarType::Float:
      return bits_float(largest_bits32(s.grad, offset, n));
    case ScalarType::Half:
      return to_float(Half(largest_bits16(s.grad, offset, n), Half::from_bits()));
    default:
      return to_float(BFloat16(largest_bits16(s.grad, offset, n), BFloat16::from_bits()));
  }
}

bool any_overflow(const Segments& tensors, float scale) {
  Segments segments(tensors.list.size(), kScanBlock);
  for (const Segment& s : tensors.list) segments.add(s);
  std::atomic<bool> found{false};
  segments.for_each_block([&](const Block& block, const Block&) {
    const float largest = largest_magnitude(block) * std::fabs(scale);
    if (!(largest < kGradientLimit)) found.store(true, std::memory_order_relaxed);
  });
  return found.load();
}

// The sum of squares of a piece, in the order that reference.py's gradient_norm defines.
PEFTKERN_MULTIVERSION float piece_square(const float* gradients, float scale) {
  alignas(64) float sums[kNormColumns] = {};
  for (int64_t row = 0; row < kNormPiece / kNormColumns; ++row) {
    for (int64_t i = 0; i < kNormColumns; ++i) {
      const float g = gradients[row * kNormColumns + i] * scale;
      sums[i] += g * g;
    }
  }
  for (int64_t n = kNormColumns / 2; n >= 1; n /= 2) {
    for (int64_t i = 0; i < n; ++i) sums[i] = sums[2 * i] + sums[2 * i + 1];
  }
  return sums[0];
}

bool is_float(ScalarType t) {
  return t == ScalarType::Float || t == ScalarType::Half || t == ScalarType::BFloat16;
}

double scalar(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.numel() == 1 && t.is_cpu(), "adamw8bit: ", name, " must hold one element on the CPU");
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return *data<float>(t);
    case ScalarType::Double:
      return *data<double>(t);
    case ScalarType::Long:
      return static_cast<double>(*data<int64_t>(t));
    default:
      STD_TORCH_CHECK(false, "adamw8bit: ", name, " must be float32, float64 or int64");
  }
  return 0.0;
}

float gradient_scale(const std::optional<Tensor>& grad_scale, bool maximize) {
  const float inverse = grad_scale.has_value() ? 1.0f / static_cast<float>(scalar(*grad_scale, "grad_scale")) : 1.0f;
  return maximize ? -inverse : inverse;
}

Segment gradient_segment(const Tensor& grad) {
  Segment s;
  s.numel = grad.numel();
  s.grad_type = grad.scalar_type();
  STD_TORCH_CHECK(is_float(s.grad_type) && grad.is_contiguous(),
                  "adamw8bit: grads must be contiguous float32, float16 or bfloat16 tensors");
  s.grad = grad.const_data_ptr();
  return s;
}

// kSigned: the first moment, otherwise the second.
template <bool kSigned>
void encode(int64_t n, const float* value, float largest, const CodeBook& book, uint8_t* code) {
  const float factor = inverse_absmax(largest);
  const uint32_t* words = book.table->words();
  if (words == nullptr) {
    for (int64_t i = 0; i < n; ++i) code[i] = book.table->search(value[i] * factor);
    return;
  }
  int64_t done = 0;
#ifdef PEFTKERN_ADAMW_AVX512
  if (avx512::supported()) {
    done = n / 16 * 16;
    avx512::encode<kSigned>(done, value, factor, words, code);
  }
#endif
  portable::encode(n - done, value + done, factor, words, code + done);
}

void widen(const float* from, int64_t n, float* to) {
  std::copy(from, from + n, to);
}
PEFTKERN_MULTIVERSION void widen(const BFloat16* from, int64_t n, float* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = to_float(from[i]);
}
PEFTKERN_MULTIVERSION void narrow(const float* from, int64_t n, BFloat16* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = from_float<BFloat16>(from[i]);
}
PEFTKERN_MULTIVERSION void widen(const Half* from, int64_t n, float* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = to_float(from[i]);
}
PEFTKERN_MULTIVERSION void narrow(const float* from, int64_t n, Half* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = from_float<Half>(from[i]);
}

// The norm of all gradients times `scale`.
float gradient_norm(const Segments& tensors, float scale) {
  Segments chunks(tensors.list.size(), kNormChunk);
  for (const Segment& s : tensors.list) chunks.add(s);
  std::vector<float> pieces(static_cast<size_t>(chunks.blocks * (kNormChunk / kNormPiece)));
  chunks.for_each_block([&](const Block& block, const Block&) {
    const Segment& s = *block.segment;
    float* sums = pieces.data() + (s.first_block + block.index) * (kNormChunk / kNormPiece);
    alignas(64) float wide[kNormPiece];
    for (int64_t start = 0; start < block.n; start += kNormPiece) {
      const int64_t n = std::min(kNormPiece, block.n - start);
      PEFTKERN_DISPATCH_FLOAT("adamw8bit_found_inf_", s.grad_type, G,
                              { widen(static_cast<const G*>(s.grad) + block.offset + start, n, wide); });
      std::fill(wide + n, wide + kNormPiece, 0.0f);
      sums[start / kNormPiece] = piece_square(wide, scale);
    }
  });
  double sums[kNormSums] = {};
  for (size_t i = 0; i < pieces.size(); ++i) sums[i % kNormSums] += static_cast<double>(pieces[i]);
  for (int64_t n = kNormSums / 2; n >= 1; n /= 2) {
    for (int64_t i = 0; i < n; ++i) sums[i] = sums[2 * i] + sums[2 * i + 1];
  }
  return static_cast<float>(std::sqrt(sums[0]));
}

// Stochastic rounding of a tensor: see reference.py's round_stochastically.
struct Random {
  uint64_t seed;
  uint32_t step;
};

BFloat16 round_stochastically(float value, uint32_t random) {
  const uint32_t bits = float_bits(value);
  if ((bits & 0x7f800000u) == 0x7f800000u) return from_float<BFloat16>(value);
  return BFloat16(static_cast<uint16_t>((bits + random) >> 16), BFloat16::from_bits());
}

// Elements [offset, offset + n) of a tensor whose first is at `place`; offset is a multiple of 8.
void narrow_stochastically(const float* from, int64_t offset, int64_t n, int64_t place, const Random& random,
                           BFloat16* tensor) {
  BFloat16* to = tensor + offset;
  const int64_t first = (place * kAdamWPlace + offset) / 8;
  for (int64_t start = 0; start < n; start += 8) {
    const uint64_t eight = static_cast<uint64_t>(first + start / 8);
    const PhiloxWords w = philox4x32({static_cast<uint32_t>(eight), static_cast<uint32_t>(eight >> 32), 0, random.step},
                                     static_cast<uint32_t>(random.seed), static_cast<uint32_t>(random.seed >> 32));
    const uint32_t words[4] = {w.w0, w.w1, w.w2, w.w3};
    for (int64_t i = start; i < std::min(n, start + 8); ++i) {
      to[i] = round_stochastically(from[i], words[(i - start) / 2] >> (16 * (i % 2)) & 0xffff);
    }
  }
}

struct Scratch {
  alignas(64) float m[kMaxBlocksize], v[kMaxBlocksize], param[kMaxBlocksize], grad[kMaxBlocksize];
};

struct CodeBooks {
  CodeBook m, v;

  // Whether avx2.h's loops do what is a multiple of 32 in a block.
  bool by_avx2() const {
#ifdef PEFTKERN_ADAMW_AVX512
    return avx2::supported() && !avx512::supported() && m.table->words() != nullptr && v.table->words() != nullptr;
#else
    return false;
#endif
  }
};

// The new moments and their largest magnitudes, and the parameters but for those that avx2::finish updates: the first
// ones, whose number is returned.
template <typename P, typename G>
int64_t update(int64_t n, P* param, const G* grad, Moments old, const Hyper& h, bool by_avx2, Scratch& scratch,
               float* largest) {
  int64_t done = 0;
  largest[0] = largest[1] = 0.0f;
#ifdef PEFTKERN_ADAMW_AVX512
  if (avx512::supported()) {
    done = n / 16 * 16;
    avx512::update(done, param, grad, old, h, scratch.m, scratch.v, largest);
  } else if (by_avx2) {
    done = n / 32 * 32;
    avx2::update_moments(done, grad, old, h, scratch.m, scratch.v, largest);
  }
#endif
  const int64_t left = by_avx2 ? done : 0;
  if (done == n) return left;
  float* wide_param;
  const float* wide_grad;
  if constexpr (std::is_same_v<P, float>) {
    wide_param = param + done;
  } else {
    widen(param + done, n - done, wide_param = scratch.param);
  }
  if constexpr (std::is_same_v<G, float>) {
    wide_grad = grad + done;
  } else {
    widen(grad + done, n - done, scratch.grad);
    wide_grad = scratch.grad;
  }
  float rest[2];
  old.m_code += done;
  old.v_code += done;
  portable::update(n - done, wide_param, wide_grad, old, h, scratch.m + done, scratch.v + done, rest);
  if constexpr (!std::is_same_v<P, float>) narrow(wide_param, n - done, param + done);
  for (int i = 0; i < 2; ++i) largest[i] = std::max(largest[i], rest[i]);
  return left;
}

inline void prefetch(const void* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(from) + i);
}

int64_t item_size(ScalarType t) {
  return t == ScalarType::Float ? 4 : 2;
}

// Asks for all that a block's update reads.
void prefetch(const Block& block) {
  const Segment& s = *block.segment;
  const int64_t param_size = item_size(s.param_type), grad_size = item_size(s.grad_type);
  prefetch(static_cast<const char*>(s.param) + block.offset * param_size, block.n * param_size);
  prefetch(static_cast<const char*>(s.grad) + block.offset * grad_size, block.n * grad_size);
  prefetch(s.m_code + block.offset, block.n);
  prefetch(s.v_code + block.offset, block.n);
  prefetch(s.m_absmax + block.index, 4);
  prefetch(s.v_absmax + block.index, 4);
}

template <typename P, typename G>
void step_values(int64_t n, P* param, const G* grad, const Moments& old, uint8_t* m_code, uint8_t* v_code,
                 const CodeBooks& books, const Hyper& h, const Block* next, Scratch& scratch, float* largest) {
  const int64_t first = update(n, param, grad, old, h, books.by_avx2(), scratch, largest);
  if (next != nullptr) prefetch(*next);
#ifdef PEFTKERN_ADAMW_AVX512
  if (first > 0) {
    avx2::finish(first, param, h, scratch.m, scratch.v, inverse_absmax(largest[0]), inverse_absmax(largest[1]),
                 books.m.table->words(), books.v.table->words(), m_code, v_code);
  }
#endif
  encode<true>(n - first, scratch.m + first, largest[0], books.m, m_code + first);
  encode<false>(n - first, scratch.v + first, largest[1], books.v, v_code + first);
}

void step_block(const Block& block, const Block& next, const CodeBooks& books, const Hyper& h,
                const std::optional<Random>& random) {
  static thread_local Scratch scratch;
  const Segment& s = *block.segment;
  const int64_t n = block.n;
  uint8_t *m_code = s.m_code + block.offset, *v_code = s.v_code + block.offset;
  float *m_absmax = s.m_absmax + block.index, *v_absmax = s.v_absmax + block.index;
  const Moments old = {m_code, v_code, books.m.values, books.v.values, *m_absmax * h.beta1, *v_absmax * h.beta2};
  // Within a tensor the update looks ahead itself.
  const Block* ahead = next.segment != nullptr && next.segment != &s ? &next : nullptr;
  float largest[2];
  PEFTKERN_DISPATCH_FLOAT("adamw8bit_step_", s.param_type, P, {
    P* param = static_cast<P*>(s.param) + block.offset;
    PEFTKERN_DISPATCH_FLOAT("adamw8bit_step_", s.grad_type, G, {
      const G* grad = static_cast<const G*>(s.grad) + block.offset;
      if (s.param_type == ScalarType::BFloat16 && random.has_value()) {
        widen(param, n, scratch.param);
        step_values(n, scratch.param, grad, old, m_code, v_code, books, h, ahead, scratch, largest);
        narrow_stochastically(scratch.param, block.offset, n, s.place, *random, static_cast<BFloat16*>(s.param));
      } else {
        step_values(n, param, grad, old, m_code, v_code, books, h, ahead, scratch, largest);
      }
    });
  });
  *m_absmax = stored_absmax(largest[0]);
  *v_absmax = stored_absmax(largest[1]);
}

using Tensors = std::vector<Tensor>;

Segments gather_segments(const Tensors& params, const Tensors& grads, const Tensors& exp_avg, const Tensors& exp_avg_sq,
                         const Tensors& exp_avg_absmax, const Tensors& exp_avg_sq_absmax, int64_t blocksize,
                         const std::optional<std::vector<int64_t>>& given_places) {
  const size_t count = params.size();
  STD_TORCH_CHECK(grads.size() == count && exp_avg.size() == count && exp_avg_sq.size() == count &&
                      exp_avg_absmax.size() == count && exp_avg_sq_absmax.size() == count,
                  "adamw8bit_step_: params, grads and states must be lists of one length");
  STD_TORCH_CHECK(blocksize >= 64 && blocksize <= kMaxBlocksize && (blocksize & (blocksize - 1)) == 0,
                  "adamw8bit_step_: blocksize must be a power of two from 64 to 4096, got ", blocksize);
  Segments segments(count, blocksize);
  AdamWPlaces places(given_places, count);
  for (size_t i = 0; i < count; ++i) {
    Segment s = gradient_segment(grads[i]);
    s.param_type = params[i].scalar_type();
    STD_TORCH_CHECK(is_float(s.param_type) && params[i].is_contiguous() && params[i].numel() == s.numel,
                    "adamw8bit_step_: params[", i, "] must be contiguous, of a float dtype and of its gradient's size");
    for (const Tensor& code : {exp_avg[i], exp_avg_sq[i]}) {
      STD_TORCH_CHECK(code.scalar_type() == ScalarType::Byte && code.is_contiguous() && code.numel() == s.numel,
                      "adamw8bit_step_: the states of params[", i, "] must be contiguous uint8 of its size");
    }
    const int64_t blocks = (s.numel + blocksize - 1) / blocksize;
    for (const Tensor& absmax : {exp_avg_absmax[i], exp_avg_sq_absmax[i]}) {
      STD_TORCH_CHECK(absmax.scalar_type() == ScalarType::Float && absmax.is_contiguous() && absmax.numel() == blocks,
                      "adamw8bit_step_: params[", i, "] needs ", blocks, " contiguous float32 scales for blocks of ",
                      blocksize, "; is the blocksize right?");
    }
    s.param = params[i].mutable_data_ptr();
    s.m_code = mutable_data<uint8_t>(exp_avg[i]);
    s.v_code = mutable_data<uint8_t>(exp_avg_sq[i]);
    s.m_absmax = mutable_data<float>(exp_avg_absmax[i]);
    s.v_absmax = mutable_data<float>(exp_avg_sq_absmax[i]);
    s.place = places.next(s.numel);
    segments.add(s);
  }
  return segments;
}

Hyper hyper(double lr, double step, double beta1, double beta2, double eps, double weight_decay, float scale) {
  Hyper h;
  h.beta1 = static_cast<float>(beta1);
  h.one_minus_beta1 = static_cast<float>(1.0 - beta1);
  h.beta2 = static_cast<float>(beta2);
  h.one_minus_beta2 = static_cast<float>(1.0 - beta2);
  h.eps = static_cast<float>(eps);
  h.decay = static_cast<float>(1.0 - lr * weight_decay);
  h.step_size = static_cast<float>(lr / (1.0 - std::pow(beta1, step)));
  h.inverse_bias2 = static_cast<float>(1.0 / std::sqrt(1.0 - std::pow(beta2, step)));
  h.gradient_scale = scale;
  return h;
}

void step(Tensors params, Tensors grads, Tensors exp_avg, Tensors exp_avg_sq, Tensors exp_avg_absmax,
          Tensors exp_avg_sq_absmax, Tensor exp_avg_qmap, Tensor exp_avg_sq_qmap, double lr,
          std::optional<Tensor> lr_tensor, double step, std::optional<Tensor> step_tensor, double beta1, double beta2,
          double eps, double weight_decay, int64_t blocksize, std::optional<Tensor> grad_scale,
          std::optional<Tensor> found_inf, bool maximize, double max_norm, std::optional<Tensor> grad_norm,
          std::optional<int64_t> seed, std::optional<Tensor>, std::optional<std::vector<int64_t>> places) {
  const Segments segments =
      gather_segments(params, grads, exp_avg, exp_avg_sq, exp_avg_absmax, exp_avg_sq_absmax, blocksize, places);
  const CodeBooks books = {first_code_book(exp_avg_qmap), second_code_book(exp_avg_sq_qmap)};
  if (lr_tensor.has_value()) lr = scalar(*lr_tensor, "lr");
  if (step_tensor.has_value()) step = scalar(*step_tensor, "step");
  if (found_inf.has_value() && scalar(*found_inf, "found_inf") != 0.0) return;
  float scale = gradient_scale(grad_scale, maximize);
  if (grad_norm.has_value()) {
    const double norm = scalar(*grad_norm, "grad_norm");
    if (!std::isfinite(norm)) return;
    scale *= static_cast<float>(std::min(1.0, max_norm / (norm + 1e-6)));
  }
  const Hyper h = hyper(lr, step, beta1, beta2, eps, weight_decay, scale);
  std::optional<Random> random;
  if (seed.has_value())
    random = Random{static_cast<uint64_t>(*seed), static_cast<uint32_t>(static_cast<int64_t>(step))};
  segments.for_each_block([&](const Block& block, const Block& next) { step_block(block, next, books, h, random); });
}

void find_inf(Tensors grads, std::optional<Tensor> grad_scale, Tensor found_inf, std::optional<Tensor> norm,
              Tensors steps, std::optional<Tensor> skipped) {
  STD_TORCH_CHECK(found_inf.scalar_type() == ScalarType::Float && found_inf.numel() == 1,
                  "adamw8bit_found_inf_: found_inf must hold one float32");
  Segments segments(grads.size(), kScanBlock);
  for (const Tensor& grad : grads) segments.add(gradient_segment(grad));
  const float scale = gradient_scale(grad_scale, false);
  if (any_overflow(segments, scale)) *mutable_data<float>(found_inf) = 1.0f;
  if (norm.has_value()) {
    const float all = gradient_norm(segments, scale);
    *mutable_data<float>(*norm) = all;
    if (!std::isfinite(all)) *mutable_data<float>(found_inf) = 1.0f;
  }
  const bool skip = *data<float>(found_inf) != 0.0f;
  for (const Tensor& count : steps) *mutable_data<float>(count) += skip ? 0.0f : 1.0f;
  if (skipped.has_value() && skip) *mutable_data<int64_t>(*skipped) += 1;
}

PEFTKERN_LIBRARY_IMPL(CPU, "cpp", m) {
  m.impl("adamw8bit_step_", TORCH_BOX(&step));
  m.impl("adamw8bit_found_inf_", TORCH_BOX(&find_inf));
}

}  // namespace
}  // namespace peftkern
