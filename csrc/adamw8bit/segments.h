// The blocks of all tensors of a CPU call as one parallel loop.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "common/stable.h"

namespace peftkern {

constexpr int64_t kGrainElements = 1 << 15;  // the least work worth a thread

// One tensor's part in the loop over blocks.
struct Segment {
  int64_t numel = 0, first_block = 0;
  int64_t place = 0;  // of the first element among the random numbers, in units of kAdamWPlace
  ScalarType param_type = ScalarType::Float, grad_type = ScalarType::Float;
  void* param = nullptr;
  const void* grad = nullptr;
  uint8_t *m_code = nullptr, *v_code = nullptr;
  float *m_absmax = nullptr, *v_absmax = nullptr;
};

// One block of one tensor; no segment: none.
struct Block {
  const Segment* segment = nullptr;
  int64_t index = 0, offset = 0, n = 0;  // n elements from offset on
};

struct Segments {
  std::vector<Segment> list;
  int64_t blocks = 0, blocksize;

  Segments(size_t count, int64_t blocksize) : blocksize(blocksize) { list.reserve(count); }

  void add(Segment s) {
    s.first_block = blocks;
    blocks += count(s);
    if (s.numel > 0) list.push_back(s);
  }

  // Calls f(block, the thread's next block) for every block, in parallel over the blocks of all tensors.
  template <typename F>
  void for_each_block(const F& f) const {
    torch::stable::parallel_for(0, blocks, std::max<int64_t>(1, kGrainElements / blocksize), [&](int64_t b, int64_t e) {
      const auto after = std::upper_bound(list.begin(), list.end(), b,
                                          [](int64_t block, const Segment& s) { return block < s.first_block; });
      const Segment* segment = &*(after - 1);
      Block block = at(segment, b - segment->first_block);
      for (; b < e; ++b) {
        const bool ends = block.index + 1 == count(*segment);
        const Block next = b + 1 == e ? Block{} : ends ? at(++segment, 0) : at(segment, block.index + 1);
        f(block, next);
        block = next;
      }
    });
  }

 private:
  int64_t count(const Segment& s) const { return (s.numel + blocksize - 1) / blocksize; }

  Block at(const Segment* s, int64_t index) const {
    const int64_t offset = index * blocksize;
    return {s, index, offset, std::min(blocksize, s->numel - offset)};
  }
};

}  // namespace peftkern
