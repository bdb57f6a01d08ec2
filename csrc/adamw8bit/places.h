// Where the elements of a call's tensors are among its random numbers: one tensor after another, or as given.
#pragma once

#include <optional>
#include <utility>
#include <vector>

#include "adamw8bit/step_call.h"
#include "common/stable.h"

namespace peftkern {

class AdamWPlaces {
 public:
  AdamWPlaces(std::optional<std::vector<int64_t>> given, size_t count) : given_(std::move(given)) {
    STD_TORCH_CHECK(!given_.has_value() || given_->size() == count,
                    "adamw8bit_step_: places must have one number per parameter, ", count, ", got ",
                    given_.has_value() ? given_->size() : 0);
  }

  // The first element of the next tensor, in units of kAdamWPlace.
  uint32_t next(int64_t numel) {
    const int64_t place = given_.has_value() ? (*given_)[index_++] : next_;
    constexpr int64_t kEnd = int64_t{kAdamWPlace} << 32;
    STD_TORCH_CHECK(place >= 0 && place < kEnd && place % kAdamWPlace == 0,
                    "adamw8bit_step_: places must be multiples of ", kAdamWPlace, " below 2^38, got ", place);
    next_ = place + (numel + kAdamWPlace - 1) / kAdamWPlace * kAdamWPlace;
    return static_cast<uint32_t>(place / kAdamWPlace);
  }

 private:
  std::optional<std::vector<int64_t>> given_;
  size_t index_ = 0;
  int64_t next_ = 0;
};

}  // namespace peftkern
