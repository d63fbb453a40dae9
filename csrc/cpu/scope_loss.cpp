// scope_loss on CPU: one pass over the streams, a vector of rows at a time. Replaces some forty elementwise kernels, each
// with a (T) tensor of its own; reads at most 29 bytes a row in float32 and writes 4, or 8 where there is an entropy.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "cpu/row_losses.h"

namespace scope_fast {

// The rows of one call, (T) each; an absent stream is null.
template <class T>
struct ScopeRows {
  const uint8_t* segment;
  const T *logprob, *entropy, *weight, *old_logprob, *advantage, *ref_logprob, *rollout_logprob;
  T *g, *h;  // h is null without an entropy
};

namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Rows whose metrics are summed in T, 512 / lanes to a lane, before they are added in double; blocks do not depend on
// the number of threads, so neither do the sums.
constexpr int64_t kBlockRows = 512;
constexpr int64_t kShareBlocks = 16;  // below this a thread costs more than it computes

// `count` values, at most a vector of them; zeros after them
template <int BYTES, class T>
SCOPE_FAST_INLINE Vec<T, BYTES> load_up_to(const T* from, int64_t count) {
  if (count * sizeof(T) >= BYTES) return load<BYTES>(from);
  Vec<T, BYTES> v{};
  std::memcpy(&v, from, count * sizeof(T));
  return v;
}

// the same of a stream from row i on; `absent` where there is none
template <int BYTES, class T>
SCOPE_FAST_INLINE Vec<T, BYTES> load_rows(const T* stream, int64_t i, int64_t count, T absent) {
  return stream == nullptr ? Vec<T, BYTES>{} + absent : load_up_to<BYTES>(stream + i, count);
}

template <int BYTES, class T>
SCOPE_FAST_INLINE void store_up_to(T* to, Vec<T, BYTES> v, int64_t count) {
  if (count * sizeof(T) >= BYTES) return store(to, v);
  std::memcpy(to, &v, count * sizeof(T));
}

// g and h of rows [first, last), and their metrics, a total in double
template <int MOST, class T>
SCOPE_FAST_INLINE void block_losses_body(
    const ScopeRows<T>& all, const Present& has, const RowOptions<T>& o, int64_t first, int64_t last, double* metrics) {
  // GCC 12 takes masks of 64 bytes apart, lane by lane, where two are combined: 15.5 ms in the place of 1.8 (2^20 rows)
  constexpr int BYTES = MOST < 32 ? MOST : 32;
  using V = Vec<T, BYTES>;
  constexpr int64_t lanes = BYTES / sizeof(T);
  constexpr T nan = std::numeric_limits<T>::quiet_NaN();
  V total[num_metrics] = {};
  for (int64_t i = first; i < last; i += lanes) {
    const int64_t count = last - i < lanes ? last - i : lanes;
    const Row<V> row{
        __builtin_convertvector(load_up_to<lanes>(all.segment + i, count), V),
        load_up_to<BYTES>(all.weight + i, count),
        load_rows<BYTES>(all.old_logprob, i, count, nan),
        load_rows<BYTES>(all.advantage, i, count, nan),
        load_rows<BYTES>(all.ref_logprob, i, count, nan),
        load_rows<BYTES>(all.rollout_logprob, i, count, nan)};
    const V logprob = load_up_to<BYTES>(all.logprob + i, count);
    const V entropy = load_rows<BYTES>(all.entropy, i, count, T(0));  // its sum is left out, where there is none
    const RowTerms<V> terms = row_terms(logprob, entropy, row, has, o);
    store_up_to<BYTES>(all.g + i, terms.g, count);
    if (all.h != nullptr) store_up_to<BYTES>(all.h + i, terms.h, count);
    add_metrics(total, terms.metrics);
  }
  for (int m = 0; m < num_metrics; ++m) metrics[m] = 0;
  for (int64_t lane = 0; lane < lanes; ++lane) {
    double of_lane[num_metrics];
    for (int m = 0; m < num_metrics; ++m) of_lane[m] = total[m][lane];
    add_metrics(metrics, of_lane);
  }
}

}  // namespace

SCOPE_FAST_MULTIVERSION(
    block_losses,
    (const ScopeRows<float>& all, const Present& has, const RowOptions<float>& o, int64_t first, int64_t last,
     double* metrics),
    (all, has, o, first, last, metrics))
SCOPE_FAST_MULTIVERSION(
    block_losses,
    (const ScopeRows<double>& all, const Present& has, const RowOptions<double>& o, int64_t first, int64_t last,
     double* metrics),
    (all, has, o, first, last, metrics))

namespace {

template <class T>
std::tuple<Tensor, Tensor, Tensor, Tensor> run(
    const Tensor& logprob, const OptionalTensor& entropy, const Tensor& segment, const Tensor& loss_weight,
    const OptionalTensor& old_logprob, const OptionalTensor& advantage, const OptionalTensor& ref_logprob,
    const OptionalTensor& rollout_logprob, at::ArrayRef<double> options) {
  constexpr auto dtype = c10::CppTypeToScalarType<T>::value;
  std::vector<Tensor> held;  // what was cast or made contiguous lives until the end
  const auto values = [&](const OptionalTensor& x) -> const T* {
    if (!x) return nullptr;
    held.push_back(x->to(dtype).contiguous());
    return held.back().template const_data_ptr<T>();
  };
  const int64_t count = logprob.numel();
  const Tensor segments = segment.contiguous();
  const Tensor g = at::empty({count}, logprob.options().dtype(dtype)), h = at::empty({entropy ? count : 0}, g.options());
  const ScopeRows<T> all{
      segments.const_data_ptr<uint8_t>(), values(logprob), values(entropy), values(loss_weight), values(old_logprob),
      values(advantage), values(ref_logprob), values(rollout_logprob), g.mutable_data_ptr<T>(),
      entropy ? h.mutable_data_ptr<T>() : nullptr};
  const Present has{old_logprob.has_value(), advantage.has_value(), rollout_logprob.has_value()};
  const RowOptions<T> o = row_options<T>(options);
  const int64_t blocks = (count + kBlockRows - 1) / kBlockRows;
  std::vector<Metrics> of_block(blocks);
  at::parallel_for(0, blocks, kShareBlocks, [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
      const int64_t end = std::min(count, (block + 1) * kBlockRows);
      block_losses(all, has, o, block * kBlockRows, end, of_block[block].data());
    }
  });
  Metrics sums{};
  for (const Metrics& more : of_block) add_metrics(sums.data(), more.data());
  const auto [loss, metrics] = loss_and_metrics(sums, dtype);
  return {loss, metrics, g, h};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> scope_loss(
    const Tensor& logprob, const OptionalTensor& entropy, const Tensor& segment, const Tensor& loss_weight,
    const OptionalTensor& old_logprob, const OptionalTensor& advantage, const OptionalTensor& ref_logprob,
    const OptionalTensor& rollout_logprob, at::ArrayRef<double> options) {
  const auto& f = logprob.scalar_type() == at::kDouble ? run<double> : run<float>;
  return f(logprob, entropy, segment, loss_weight, old_logprob, advantage, ref_logprob, rollout_logprob, options);
}

TORCH_LIBRARY_IMPL(scope_fast_native, CPU, m) { m.impl("scope_loss", &scope_loss); }

}  // namespace
}  // namespace scope_fast
