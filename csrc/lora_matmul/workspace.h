// lora_gemm's memory as a tensor.
#pragma once

#include "common/stable.h"
#include "gemm/gemm.h"

namespace peftkern {

// Allocates what the problem needs beside its operands, on x's device, and puts it there. Keep it until the launch.
template <typename Problem>
Tensor lora_workspace(const Tensor& x, Problem& problem) {
  problem.workspace = nullptr;
  const int64_t bytes = lora_memory(problem).bytes;
  const Tensor memory = torch::stable::new_empty(x, {bytes}, ScalarType::Byte);
  problem.workspace = memory.mutable_data_ptr();
  return memory;
}

}  // namespace peftkern
