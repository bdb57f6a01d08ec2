// The adapter's kernels for bottlenecks of up to 64.
#include "bottleneck/hopper_launch.cuh"

namespace peftkern {

template cudaError_t bottleneck_forward<64>(const BottleneckForward&, const AdapterDevice&, cudaStream_t,
                                            const AdapterOptions&);
template cudaError_t bottleneck_backward<64>(const BottleneckBackward&, const AdapterDevice&, cudaStream_t,
                                             const AdapterOptions&);

}  // namespace peftkern
