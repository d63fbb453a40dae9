// step_pool in one launch: a block per rollout, whose warps score one step each and whose first warp then gives the verdict.
//   p_s = softmax(weight hidden[step_end[s]] + bias)[positive]   first_error = first s with not (p_s >= tau), or the count
// Reads S*D elements of hidden, writes S + 5R numbers; the head's rows stay in L2. The scores of a rollout never leave its
// block's caches before they are pooled, at the price that a single long rollout runs on one multiprocessor. Every sum has
// a fixed order. Linear heads of one or two rows: an MLP head is a matmul, which kernels/step_pool.py does.
#pragma once

#include <cmath>

#include "cuda/elements.cuh"

namespace scope_fast {

constexpr int kStepThreads = 512;
constexpr int kStepPacket = 8;  // elements a lane reads at once: 16 bytes of bfloat16

struct StepPool {
  const void* hidden;  // (T, D), rows hidden_stride apart
  const void* weight;  // (C, D) contiguous
  const void* bias;    // (C) of weight's type, or null
  const int64_t* step_end;
  const int64_t* cu_steps;
  float* prob;           // (S)
  int64_t* first_error;  // (R), and the pools
  float *min, *mean, *prod, *last;
  int64_t num_rollouts, dim, hidden_stride;
  int32_t classes, positive;
  float tau;
  bool packets;  // every row starts on 16 bytes and holds whole packets
};

template <class T, class F>
__device__ T over_warp(T x, const F& combine) {
  for (int mask = 16; mask > 0; mask /= 2) x = combine(x, __shfl_xor_sync(0xffffffffu, x, mask));
  return x;
}

// weight[label] . hidden[row] for both labels (the second is 0 where the head has one row), the same in every lane
template <class H, class W>
__device__ void step_logits(const StepPool& s, int64_t row, int lane, float (&z)[2]) {
  const H* x = static_cast<const H*>(s.hidden) + row * s.hidden_stride;
  const W* w[2] = {static_cast<const W*>(s.weight), static_cast<const W*>(s.weight) + (s.classes - 1) * s.dim};
  z[0] = z[1] = 0.f;
  if (s.packets) {
    using Xs = Packet<H, kStepPacket>;
    using Ws = Packet<W, kStepPacket>;
#pragma unroll 2
    for (int64_t d = lane * kStepPacket; d < s.dim; d += 32 * kStepPacket) {
      const Xs xs = *reinterpret_cast<const Xs*>(x + d);
      const Ws first = *reinterpret_cast<const Ws*>(w[0] + d), second = *reinterpret_cast<const Ws*>(w[1] + d);
#pragma unroll
      for (int i = 0; i < kStepPacket; ++i) {
        z[0] += to_float(xs.values[i]) * to_float(first.values[i]);
        z[1] += to_float(xs.values[i]) * to_float(second.values[i]);
      }
    }
  } else {
    for (int64_t d = lane; d < s.dim; d += 32) {
      z[0] += to_float(x[d]) * to_float(w[0][d]);
      z[1] += to_float(x[d]) * to_float(w[1][d]);
    }
  }
  const W* bias = static_cast<const W*>(s.bias);
  for (int label = 0; label < 2; ++label) {
    z[label] = over_warp(z[label], [](float a, float b) { return a + b; });
    if (bias) z[label] += to_float(bias[label < s.classes ? label : 0]);
  }
  if (s.classes == 1) z[1] = 0.f;
}

// the softmax of two labels is the sigmoid of their difference; a head of one row scores "right" itself
__device__ inline float step_probability(const StepPool& s, const float (&z)[2]) {
  const float difference = s.classes == 1 || s.positive == 0 ? z[0] - z[1] : z[1] - z[0];
  const float e = expf(-fabsf(difference));
  return difference >= 0 ? 1.f / (1.f + e) : e / (1.f + e);
}

__device__ inline void step_verdict(const StepPool& s, int64_t rollout, int64_t start, int64_t count, int lane) {
  int64_t error = count;
  float lowest = INFINITY, total = 0.f, product = 1.f;
  for (int64_t i = lane; i < count; i += 32) {
    const float p = s.prob[start + i];
    if (!(p >= s.tau) && i < error) error = i;  // NaN >= tau is false: an error
    lowest = fminf(lowest, p);
    total += p;
    product *= p;
  }
  error = over_warp(error, [](int64_t a, int64_t b) { return a < b ? a : b; });
  lowest = over_warp(lowest, [](float a, float b) { return fminf(a, b); });
  total = over_warp(total, [](float a, float b) { return a + b; });
  product = over_warp(product, [](float a, float b) { return a * b; });
  if (lane != 0) return;
  s.first_error[rollout] = error;
  s.min[rollout] = count == 0 ? 0.f : total != total ? total : lowest;  // fminf drops NaN, the sum of p keeps it
  s.mean[rollout] = count == 0 ? 0.f : total / static_cast<float>(count);
  s.prod[rollout] = count == 0 ? 0.f : product;
  s.last[rollout] = count == 0 ? 0.f : s.prob[start + count - 1];
}

template <class H, class W>
__global__ void __launch_bounds__(kStepThreads) step_pool_kernel(const StepPool s) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t rollout = blockIdx.x, start = s.cu_steps[rollout], end = s.cu_steps[rollout + 1];
  for (int64_t step = start + warp; step < end; step += kStepThreads / 32) {
    float z[2];
    step_logits<H, W>(s, s.step_end[step], lane, z);
    if (lane == 0) s.prob[step] = step_probability(s, z);
  }
  __syncthreads();  // the block sees its own writes of prob
  if (warp == 0) step_verdict(s, rollout, start, end - start, lane);
}

// packets is filled in here; hidden and weight may have different floating types
inline cudaError_t launch_step_pool(StepPool s, Element hidden, Element weight, cudaStream_t stream) {
  if (s.num_rollouts == 0) return cudaSuccess;
  cudaError_t status = cudaErrorInvalidValue;
  with_float(hidden, [&](auto h) {
    with_float(weight, [&](auto w) {
      using H = decltype(h);
      using W = decltype(w);
      s.packets = s.dim % kStepPacket == 0 && s.hidden_stride % (16 / sizeof(H)) == 0 && aligned(s.hidden) && aligned(s.weight);
      status = launch(step_pool_kernel<H, W>, s.num_rollouts, kStepThreads, stream, s);
    });
  });
  return status;
}

}  // namespace scope_fast
