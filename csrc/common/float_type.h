// The float dtypes that kernels take at run time.
#pragma once

namespace peftkern {

enum class FloatType { kBFloat16, kFloat16, kFloat32 };

}  // namespace peftkern
