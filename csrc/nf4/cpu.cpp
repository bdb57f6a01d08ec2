// NF4 on the CPU: quantize, dequantize, matmul. Codes and values are bitwise those of the reference, so products and
// sums are kept apart (the build uses -ffp-contract=off).
#include <algorithm>
#include <array>
#include <cmath>
#include <vector>

#include "common/aten.h"
#include "common/convert.h"
#include "common/multiversion.h"
#include "common/nf4_code.h"
#include "common/stable.h"
#include "nf4/weight.h"

namespace peftkern {
namespace {

constexpr int64_t kMaxBlocksize = 4096;
constexpr int64_t kGrainWeights = 1 << 15;  // the least work worth a thread
constexpr int64_t kGemvMaxTokens = 4;       // above, dequantizing once for the GEMM library wins

// Both values of a byte at once: high nibble first.
struct Pair {
  float even, odd;
};

const std::array<Pair, 256>& pair_table() {
  static const std::array<Pair, 256> table = [] {
    std::array<Pair, 256> t;
    for (int byte = 0; byte < 256; ++byte) t[byte] = {kNF4Code[byte >> 4], kNF4Code[byte & 15]};
    return t;
  }();
  return table;
}

float block_scale(const NF4Pointers& w, int64_t block) {
  if (!w.nested()) return w.absmax[block];
  return w.nested_code[w.absmax_codes[block]] * w.nested_absmax[block / w.nested_blocksize] + *w.nested_offset;
}

// The block's largest magnitude; NaN wins, as in torch.
PEFTKERN_MULTIVERSION float abs_max(const float* values, int64_t n) {
  float largest = 0.0f;
  for (int64_t i = 0; i < n; ++i) {
    const float magnitude = std::fabs(values[i]);
    largest = (magnitude > largest || magnitude != magnitude) ? magnitude : largest;
  }
  return largest;
}

// Code = count of thresholds below the scaled value; NaN counts them all, as torch.bucketize does.
PEFTKERN_MULTIVERSION void encode(const float* values, int64_t n, float factor, bool divide, int32_t* codes) {
  for (int64_t i = 0; i < n; ++i) {
    float scaled = divide ? values[i] / factor : values[i] * factor;
    scaled = scaled < -1.0f ? -1.0f : scaled;
    scaled = scaled > 1.0f ? 1.0f : scaled;
    int32_t code = 0;
    for (int t = 0; t < 15; ++t) code += !(scaled <= nf4_threshold(t));
    codes[i] = code;
  }
}

template <typename T>
PEFTKERN_MULTIVERSION void load_floats(const T* source, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = to_float(source[i]);
}

template <typename T>
PEFTKERN_MULTIVERSION void store_scaled(const float* source, int64_t n, float scale, T* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = from_float<T>(source[i] * scale);
}

// Weights [begin, begin + n) of the flattened matrix, unscaled codes as floats. `begin` may be odd.
void decode(const uint8_t* packed, int64_t begin, int64_t n, float* out) {
  const auto& table = pair_table();
  if (n > 0 && (begin & 1)) {
    *out++ = table[packed[begin / 2]].odd;
    ++begin;
    --n;
  }
  const uint8_t* bytes = packed + begin / 2;
  for (int64_t i = 0; i < n / 2; ++i) std::memcpy(out + 2 * i, &table[bytes[i]], sizeof(Pair));
  if (n & 1) out[n - 1] = table[bytes[n / 2]].even;
}

// Weights [begin, begin + n), scaled and rounded to T.
template <typename T>
void dequantize_range(const NF4Pointers& w, int64_t begin, int64_t n, T* out) {
  float values[kMaxBlocksize];
  for (int64_t i = begin; i < begin + n;) {
    const int64_t block = i / w.blocksize;
    const int64_t count = std::min((block + 1) * w.blocksize, begin + n) - i;
    decode(w.packed, i, count, values);
    store_scaled(values, count, block_scale(w, block), out + (i - begin));
    i += count;
  }
}

template <typename T>
void quantize_blocks(const T* weight, int64_t numel, int64_t blocksize, uint8_t* packed, float* absmax) {
  const int64_t blocks = (numel + blocksize - 1) / blocksize;
  torch::stable::parallel_for(0, blocks, kGrainWeights / blocksize, [&](int64_t first, int64_t last) {
    float values[kMaxBlocksize];
    int32_t codes[kMaxBlocksize + 1];
    for (int64_t block = first; block < last; ++block) {
      const int64_t begin = block * blocksize;
      const int64_t n = std::min(blocksize, numel - begin);
      load_floats(weight + begin, n, values);
      float scale = abs_max(values, n);
      const float safe = scale < 1e-38f ? 1e-38f : scale;
      const bool tail = n < blocksize;
      if (tail) scale = safe;
      encode(values, n, tail ? safe : 1.0f / safe, tail, codes);
      if (n & 1) codes[n] = kNF4Zero;
      for (int64_t i = 0; i < (n + 1) / 2; ++i) {
        packed[begin / 2 + i] = static_cast<uint8_t>(codes[2 * i] << 4 | codes[2 * i + 1]);
      }
      absmax[block] = scale;
    }
  });
}

std::tuple<Tensor, Tensor> quantize(const Tensor& weight, int64_t blocksize) {
  STD_TORCH_CHECK(blocksize >= 32 && blocksize <= kMaxBlocksize && (blocksize & (blocksize - 1)) == 0,
                  "nf4_quantize: blocksize must be a power of two from 32 to 4096, got ", blocksize);
  const Tensor source = torch::stable::contiguous(weight);
  const int64_t numel = source.numel();
  Tensor packed = torch::stable::new_empty(source, {(numel + 1) / 2, 1}, ScalarType::Byte);
  Tensor absmax = torch::stable::new_empty(source, {(numel + blocksize - 1) / blocksize}, ScalarType::Float);
  PEFTKERN_DISPATCH_FLOAT(
      "nf4_quantize", source.scalar_type(), T,
      quantize_blocks(data<T>(source), numel, blocksize, mutable_data<uint8_t>(packed), mutable_data<float>(absmax)));
  return {packed, absmax};
}

std::tuple<Tensor, Tensor> quantize_absmax(const Tensor& absmax, const Tensor& offset, const Tensor& code,
                                           int64_t blocksize) {
  STD_TORCH_CHECK(absmax.scalar_type() == ScalarType::Float && offset.scalar_type() == ScalarType::Float &&
                      code.scalar_type() == ScalarType::Float && code.numel() == 256 && offset.numel() == 1,
                  "nf4_quantize_absmax: absmax [b], offset [1] and code [256] must be float32");
  STD_TORCH_CHECK(blocksize > 0 && blocksize <= kMaxBlocksize, "nf4_quantize_absmax: blocksize must be 1 to 4096, got ",
                  blocksize);
  const Tensor source = torch::stable::contiguous(absmax);
  const Tensor code_source = torch::stable::contiguous(code);
  const int64_t n = source.numel();
  Tensor codes = torch::stable::new_empty(source, {n}, ScalarType::Byte);
  Tensor nested = torch::stable::new_empty(source, {(n + blocksize - 1) / blocksize}, ScalarType::Float);
  const float* values = data<float>(source);
  const float* table = data<float>(code_source);
  const float shift = *data<float>(offset);
  std::array<float, 255> midpoints;
  for (int i = 0; i < 255; ++i) midpoints[i] = (table[i] + table[i + 1]) / 2;
  for (int64_t begin = 0; begin < n; begin += blocksize) {
    const int64_t count = std::min(blocksize, n - begin);
    float shifted[kMaxBlocksize];
    for (int64_t i = 0; i < count; ++i) shifted[i] = values[begin + i] - shift;
    float scale = abs_max(shifted, count);
    const float safe = scale < 1e-38f ? 1e-38f : scale;
    const bool tail = count < blocksize;
    if (tail) scale = safe;
    const float reciprocal = 1.0f / safe;
    for (int64_t i = 0; i < count; ++i) {
      const float v = std::clamp(tail ? shifted[i] / safe : shifted[i] * reciprocal, -1.0f, 1.0f);
      const auto above = std::partition_point(midpoints.begin(), midpoints.end(), [v](float m) { return !(m >= v); });
      mutable_data<uint8_t>(codes)[begin + i] = static_cast<uint8_t>(above - midpoints.begin());
    }
    mutable_data<float>(nested)[begin / blocksize] = scale;
  }
  return {codes, nested};
}

template <typename T>
void dequantize_all(const NF4Pointers& w, int64_t numel, T* out) {
  const int64_t blocks = (numel + w.blocksize - 1) / w.blocksize;
  torch::stable::parallel_for(0, blocks, kGrainWeights / w.blocksize, [&](int64_t first, int64_t last) {
    const int64_t begin = first * w.blocksize;
    dequantize_range(w, begin, std::min(last * w.blocksize, numel) - begin, out + begin);
  });
}

void dequantize_into(const char* op, const NF4Pointers& w, Tensor& out) {
  PEFTKERN_DISPATCH_FLOAT(op, out.scalar_type(), T, dequantize_all(w, out.numel(), mutable_data<T>(out)));
}

void dequantize_out(const Tensor& packed, const Tensor& absmax, std::optional<Tensor> nested_absmax,
                    std::optional<Tensor> nested_code, std::optional<Tensor> nested_offset, int64_t blocksize,
                    int64_t nested_blocksize, Tensor out) {
  STD_TORCH_CHECK(out.is_contiguous(), "nf4_dequantize_out: out must be contiguous");
  const NF4Pointers w = nf4_pointers("nf4_dequantize_out", out.numel(), packed, absmax, nested_absmax, nested_code,
                                     nested_offset, blocksize, nested_blocksize);
  if (out.scalar_type() == ScalarType::Double) {  // float32 products, widened: the oracle of float64 tests
    double* target = mutable_data<double>(out);
    std::vector<float> values(out.numel());
    dequantize_all(w, out.numel(), values.data());
    std::copy(values.begin(), values.end(), target);
    return;
  }
  dequantize_into("nf4_dequantize_out", w, out);
}

template <typename T>
void dequantize_rows(const NF4Pointers& w, int64_t first, int64_t stride, int64_t rows, int64_t columns, T* out) {
  torch::stable::parallel_for(0, rows, std::max<int64_t>(1, kGrainWeights / columns), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) dequantize_range(w, first + i * stride, columns, out + i * columns);
  });
}

void dequantize_slice_out(const Tensor& packed, const Tensor& absmax, std::optional<Tensor> nested_absmax,
                          std::optional<Tensor> nested_code, std::optional<Tensor> nested_offset, int64_t blocksize,
                          int64_t nested_blocksize, int64_t out_features, int64_t in_features, int64_t row,
                          int64_t column, Tensor out) {
  constexpr const char* op = "nf4_dequantize_slice_out";
  check_slice(op, out, out_features, in_features, row, column);
  const NF4Pointers w = nf4_pointers(op, out_features * in_features, packed, absmax, nested_absmax, nested_code,
                                     nested_offset, blocksize, nested_blocksize);
  const int64_t first = row * in_features + column, rows = out.size(0), columns = out.size(1);
  if (out.numel() == 0) return;
  if (out.scalar_type() == ScalarType::Double) {
    std::vector<float> values(out.numel());
    dequantize_rows(w, first, in_features, rows, columns, values.data());
    std::copy(values.begin(), values.end(), mutable_data<double>(out));
    return;
  }
  PEFTKERN_DISPATCH_FLOAT(op, out.scalar_type(), T,
                          dequantize_rows(w, first, in_features, rows, columns, mutable_data<T>(out)));
}

// sum_k a[k] * b[k] in 16 partial sums, so that the loop vectorizes without reassociation flags.
PEFTKERN_MULTIVERSION float dot(const float* a, const float* b, int64_t n) {
  float partial[16] = {};
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    for (int lane = 0; lane < 16; ++lane) partial[lane] += a[i + lane] * b[i + lane];
  }
  float sum = 0.0f;
  for (; i < n; ++i) sum += a[i] * b[i];
  for (int lane = 0; lane < 16; ++lane) sum += partial[lane];
  return sum;
}

// A few tokens: each weight row is decoded once into cache and met by every token; no dense copy of the weight.
template <typename T>
void matmul_rows(const NF4Pointers& w, const T* x, const float* bias, int64_t m, int64_t n, int64_t k, T* y) {
  std::vector<float> tokens(m * k);
  load_floats(x, m * k, tokens.data());
  torch::stable::parallel_for(0, n, std::max<int64_t>(1, kGrainWeights / std::max<int64_t>(k, 1)),
                              [&](int64_t first, int64_t last) {
                                std::vector<float> row(k);
                                for (int64_t out = first; out < last; ++out) {
                                  dequantize_range(w, out * k, k, row.data());
                                  for (int64_t token = 0; token < m; ++token) {
                                    const float sum = dot(row.data(), tokens.data() + token * k, k);
                                    y[token * n + out] = from_float<T>(bias ? sum + bias[out] : sum);
                                  }
                                }
                              });
}

Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(x), torch::stable::detail::from(weight),
                                    torch::stable::detail::from(bias)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor matmul(const Tensor& x, const Tensor& packed, const Tensor& absmax, std::optional<Tensor> nested_absmax,
              std::optional<Tensor> nested_code, std::optional<Tensor> nested_offset, std::optional<Tensor> bias,
              int64_t blocksize, int64_t nested_blocksize, int64_t out_features, bool /*settled*/) {
  STD_TORCH_CHECK(x.dim() == 2 && x.is_contiguous(), "nf4_matmul: x must be a contiguous matrix [M, K]");
  const int64_t m = x.size(0), k = x.size(1), n = out_features;
  const NF4Pointers w = nf4_pointers("nf4_matmul", n * k, packed, absmax, nested_absmax, nested_code, nested_offset,
                                     blocksize, nested_blocksize);
  const bool by_rows = m <= kGemvMaxTokens && x.scalar_type() != ScalarType::Double;
  if (bias.has_value()) {
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == n, "nf4_matmul: bias must have shape [", n, "]");
    bias = torch::stable::contiguous(torch::stable::to(*bias, by_rows ? ScalarType::Float : x.scalar_type()));
  }
  if (by_rows) {
    Tensor y = torch::stable::new_empty(x, {m, n});
    PEFTKERN_DISPATCH_FLOAT("nf4_matmul", x.scalar_type(), T,
                            matmul_rows(w, data<T>(x), data_or_null<float>(bias), m, n, k, mutable_data<T>(y)));
    return y;
  }
  Tensor weight = torch::stable::new_empty(x, {n, k});
  dequantize_out(packed, absmax, nested_absmax, nested_code, nested_offset, blocksize, nested_blocksize, weight);
  return linear(x, weight, bias);
}

Tensor matmul_dx(const Tensor& dy, const Tensor& packed, const Tensor& absmax, std::optional<Tensor> nested_absmax,
                 std::optional<Tensor> nested_code, std::optional<Tensor> nested_offset, int64_t blocksize,
                 int64_t nested_blocksize, int64_t in_features) {
  STD_TORCH_CHECK(dy.dim() == 2, "nf4_matmul_dx: dy must be a matrix [M, N]");
  Tensor weight = torch::stable::new_empty(dy, {dy.size(1), in_features});
  dequantize_out(packed, absmax, nested_absmax, nested_code, nested_offset, blocksize, nested_blocksize, weight);
  return mm(dy, weight);
}

PEFTKERN_LIBRARY_IMPL(CPU, "cpp", m) {
  m.impl("nf4_quantize", TORCH_BOX(&quantize));
  m.impl("nf4_quantize_absmax", TORCH_BOX(&quantize_absmax));
  m.impl("nf4_dequantize_out", TORCH_BOX(&dequantize_out));
  m.impl("nf4_dequantize_slice_out", TORCH_BOX(&dequantize_slice_out));
  m.impl("nf4_matmul", TORCH_BOX(&matmul));
  m.impl("nf4_matmul_dx", TORCH_BOX(&matmul_dx));
}

}  // namespace
}  // namespace peftkern
