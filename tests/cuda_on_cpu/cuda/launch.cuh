// Stands in for csrc/cuda/launch.cuh where g++ compiles the CUDA kernels: the same device code on a CPU. Each thread of a
// block is a fiber; one that reaches a shuffle or a barrier waits until its warp or block is there, as on a GPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <ucontext.h>

#include <cstdint>
#include <cstring>
#include <functional>
#include <utility>
#include <vector>

#define __launch_bounds__(num_threads)

namespace scope_fast {

inline uint3 threadIdx, blockIdx;

struct Barrier {
  int arrived = 0, generation = 0;
};

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(16 << 10);
  bool done = false;
};

// the block that runs now
struct Block {
  std::function<void()> body;
  std::vector<Fiber> fibers;
  std::vector<Barrier> warps;
  Barrier all;
  std::vector<uint64_t> shuffled;
  ucontext_t scheduler;

  explicit Block(int num_threads) : fibers(num_threads), warps(num_threads / 32), shuffled(num_threads) {}

  void wait(Barrier& barrier, int count) {
    const int generation = barrier.generation;
    if (++barrier.arrived == count) {
      barrier.arrived = 0;
      ++barrier.generation;
    }
    while (barrier.generation == generation) swapcontext(&fibers[threadIdx.x].context, &scheduler);
  }

  void run(std::function<void()> kernel);
};
inline Block* block = nullptr;

inline void Block::run(std::function<void()> kernel) {
  body = std::move(kernel);
  block = this;
  for (Fiber& fiber : fibers) {
    fiber.done = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = &scheduler;
    const auto start = +[] {
      block->body();
      block->fibers[threadIdx.x].done = true;
    };
    makecontext(&fiber.context, start, 0);
  }
  for (bool busy = true; busy;) {
    busy = false;
    for (unsigned i = 0; i < fibers.size(); ++i) {
      if (fibers[i].done) continue;
      busy = true;
      threadIdx = {i, 0, 0};
      swapcontext(&scheduler, &fibers[i].context);
    }
  }
}

inline void __syncthreads() { block->wait(block->all, static_cast<int>(block->fibers.size())); }

template <class T>
T __shfl_xor_sync(unsigned, T x, int mask) {
  const unsigned thread = threadIdx.x;
  Barrier& warp = block->warps[thread / 32];
  std::memcpy(&block->shuffled[thread], &x, sizeof x);
  block->wait(warp, 32);
  T other;
  std::memcpy(&other, &block->shuffled[thread ^ mask], sizeof x);
  block->wait(warp, 32);  // nobody writes before everybody has read
  return other;
}

inline int64_t num_launches = 0;

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int64_t num_blocks, int num_threads, cudaStream_t, const Arguments&... arguments) {
  ++num_launches;
  Block runner(num_threads);
  for (unsigned i = 0; i < num_blocks; ++i) {
    blockIdx = {i, 0, 0};
    runner.run([&] { kernel(arguments...); });
  }
  return cudaSuccess;
}

}  // namespace scope_fast
