// Stands in for csrc/cuda/launch.cuh where g++ compiles the CUDA kernels: the same device code on a CPU. Each thread of a
// cluster's blocks is a fiber; one that reaches a shuffle or a barrier waits until its warp, block or cluster is there, as
// on a GPU. An asynchronous copy is made when it is waited for, not when it is asked for. A block runs far ahead of the
// next where no barrier holds it, and takes its shared memory along when it ends.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

#define __launch_bounds__(...)

namespace scope_fast {

inline uint3 threadIdx, blockIdx;

struct Barrier {
  int arrived = 0, generation = 0;
};

struct Copy {
  void* to;
  const void* from;
};

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(16 << 10);
  bool done = false;
  int awaited = 0;  // generation of the cluster's barrier that it has arrived at
  std::vector<std::vector<Copy>> groups = std::vector<std::vector<Copy>>(1);
};

// the blocks that run now, those of one cluster
struct Cluster {
  std::function<void()> body;
  int num_threads;
  unsigned first_block = 0, current = 0;
  std::vector<Fiber> fibers;
  std::vector<Barrier> warps, blocks;
  Barrier all;
  std::vector<uint64_t> shuffled;
  std::vector<std::vector<float4>> memories;  // 16 bytes each: aligned as on a GPU
  ucontext_t scheduler;

  Cluster(int num_blocks, int num_threads, int shared_bytes)
      : num_threads(num_threads), fibers(num_blocks * num_threads), warps(fibers.size() / 32), blocks(num_blocks),
        shuffled(fibers.size()), memories(num_blocks, std::vector<float4>((shared_bytes + 15) / 16)) {}

  int arrive(Barrier& barrier, int count) {
    const int generation = barrier.generation;
    if (++barrier.arrived == count) {
      barrier.arrived = 0;
      ++barrier.generation;
    }
    return generation;
  }
  void wait_beyond(Barrier& barrier, int generation) {
    while (barrier.generation == generation) swapcontext(&fibers[current].context, &scheduler);
  }
  void wait(Barrier& barrier, int count) { wait_beyond(barrier, arrive(barrier, count)); }
  void spoil(int block) { std::memset(memories[block].data(), 0xff, memories[block].size() * sizeof(float4)); }  // NaN

  void run(const std::function<void()>& kernel);
};
inline Cluster* cluster_now = nullptr;

inline void Cluster::run(const std::function<void()>& kernel) {
  body = kernel;
  cluster_now = this;
  for (size_t block = 0; block < memories.size(); ++block) spoil(block);
  for (Fiber& fiber : fibers) {
    fiber.done = false;
    fiber.groups.assign(1, {});
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = &scheduler;
    const auto start = +[] {
      cluster_now->body();
      cluster_now->fibers[cluster_now->current].done = true;
    };
    makecontext(&fiber.context, start, 0);
  }
  constexpr unsigned kTurns = 128;  // of a block's threads before the next block's
  std::vector<int> left(memories.size(), num_threads);
  for (bool busy = true; busy;) {
    busy = false;
    for (unsigned turn = 0; turn < kTurns * fibers.size(); ++turn) {
      const unsigned block = turn / (kTurns * num_threads), thread = turn % num_threads;
      current = block * num_threads + thread;
      if (fibers[current].done) continue;
      busy = true;
      threadIdx = {thread, 0, 0};
      blockIdx = {first_block + block, 0, 0};
      swapcontext(&scheduler, &fibers[current].context);
      if (fibers[current].done && --left[block] == 0) spoil(block);
    }
  }
}

inline void __syncthreads() {
  cluster_now->wait(cluster_now->blocks[cluster_now->current / cluster_now->num_threads], cluster_now->num_threads);
}

template <class T>
T __shfl_xor_sync(unsigned, T x, int mask) {
  const unsigned thread = cluster_now->current;
  Barrier& warp = cluster_now->warps[thread / 32];
  std::memcpy(&cluster_now->shuffled[thread], &x, sizeof x);
  cluster_now->wait(warp, 32);
  T other;
  std::memcpy(&other, &cluster_now->shuffled[thread ^ mask], sizeof x);
  cluster_now->wait(warp, 32);  // nobody writes before everybody has read
  return other;
}

inline float exp2_fast(float x) { return std::exp2(x); }

inline void copy_async(void* to, const void* from) { cluster_now->fibers[cluster_now->current].groups.back().push_back({to, from}); }
inline void end_copy_group() { cluster_now->fibers[cluster_now->current].groups.emplace_back(); }
template <int kLeft>
void wait_for_copy_groups() {
  auto& groups = cluster_now->fibers[cluster_now->current].groups;
  while (static_cast<int>(groups.size()) - 1 > kLeft) {
    for (const Copy& copy : groups.front()) std::memcpy(copy.to, copy.from, 16);
    groups.erase(groups.begin());
  }
}

inline char* shared_memory() {
  return reinterpret_cast<char*>(cluster_now->memories[cluster_now->current / cluster_now->num_threads].data());
}
inline unsigned cluster_rank() { return cluster_now->current / cluster_now->num_threads; }
inline void cluster_arrive() {
  const int count = static_cast<int>(cluster_now->fibers.size());
  cluster_now->fibers[cluster_now->current].awaited = cluster_now->arrive(cluster_now->all, count);
}
inline void cluster_wait() { cluster_now->wait_beyond(cluster_now->all, cluster_now->fibers[cluster_now->current].awaited); }
inline float load_from(unsigned rank, const float* mine) {
  const auto offset = reinterpret_cast<const char*>(mine) - shared_memory();
  float x;
  std::memcpy(&x, reinterpret_cast<const char*>(cluster_now->memories[rank].data()) + offset, sizeof x);
  return x;
}

inline int64_t num_launches = 0;

inline void run_clusters(int64_t num_clusters, int cluster, int num_threads, int shared_bytes, const std::function<void()>& body) {
  ++num_launches;
  Cluster runner(cluster, num_threads, shared_bytes);
  for (int64_t i = 0; i < num_clusters; ++i) {
    runner.first_block = static_cast<unsigned>(i * cluster);
    runner.run(body);
  }
}

template <class... Parameters, class... Arguments>
cudaError_t launch_clusters(void (*kernel)(Parameters...), int64_t num_clusters, int cluster, int num_threads,
                            int shared_bytes, int most_shared_bytes, cudaStream_t, const Arguments&... arguments) {
  if (shared_bytes > most_shared_bytes) return cudaErrorInvalidValue;
  run_clusters(num_clusters, cluster, num_threads, shared_bytes, [&] { kernel(arguments..., cluster); });
  return cudaSuccess;
}

template <class... Parameters>
bool clusters_fit(void (*)(Parameters...), int, int, int) {
  return true;
}

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int64_t num_blocks, int num_threads, cudaStream_t, const Arguments&... arguments) {
  run_clusters(num_blocks, 1, num_threads, 0, [&] { kernel(arguments...); });
  return cudaSuccess;
}

}  // namespace scope_fast
