// Memory of one allocation in pieces.
#pragma once

#include <cstdint>

namespace peftkern {

// Cuts memory into 256-byte aligned pieces; of none it only counts.
class Workspace {
 public:
  explicit Workspace(void* memory) : memory_(static_cast<uint8_t*>(memory)) {}
  void* take(int64_t bytes) {
    void* piece = memory_ == nullptr ? nullptr : memory_ + taken_;
    taken_ += (bytes + 255) / 256 * 256;
    return piece;
  }
  int64_t taken() const { return taken_; }

 private:
  uint8_t* memory_;
  int64_t taken_ = 0;
};

}  // namespace peftkern
