// Lists of tensors as launches of the CUDA kernels: as many as a launch holds, large ones in parts.
#pragma once

#include <algorithm>
#include <memory>

#include "adamw8bit/launch.h"
#include "adamw8bit/step_config.h"
#include "common/cuda.h"

namespace peftkern {

inline int64_t adamw_item_size(int type) {
  return type == kAdamWFloat ? 4 : 2;
}

struct AdamWLimits {
  int multiprocessors, major;
  int shared_bytes;  // of a CTA
};

inline AdamWLimits adamw_limits() {
  const Device device = current_device();
  int shared = 0;
  PEFTKERN_CUDA_CHECK(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device.index));
  return {device.multiprocessors, device.compute_capability / 10, shared};
}

// One parameter and what belongs to it.
struct AdamWItem {
  void* param;
  const void* grad;
  uint8_t *m_code, *v_code;
  float *m_absmax, *v_absmax;
  int64_t numel;
  int param_type, grad_type;
};

// Collects items into launches.
class AdamWStepLaunches {
 public:
  AdamWStepLaunches(const AdamWCall& call, bool stochastic, cudaStream_t stream)
      : call_(call), limits_(adamw_limits()), stochastic_(stochastic), stream_(stream) {}

  void add(const AdamWItem& item, uint32_t place) {
    const int64_t entries = adamw_entries(item.numel);
    for (int64_t part = 0; part < entries; ++part) {
      const int64_t start = part * kAdamWMaxPart;
      const int64_t n = std::min(kAdamWMaxPart, item.numel - start);
      if (tensors_->count == kAdamWMaxTensors || chunks_ + adamw_chunks(n) > UINT32_MAX / 2) flush();
      AdamWTensors& t = *tensors_;
      const int i = t.count++;
      const int64_t block = start >> call_.log2_blocksize;
      AdamWEntry& e = t.entries[i];
      e.param = static_cast<char*>(item.param) + start * adamw_item_size(item.param_type);
      e.grad = static_cast<const char*>(item.grad) + start * adamw_item_size(item.grad_type);
      e.code[0] = item.m_code + start;
      e.code[1] = item.v_code + start;
      e.absmax[0] = item.m_absmax + block;
      e.absmax[1] = item.v_absmax + block;
      e.numel = static_cast<uint32_t>(n);
      e.place = place + static_cast<uint32_t>(start / kAdamWPlace);
      e.param_type = static_cast<uint8_t>(item.param_type);
      const bool aligned =
          is_aligned(e.param, 16) && is_aligned(e.grad, 16) && is_aligned(e.code[0], 16) && is_aligned(e.code[1], 16);
      e.grad_type = static_cast<uint8_t>(item.grad_type | (aligned ? 0 : kAdamWUnaligned));
      t.index.first_chunk[i] = static_cast<uint32_t>(chunks_);
      const bool blocks =
          call_.log2_blocksize == kLog2Tile && is_aligned(e.absmax[0], 16) && is_aligned(e.absmax[1], 16);
      t.index.kinds[i] = adamw_kinds(e.numel, aligned, blocks);
      chunks_ += adamw_chunks(n);
      if (type_ == kNone) type_ = item.param_type;
      if (type_ != item.param_type || type_ != item.grad_type) type_ = kMixed;
    }
  }

  void flush() {
    if (tensors_->count == 0) return;
    tensors_->index.first_chunk[tensors_->count] = static_cast<uint32_t>(chunks_);
    const AdamWConfig config = adamw_step_config(chunks_, limits_.multiprocessors, limits_.major, limits_.shared_bytes);
    PEFTKERN_CUDA_CHECK(launch_adamw_step(*tensors_, call_, config, type_, stochastic_, stream_));
    tensors_->count = 0;
    chunks_ = 0;
    type_ = kNone;
  }

 private:
  static constexpr int kNone = -2, kMixed = -1;

  const AdamWCall& call_;
  AdamWLimits limits_;
  bool stochastic_;
  cudaStream_t stream_;
  std::unique_ptr<AdamWTensors> tensors_ = std::make_unique<AdamWTensors>();
  int64_t chunks_ = 0;
  int type_ = kNone;
};

// Collects gradients into launches of the look. Every launch writes flags and sums of its own.
class AdamWLookLaunches {
 public:
  AdamWLookLaunches(const float* grad_scale, uint32_t* flags, float* sums, int multiprocessors, cudaStream_t stream)
      : grad_scale_(grad_scale), flags_(flags), sums_(sums), multiprocessors_(multiprocessors), stream_(stream) {}

  static int64_t launches(int64_t entries) { return (entries + kAdamWMaxTensors - 1) / kAdamWMaxTensors; }

  void add(const void* grad, int64_t numel, int type) {
    for (int64_t start = 0; start < numel; start += kAdamWMaxPart) {
      if (gradients_->count == kAdamWMaxTensors) flush();
      AdamWGradients& g = *gradients_;
      const int i = g.count++;
      const int64_t n = std::min(kAdamWMaxPart, numel - start);
      g.grad[i] = static_cast<const char*>(grad) + start * adamw_item_size(type);
      g.numel[i] = static_cast<uint32_t>(n);
      g.first_chunk[i] = static_cast<uint32_t>(chunks_);
      g.grad_type[i] = static_cast<uint8_t>(type | (is_aligned(g.grad[i], 16) ? 0 : kAdamWUnaligned));
      chunks_ += adamw_chunks(n);
    }
  }

  void flush() {
    if (gradients_->count == 0) return;
    gradients_->first_chunk[gradients_->count] = static_cast<uint32_t>(chunks_);
    const int ctas = adamw_look_ctas(chunks_, multiprocessors_, sums_ != nullptr);
    PEFTKERN_CUDA_CHECK(launch_adamw_look(*gradients_, ctas, grad_scale_, flags_ + flag_count_,
                                          sums_ == nullptr ? nullptr : sums_ + piece_count_, stream_));
    flag_count_ += ctas;
    piece_count_ += chunks_ * kAdamWPieces;
    gradients_->count = 0;
    chunks_ = 0;
  }

  int64_t flag_count() const { return flag_count_; }
  int64_t piece_count() const { return piece_count_; }

 private:
  const float* grad_scale_;
  uint32_t* flags_;
  float* sums_;
  int multiprocessors_;
  cudaStream_t stream_;
  std::unique_ptr<AdamWGradients> gradients_ = std::make_unique<AdamWGradients>();
  int64_t chunks_ = 0, flag_count_ = 0, piece_count_ = 0;
};

}  // namespace peftkern
