// The adapter's kernels for bottlenecks of up to 128.
#include "bottleneck/hopper_launch.cuh"

namespace peftkern {

template cudaError_t bottleneck_forward<128>(const BottleneckForward&, const AdapterDevice&, cudaStream_t,
                                             const AdapterOptions&);
template cudaError_t bottleneck_backward<128>(const BottleneckBackward&, const AdapterDevice&, cudaStream_t,
                                              const AdapterOptions&);

}  // namespace peftkern
