// The one launch of the CUDA kernels, and the toolkit they need. Device code here knows no torch header, so that nvcc
// alone compiles it; tests/cuda_on_cpu holds a launch.cuh that runs the same kernels on a CPU, thread by thread.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace scope_fast {

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int64_t num_blocks, int num_threads, cudaStream_t stream,
                   const Arguments&... arguments) {
  kernel<<<static_cast<unsigned>(num_blocks), num_threads, 0, stream>>>(arguments...);
  return cudaGetLastError();
}

}  // namespace scope_fast
