// What the LoRA and bottleneck ops share on the CPU: products by ATen's GEMM, dropout that is regenerated tile by tile,
// and the loops that add a low-rank product to a large matrix.
//
// Dropped copies exist only as tiles of at most kTileElements elements. Low-rank products are taken in the accumulation
// type ("wide": float32, or float64 for float64) and rounded once when they are added or returned.
#pragma once

#include <algorithm>
#include <array>

#include "common/aten.h"
#include "common/convert.h"
#include "common/multiversion.h"
#include "common/philox.h"
#include "common/stable.h"

namespace peftkern {

constexpr int64_t kTileElements = 1 << 19;   // 2 MB of float32: about one core's L2
constexpr int64_t kGrainElements = 1 << 14;  // the least work worth a thread

inline ScalarType wide_type(ScalarType type) {
  return type == ScalarType::Double ? type : ScalarType::Float;
}

inline Tensor transposed(const Tensor& t) {
  return torch::stable::transpose(t, 0, 1);
}

inline Tensor rows(Tensor t, int64_t begin, int64_t count) {
  return torch::stable::narrow(t, 0, begin, count);
}

inline Tensor cast(const Tensor& t, ScalarType type) {
  return t.scalar_type() == type ? t : torch::stable::to(t, type);
}

template <typename T>
T narrow_to(double v) {
  return static_cast<T>(v);
}

template <typename T>
T narrow_to(float v) {
  return from_float<T>(v);
}

template <typename W, typename T>
W widen(T v) {
  if constexpr (std::is_same_v<T, double>) {
    return v;
  } else {
    return to_float(v);
  }
}

// The dropout of one call, or none.
struct Dropout {
  static Dropout none() { return Dropout(std::nullopt, 0.0); }

  Dropout(const std::optional<Tensor>& seed_tensor, double dropout_p) : on(seed_tensor.has_value()) {
    if (!on) return;
    STD_TORCH_CHECK(seed_tensor->scalar_type() == ScalarType::Long && seed_tensor->numel() == 1,
                    "dropout: seed must be one int64");
    STD_TORCH_CHECK(dropout_p >= 0.0 && dropout_p < 1.0, "dropout: dropout_p must be in [0, 1), got ", dropout_p);
    seed = static_cast<uint64_t>(*data<int64_t>(*seed_tensor));
    threshold = dropout_threshold(dropout_p);
    scale = dropout_scale(dropout_p);
  }

  bool on;
  uint64_t seed = 0;
  uint32_t threshold = 0;
  double scale = 1.0;
};

constexpr int64_t kCallsAtOnce = 64;  // Philox calls per buffer: 1024 elements

// Bytes 0 and 1 of `high` and `low` as two 15-bit numbers of 16 bits each.
PEFTKERN_INLINE uint32_t pair_numbers(uint32_t high, uint32_t low) {
  const uint32_t h = high & 0xffffu, l = low & 0xffffu;
  return ((h | h << 8) & 0x007f007fu) << 8 | ((l | l << 8) & 0x00ff00ffu);
}

PEFTKERN_MULTIVERSION inline void fill_numbers(uint64_t seed, int64_t m, int64_t first_call, int64_t calls,
                                               uint32_t* numbers) {
  for (int64_t i = 0; i < calls; ++i) {
    const PhiloxWords w = dropout_numbers(seed, m, static_cast<uint32_t>(first_call + i));
    const uint32_t words[4] = {w.w0, w.w1, w.w2, w.w3};
    for (int j = 0; j < 4; ++j) {
      const uint32_t low = dropout_mix(words[j]);
      numbers[8 * i + 2 * j] = pair_numbers(words[j], low);
      numbers[8 * i + 2 * j + 1] = pair_numbers(words[j] >> 16, low >> 16);
    }
  }
}

template <typename W>
PEFTKERN_MULTIVERSION void zero_below(const uint32_t* numbers, uint32_t threshold, int64_t pairs, W* values) {
  for (int64_t i = 0; i < pairs; ++i) {
    values[2 * i] = (numbers[i] & 0xffffu) >= threshold ? values[2 * i] : W{0};
    values[2 * i + 1] = (numbers[i] >> 16) >= threshold ? values[2 * i + 1] : W{0};
  }
}

// Zeroes the dropped elements of a row-major tile whose first row is row `first_row` of the whole matrix.
template <typename W>
void zero_dropped(const Dropout& drop, int64_t first_row, int64_t count, int64_t columns, W* tile) {
  torch::stable::parallel_for(0, count, std::max<int64_t>(1, kGrainElements / columns), [&](int64_t from, int64_t to) {
    uint32_t numbers[kDropoutColumns / 2 * kCallsAtOnce];
    for (int64_t m = from; m < to; ++m) {
      for (int64_t k = 0; k < columns; k += kDropoutColumns * kCallsAtOnce) {
        const int64_t n = std::min(kDropoutColumns * kCallsAtOnce, columns - k);
        fill_numbers(drop.seed, first_row + m, k / kDropoutColumns, (n + kDropoutColumns - 1) / kDropoutColumns,
                     numbers);
        W* values = tile + m * columns + k;
        zero_below(numbers, drop.threshold, n / 2, values);
        if ((n & 1) && (numbers[n / 2] & 0xffffu) < drop.threshold) values[n - 1] = W{0};
      }
    }
  });
}

inline void zero_dropped(const Dropout& drop, int64_t first_row, const Tensor& tile) {
  if (!drop.on) return;
  if (tile.scalar_type() == ScalarType::Double) {
    zero_dropped(drop, first_row, tile.size(0), tile.size(1), mutable_data<double>(tile));
  } else {
    zero_dropped(drop, first_row, tile.size(0), tile.size(1), mutable_data<float>(tile));
  }
}

// Walks the rows of a matrix in wide, dropped tiles. Where the matrix already is what is wanted, it is one single tile.
class Tiles {
 public:
  Tiles(const Tensor& source, const Dropout& drop)
      : source_(source),
        drop_(drop),
        wide_(wide_type(source.scalar_type())),
        copies_(drop.on || source.scalar_type() != wide_) {}

  // f(first row, tile), in order.
  template <typename F>
  void each(const F& f) const {
    const int64_t m = source_.size(0), columns = source_.size(1);
    const int64_t step = copies_ ? std::max<int64_t>(1, kTileElements / std::max<int64_t>(columns, 1)) : m;
    const Tensor scratch = torch::stable::new_empty(source_, {copies_ ? std::min(step, m) : 0, columns}, wide_);
    for (int64_t begin = 0; begin < m; begin += step) {
      Tensor tile = rows(source_, begin, std::min(step, m - begin));
      if (copies_) {
        Tensor copy = rows(scratch, 0, tile.size(0));
        torch::stable::copy_(copy, tile);
        zero_dropped(drop_, begin, copy);
        tile = copy;
      }
      f(begin, tile);
    }
  }

 private:
  Tensor source_;
  Dropout drop_;
  ScalarType wide_;
  bool copies_;
};

// mask(source) right, wide. source [M, K], right [K, r] wide.
inline Tensor project(const Tensor& source, const Tensor& right, const Dropout& drop) {
  Tensor out = torch::stable::new_empty(right, {source.size(0), right.size(1)});
  Tiles(source, drop).each([&](int64_t begin, const Tensor& tile) {
    mm_out(rows(out, begin, tile.size(0)), tile, right);
  });
  return out;
}

template <typename W>
PEFTKERN_MULTIVERSION void add_into(const W* source, int64_t n, W* sum) {
  for (int64_t i = 0; i < n; ++i) sum[i] += source[i];
}

template <typename W>
PEFTKERN_MULTIVERSION void scale_by(W factor, int64_t n, W* values) {
  for (int64_t i = 0; i < n; ++i) values[i] *= factor;
}

// t *= factor. t wide and contiguous.
inline void scale(const Tensor& t, double factor) {
  if (t.scalar_type() == ScalarType::Double) {
    scale_by(factor, t.numel(), mutable_data<double>(t));
  } else {
    scale_by(static_cast<float>(factor), t.numel(), mutable_data<float>(t));
  }
}

// sum += a b, all wide. The first product overwrites; the order of later ones is the caller's, whatever the threads.
inline void add_product(const Tensor& sum, bool first, const Tensor& a, const Tensor& b) {
  if (first) return mm_out(sum, a, b);
  const Tensor product = mm(a, b);
  if (sum.scalar_type() == ScalarType::Double) {
    add_into(data<double>(product), sum.numel(), mutable_data<double>(sum));
  } else {
    add_into(data<float>(product), sum.numel(), mutable_data<float>(sum));
  }
}

// left^T mask(source) [r, K], wide. left [M, r] wide, source [M, K].
inline Tensor outer(const Tensor& left, const Tensor& source, const Dropout& drop) {
  const Tensor sum = torch::stable::new_zeros(left, {left.size(1), source.size(1)});
  Tiles(source, drop).each([&](int64_t begin, const Tensor& tile) {
    add_product(sum, begin == 0, transposed(rows(left, begin, tile.size(0))), tile);
  });
  return sum;
}

struct Backprojection {
  Tensor D;      // dy right [M, r]
  Tensor outer;  // dy^T left [N, r]
};

// Both from one walk over dy [M, N], wide; either is empty where it is not needed. right [N, r] and left [M, r] wide.
inline Backprojection backproject(const Tensor& dy, const Tensor& right, bool need_D,
                                  const std::optional<Tensor>& left) {
  const bool need_outer = left.has_value();
  const int64_t r = right.size(1);
  const Backprojection out{torch::stable::new_empty(right, {need_D ? dy.size(0) : 0, r}),
                           torch::stable::new_zeros(right, {need_outer ? dy.size(1) : 0, r})};
  if (!need_D && !need_outer) return out;
  Tiles(dy, Dropout::none()).each([&](int64_t begin, const Tensor& tile) {
    const int64_t count = tile.size(0);
    if (need_D) mm_out(rows(out.D, begin, count), tile, right);
    if (need_outer) add_product(out.outer, begin == 0, transposed(tile), rows(*left, begin, count));
  });
  return out;
}

template <typename T, typename W>
PEFTKERN_MULTIVERSION void add_row(const W* update, W factor, const W* bias, int64_t n, T* y) {
  if (bias != nullptr) {
    for (int64_t i = 0; i < n; ++i) y[i] = narrow_to<T>(widen<W>(y[i]) + (factor * update[i] + bias[i]));
  } else {
    for (int64_t i = 0; i < n; ++i) y[i] = narrow_to<T>(widen<W>(y[i]) + factor * update[i]);
  }
}

template <typename T, typename W>
void add_rows(const Tensor& update, double factor, const std::optional<Tensor>& bias, const Tensor& y) {
  const int64_t n = y.size(1);
  const W* update_data = data<W>(update);
  const W* bias_data = data_or_null<W>(bias);
  T* y_data = mutable_data<T>(y);
  torch::stable::parallel_for(0, y.size(0), std::max<int64_t>(1, kGrainElements / n), [&](int64_t from, int64_t to) {
    for (int64_t m = from; m < to; ++m) {
      add_row(update_data + m * n, static_cast<W>(factor), bias_data, n, y_data + m * n);
    }
  });
}

// y += factor * mask(left right) + bias, each element rounded once. y [M, N] contiguous; left [M, r], right [r, N] and
// bias [N] wide.
inline void add_low_rank(const Tensor& y, const Tensor& left, const Tensor& right, double factor,
                         const std::optional<Tensor>& bias, const Dropout& drop) {
  const int64_t m = y.size(0), n = y.size(1);
  const int64_t step = std::max<int64_t>(1, kTileElements / std::max<int64_t>(n, 1));
  Tensor scratch = torch::stable::new_empty(left, {std::min(step, m), n});
  for (int64_t begin = 0; begin < m; begin += step) {
    const int64_t count = std::min(step, m - begin);
    const Tensor update = rows(scratch, 0, count);
    mm_out(update, rows(left, begin, count), right);
    zero_dropped(drop, begin, update);
    const Tensor target = rows(y, begin, count);
    if (y.scalar_type() == ScalarType::Double) {
      add_rows<double, double>(update, factor, bias, target);
    } else {
      PEFTKERN_DISPATCH_FLOAT("add_low_rank", y.scalar_type(), T, (add_rows<T, float>(update, factor, bias, target)));
    }
  }
}

}  // namespace peftkern
