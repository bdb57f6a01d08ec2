#include <array>
#include <mutex>
#include <unordered_map>

#include "lora_matmul/turnstile.h"
#include "nf4/low_rank.h"

namespace peftkern {
namespace {

constexpr int kTurnstiles = 1 << 15;
__device__ uint32_t turnstiles[kTurnstiles * kTurnstileWords];  // zeros when they are loaded, and after every launch

// Of a device.
struct Turnstiles {
  uint32_t* first = nullptr;
  int given = 0;
  std::unordered_map<cudaStream_t, uint32_t*> of_streams;

  uint32_t* next() { return given < kTurnstiles ? first + kTurnstileWords * given++ : nullptr; }
};

}  // namespace

cudaError_t turnstile_for(cudaStream_t stream, int device, uint32_t** turnstile) {
  constexpr int kMaxDevices = 64;
  static std::array<Turnstiles, kMaxDevices> of_devices;
  static std::mutex mutex;
  *turnstile = nullptr;
  if (device >= kMaxDevices) return cudaSuccess;
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  if (stream != nullptr) {  // the legacy stream is never captured, and may not be asked
    if (const cudaError_t error = cudaStreamIsCapturing(stream, &capture); error != cudaSuccess) return error;
  }
  const std::lock_guard<std::mutex> lock(mutex);
  Turnstiles& all = of_devices[device];
  if (all.first == nullptr) {
    void* first = nullptr;
    if (const cudaError_t error = cudaGetSymbolAddress(&first, turnstiles); error != cudaSuccess) return error;
    all.first = static_cast<uint32_t*>(first);
  }
  if (capture != cudaStreamCaptureStatusNone) {
    *turnstile = all.next();
    return cudaSuccess;
  }
  uint32_t*& known = all.of_streams[stream];
  if (known == nullptr) known = all.next();
  *turnstile = known;
  return cudaSuccess;
}

}  // namespace peftkern
