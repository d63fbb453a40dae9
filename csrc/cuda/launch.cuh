// The launches of the CUDA kernels, what they ask of the hardware by name, and the toolkit they need. Device code here
// knows no torch header, so that nvcc alone compiles it; tests/cuda_on_cpu holds a launch.cuh that runs the same kernels on
// a CPU, thread by thread.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace scope_fast {

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int64_t num_blocks, int num_threads, cudaStream_t stream,
                   const Arguments&... arguments) {
  kernel<<<static_cast<unsigned>(num_blocks), num_threads, 0, stream>>>(arguments...);
  return cudaGetLastError();
}

// Clusters of `cluster` blocks, each block with shared_bytes for shared_memory().
struct ClusterLaunch {
  cudaLaunchAttribute attribute{};
  cudaLaunchConfig_t config{};

  ClusterLaunch(int64_t num_clusters, int cluster, int num_threads, int shared_bytes, cudaStream_t stream) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
    config.gridDim = dim3(static_cast<unsigned>(num_clusters * cluster));
    config.blockDim = dim3(num_threads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = 1;
  }
  ClusterLaunch(const ClusterLaunch&) = delete;  // config points to attribute
};

// most_shared_bytes: of any launch of this kernel, since the setting is the kernel's own, and other threads launch it too
template <class... Parameters>
cudaError_t allow_shared(void (*kernel)(Parameters...), int most_shared_bytes) {
  const auto most = cudaFuncAttributeMaxDynamicSharedMemorySize, share = cudaFuncAttributePreferredSharedMemoryCarveout;
  const cudaError_t status = cudaFuncSetAttribute(kernel, most, most_shared_bytes);
  return status == cudaSuccess ? cudaFuncSetAttribute(kernel, share, cudaSharedmemCarveoutMaxShared) : status;
}

// The kernel's last argument is `cluster`.
template <class... Parameters, class... Arguments>
cudaError_t launch_clusters(void (*kernel)(Parameters...), int64_t num_clusters, int cluster, int num_threads,
                            int shared_bytes, int most_shared_bytes, cudaStream_t stream, const Arguments&... arguments) {
  if (const cudaError_t status = allow_shared(kernel, most_shared_bytes); status != cudaSuccess) return status;
  const ClusterLaunch launch(num_clusters, cluster, num_threads, shared_bytes, stream);
  return cudaLaunchKernelEx(&launch.config, kernel, arguments..., cluster);
}

// Whether the current GPU can run such clusters and the kernel was compiled for them: PTX of sm_80 compiles for any GPU.
template <class... Parameters>
bool clusters_fit(void (*kernel)(Parameters...), int cluster, int num_threads, int most_shared_bytes) {
  cudaFuncAttributes built;
  int resident = 0;
  const ClusterLaunch launch(1, cluster, num_threads, most_shared_bytes, nullptr);
  const bool known = cudaFuncGetAttributes(&built, kernel) == cudaSuccess && built.ptxVersion >= 90 &&
                     allow_shared(kernel, most_shared_bytes) == cudaSuccess &&
                     cudaOccupancyMaxActiveClusters(&resident, kernel, &launch.config) == cudaSuccess;
  cudaGetLastError();  // what could not be had is an answer here, not a failure of the next call
  return known && resident > 0;
}

__device__ inline char* shared_memory() {
  extern __shared__ __align__(16) char memory[];
  return memory;
}

__device__ inline float exp2_fast(float x) {  // within 2 units in the last place; 0 where it would be subnormal
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 16 bytes from global to the block's shared memory, behind the thread's back; a group is what was asked for since the last
__device__ inline void copy_async(void* to, const void* from) {
  const auto shared = static_cast<unsigned>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(from) : "memory");
}
__device__ inline void end_copy_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kLeft>
__device__ void wait_for_copy_groups() {  // until kLeft of the thread's groups are on their way
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

// Clusters of blocks that run together and read each other's shared memory: sm_90 and later.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
__device__ inline unsigned cluster_rank() {
  unsigned rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
__device__ inline void cluster_arrive() { asm volatile("barrier.cluster.arrive;" ::: "memory"); }
__device__ inline void cluster_wait() { asm volatile("barrier.cluster.wait;" ::: "memory"); }

// a float in the same place of another block's shared memory
__device__ inline float load_from(unsigned rank, const float* mine) {
  const auto shared = static_cast<unsigned>(__cvta_generic_to_shared(mine));
  float x;
  asm volatile("{.reg .u32 at; mapa.shared::cluster.u32 at, %1, %2; ld.shared::cluster.f32 %0, [at];}"
               : "=f"(x) : "r"(shared), "r"(rank) : "memory");
  return x;
}
#else  // only to compile: clusters_fit finds a build that has no other
__device__ inline unsigned cluster_rank() { __trap(); return 0; }
__device__ inline void cluster_arrive() { __trap(); }
__device__ inline void cluster_wait() { __trap(); }
__device__ inline float load_from(unsigned, const float*) { __trap(); return 0; }
#endif

}  // namespace scope_fast
