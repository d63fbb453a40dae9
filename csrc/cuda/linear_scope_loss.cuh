// The row kernel of linear_scope_loss on Hopper and later: logits -> loss, metrics and dlogits, each logit read once.
//
//   top = max z, s = sum exp(z - top), u = sum (z - top) exp(z - top);  z = (logit + bias) / temperature
//   logprob = z[target] - top - log s, entropy = log s - u / s;  (loss, g, h) = row_terms(logprob, entropy)
//   dlogit = (p * (-g - h * (log p + entropy)) + g * [target]) / temperature
//
// A row of 150 000 logits is too long for one multiprocessor, so that kernels/linear_scope_loss.py reads it twice: 10 bytes
// a float32 logit, 6 a bfloat16 one. Here a cluster of blocks holds it in their shared memories from the statistics to the
// gradient: 6 and 4. Each thread copies, folds and writes packets of its own, so that only the three statistics of a block
// cross threads. Gradients may lie over the logits they are made of: all of a row is read before any of it is written.
#pragma once

#include "cuda/elements.cuh"
#include "row_terms.h"

namespace scope_fast {

constexpr int kRowThreads = 256;
constexpr int kRowBlocks = 3;    // of them on a multiprocessor: some wait for memory while others compute
constexpr int kCopyGroups = 4;   // of a thread's copies: the first is folded while the others are on their way
constexpr int kMaxCluster = 8;   // what every GPU with clusters can run
constexpr int kLogitAlign = 16;  // rows start on, and are padded to, as many elements (kernels/softmax.py)
constexpr float kLog2E = 1.44269504f;
constexpr float kLowest = -3.0e38f;  // a maximum that no logit reached yet: finite, so that differences are not NaN
static_assert(kRowThreads % 32 == 0 && (kRowThreads & (kRowThreads - 1)) == 0);  // over_lanes joins a block's warps by halves

struct LogitRows {
  const void* logits;         // (N, padded V), rows logits_stride apart
  void* dlogits;              // the same, dlogits_stride apart; null: no gradient
  const float* bias;          // (V) or null
  const int64_t* index;       // (N): rows of the streams
  const int64_t* target;      // (T), and so are the others; null where absent
  const uint8_t* segment;
  const float *loss_weight, *old_logprob, *advantage, *ref_logprob, *rollout_logprob, *temperature;
  float* table;               // (num_metrics, columns), of which N from first_column on are written
  int64_t num_rows, vocab, logits_stride, dlogits_stride, first_column, columns;
  int32_t slice;              // packets of a row in a block
  RowOptions<float> options;
};

struct Softmax {
  float top = kLowest, s = 0, u = 0;
};

__device__ inline Softmax joined(const Softmax& a, const Softmax& b) {
  const float top = fmaxf(a.top, b.top);
  const float da = a.top - top, db = b.top - top;
  const float ea = exp2_fast(da * kLog2E), eb = exp2_fast(db * kLog2E);
  return {top, ea * a.s + eb * b.s, ea * (a.u + da * a.s) + eb * (b.u + db * b.s)};
}

// the first `lanes` (a power of two) of a warp as one, in lane 0
__device__ inline Softmax over_lanes(Softmax x, int lanes) {
  for (int mask = lanes / 2; mask > 0; mask /= 2) {
    Softmax other;
    other.top = __shfl_xor_sync(0xffffffffu, x.top, mask);
    other.s = __shfl_xor_sync(0xffffffffu, x.s, mask);
    other.u = __shfl_xor_sync(0xffffffffu, x.u, mask);
    x = joined(x, other);
  }
  return x;
}

template <int kSize>
__device__ void fold(Softmax& x, const float (&z)[kSize]) {
  float top = z[0];
#pragma unroll
  for (int i = 1; i < kSize; ++i) top = fmaxf(top, z[i]);
  if (top > x.top) {
    const float d = x.top - top, e = exp2_fast(d * kLog2E);
    x.u = e * (x.u + d * x.s);
    x.s *= e;
    x.top = top;
  }
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    float d = z[i] - x.top;
    d = d < -1e30f ? -1e30f : d;  // an excluded token (-inf) adds 0 * 1e30, not NaN
    const float e = exp2_fast(d * kLog2E);
    x.s += e;
    x.u += d * e;
  }
}

// what the threads of a block share, before the logits
struct RowShared {
  Softmax warps[kRowThreads / 32];
  Softmax block;
  float top, log_s, entropy, g, h;
};
constexpr int kLogitsAt = (sizeof(RowShared) + 15) / 16 * 16;
// Logits in a block: what lets kRowBlocks of them onto a multiprocessor of 228 KiB, of which each block costs 1 KiB more.
// Longer slices, so longer rows, were not measured; with fewer blocks reading, computing and writing do not overlap.
constexpr int kSliceBytes = ((228 << 10) / kRowBlocks - 1024 - kLogitsAt) / 128 * 128;
constexpr int kRowSharedBytes = kLogitsAt + kSliceBytes;
constexpr int64_t kMaxRowBytes = int64_t{kMaxCluster} * kSliceBytes;  // CLUSTER_BYTES of kernels/linear_scope_loss.py

// logits `first` to first + kSize as z; beyond the vocabulary -inf
template <class L, int kSize>
__device__ void load_z(const LogitRows& x, const Packet<L, kSize>& packet, int64_t first, float scale, float (&z)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) z[i] = to_float(packet.values[i]);
  if (x.bias) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) z[i] += first + i < x.vocab ? x.bias[first + i] : 0.f;
  }
#pragma unroll
  for (int i = 0; i < kSize; ++i) z[i] *= scale;
  if (first + kSize > x.vocab) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      if (first + i >= x.vocab) z[i] = -INFINITY;
    }
  }
}

// 1 / temperature: the stream's; else the options' on RL rows and 1 on others
__device__ inline float row_scale(const LogitRows& x, int64_t at) {
  if (x.temperature) return 1.f / x.temperature[at];
  return x.segment[at] == rl ? 1.f / x.options.temperature : 1.f;
}

// what row_terms wants of a row beside its statistics
struct RowInputs {
  Row<float> streams;
  float z_target;  // before the scale; NaN outside the vocabulary

  template <class L>
  __device__ void load(const LogitRows& x, const L* row, int64_t at, int64_t target) {
    const float absent = nanf("");
    const auto stream = [&](const float* values) { return values ? values[at] : absent; };
    streams = {static_cast<float>(x.segment[at]), x.loss_weight[at],       stream(x.old_logprob),
               stream(x.advantage),               stream(x.ref_logprob), stream(x.rollout_logprob)};
    const bool known = target >= 0 && target < x.vocab;
    z_target = known ? to_float(row[target]) + (x.bias ? x.bias[target] : 0.f) : absent;
  }
};

// a cluster per row
template <class L, class G>
__global__ void __launch_bounds__(kRowThreads, kRowBlocks)
linear_scope_loss_kernel(const __grid_constant__ LogitRows x, int cluster) {
  constexpr int kSize = 16 / sizeof(L);
  using Logits = Packet<L, kSize>;
  struct alignas(kSize * sizeof(G) < 16 ? kSize * sizeof(G) : 16) Gradients {
    G values[kSize];
  };
  RowShared& shared = *reinterpret_cast<RowShared*>(shared_memory());
  Logits* const slice = reinterpret_cast<Logits*>(shared_memory() + kLogitsAt);

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const unsigned rank = cluster_rank();
  const int64_t r = blockIdx.x / cluster;
  const L* const row = static_cast<const L*>(x.logits) + r * x.logits_stride;
  const int64_t begin = int64_t{rank} * x.slice, end = (x.vocab + kLogitAlign - 1) / kLogitAlign * (kLogitAlign / kSize);
  const int count = static_cast<int>(end - begin < x.slice ? (end > begin ? end - begin : 0) : x.slice);
  const int group = (x.slice + kCopyGroups * kRowThreads - 1) / (kCopyGroups * kRowThreads) * kRowThreads;
  // f(i) for the thread's packets of group k
  const auto each = [&](int k, const auto& f) {
    const int stop = (k + 1) * group < count ? (k + 1) * group : count;
    for (int i = k * group + threadIdx.x; i < stop; i += kRowThreads) f(i);
  };

#pragma unroll
  for (int k = 0; k < kCopyGroups; ++k) {
    each(k, [&](int i) { copy_async(slice + i, reinterpret_cast<const Logits*>(row) + begin + i); });
    end_copy_group();
  }
  const int64_t at = x.index[r], target = x.target[at];
  const float scale = row_scale(x, at);
  RowInputs inputs{};
  if (threadIdx.x == 0) inputs.load(x, row, at, target);  // before the gradient may lie over the logits

  Softmax mine;
  const auto fold_packet = [&](int i) {
    float z[kSize];
    load_z(x, slice[i], (begin + i) * kSize, scale, z);
    fold(mine, z);
  };
  static_assert(kCopyGroups == 4);
  wait_for_copy_groups<3>();
  each(0, fold_packet);
  wait_for_copy_groups<2>();
  each(1, fold_packet);
  wait_for_copy_groups<1>();
  each(2, fold_packet);
  wait_for_copy_groups<0>();
  each(3, fold_packet);

  mine = over_lanes(mine, 32);
  if (lane == 0) shared.warps[warp] = mine;
  __syncthreads();
  if (warp == 0) {
    mine = over_lanes(lane < kRowThreads / 32 ? shared.warps[lane] : Softmax{}, kRowThreads / 32);
    if (lane == 0) shared.block = mine;
  }
  cluster_arrive();
  cluster_wait();
  if (warp == 0) {
    Softmax all;
    if (lane < cluster) {
      all.top = load_from(lane, &shared.block.top);
      all.s = load_from(lane, &shared.block.s);
      all.u = load_from(lane, &shared.block.u);
    }
    all = over_lanes(all, kMaxCluster);
    if (lane == 0) {
      const float log_s = logf(all.s);
      // a scaled logit may be rounded in one place and not in another: never a probability above 1. NaN stays
      const float raw = inputs.z_target * scale - all.top - log_s, logprob = raw > 0 ? 0.f : raw;
      const float raw_entropy = log_s - all.u / all.s, entropy = raw_entropy < 0 ? 0.f : raw_entropy;
      const Present has{x.old_logprob != nullptr, x.advantage != nullptr, x.rollout_logprob != nullptr};
      const RowTerms<float> terms = row_terms<float>(logprob, entropy, inputs.streams, has, x.options);
      if (rank == 0) {
#pragma unroll
        for (int i = 0; i < num_metrics; ++i) x.table[i * x.columns + x.first_column + r] = terms.metrics[i];
      }
      shared.top = all.top;
      shared.log_s = log_s;
      shared.entropy = entropy;
      shared.g = terms.g;
      shared.h = terms.h;
    }
  }
  cluster_arrive();  // this block has read the others' statistics
  __syncthreads();
  if (x.dlogits != nullptr) {
    const float top = shared.top, log_s = shared.log_s, entropy = shared.entropy, g = shared.g, h = shared.h;
    Gradients* const to = reinterpret_cast<Gradients*>(static_cast<G*>(x.dlogits) + r * x.dlogits_stride) + begin;
    for (int i = threadIdx.x; i < count; i += kRowThreads) {
      const int64_t first = (begin + i) * kSize;
      float z[kSize];
      load_z(x, slice[i], first, scale, z);
      Gradients out;
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        const float log_p = z[j] - top - log_s, p = exp2_fast(log_p * kLog2E);
        float dz = -p * g;
        if (h != 0) dz -= p > 0 ? p * h * (log_p + entropy) : 0.f;
        if (first + j == target) dz += g;
        from_float(dz * scale, out.values[j]);
      }
      to[i] = out;
    }
  }
  cluster_wait();  // nobody leaves before all have read its statistics
}

// blocks a row of `bytes` is spread over; 0: it is too long
inline int row_cluster(int64_t bytes) {
  int cluster = 1;
  while (cluster < kMaxCluster && cluster * int64_t{kSliceBytes} < bytes) cluster *= 2;
  return bytes > kMaxRowBytes ? 0 : cluster;
}

inline bool linear_scope_loss_fits() {
  return clusters_fit(linear_scope_loss_kernel<float, __nv_bfloat16>, kMaxCluster, kRowThreads, kRowSharedBytes);
}

// logits bfloat16 or float32; dlogits float32, or bfloat16 of either. slice is filled in here
inline cudaError_t launch_linear_scope_loss(LogitRows x, Element logits, Element dlogits, cudaStream_t stream) {
  if (x.num_rows == 0) return cudaSuccess;
  const auto run = [&](auto l, auto g) {
    using L = decltype(l);
    const int64_t padded = (x.vocab + kLogitAlign - 1) / kLogitAlign * kLogitAlign;
    const int64_t packets = padded * sizeof(L) / 16;
    const int cluster = row_cluster(packets * 16);
    if (cluster == 0) return cudaErrorInvalidValue;
    x.slice = static_cast<int32_t>((packets + cluster - 1) / cluster);
    return launch_clusters(linear_scope_loss_kernel<L, decltype(g)>, x.num_rows, cluster, kRowThreads,
                           kLogitsAt + x.slice * 16, kRowSharedBytes, stream, x);
  };
  if (logits == Element::f32 && dlogits == Element::bf16) return run(float{}, __nv_bfloat16{});
  if (logits == Element::bf16 && dlogits == Element::bf16) return run(__nv_bfloat16{}, __nv_bfloat16{});
  if (logits == Element::f32 && dlogits == Element::f32) return run(float{}, float{});
  return cudaErrorInvalidValue;
}

}  // namespace scope_fast
