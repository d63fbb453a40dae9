// What a loss asks of one row: its loss by component, its two gradient scalars, its metrics. The twin of row_terms in
// scope_fast/ops/reference.py; the formulas are those of batch.LossOptions' documentation.
//
// Everything is a template over V: one row, as a double (linear_scope_loss on a CPU) or a float (on a GPU), or a vector of
// them (scope_loss; cpu/vec.h, included first, has their `exponential`). No branch depends on a row's values: each lane
// computes what any of them needs, and what does not apply is masked at the end.
#pragma once

#include <cmath>
#include <limits>
#include <type_traits>

#if defined(__CUDACC__)
#define SCOPE_FAST_ROW __host__ __device__ __forceinline__
#else
#define SCOPE_FAST_ROW inline __attribute__((always_inline))
#endif

namespace scope_fast {

constexpr float kLogRatioClamp = 20.0f;  // exp(20) = 5e8: far beyond any clip

// METRICS of scope_fast/ops/options.py: sums, then maxima (0 over no rows)
enum Metric { loss_rl, loss_nll, rows, entropy_sum, kl_sum, clipped_rows, gap_sum, ratio_max, gap_max, num_metrics };
constexpr int kNumSums = 7;

constexpr int ignore = 0, rl = 1, nll = 2;  // batch.Segment

template <class V, class = void>
struct ScalarOf {
  using type = std::remove_cv_t<std::remove_reference_t<decltype(V{}[0])>>;
};
template <class V>
struct ScalarOf<V, std::enable_if_t<std::is_floating_point_v<V>>> {
  using type = V;
};
template <class V>
using Scalar = typename ScalarOf<V>::type;
template <class V>
using Mask = decltype(V{} < V{});

// RowOptions of scope_fast/ops/options.py, in its order
template <class T>
struct RowOptions {
  T clip_low, clip_high, dual_clip, policy_loss, kl, kl_coef, entropy_coef, importance_cap, nll_shape, temperature;
};

// The streams of a row; an absent one is NaN, and false in `Present` where its absence means something.
template <class V>
struct Row {
  V segment, weight, old_logprob, advantage, ref_logprob, rollout_logprob;
};
struct Present {
  bool old_logprob, advantage, rollout_logprob;
};

template <class V>
struct RowTerms {
  V g, h;  // dloss/dlogprob, dloss/dentropy
  V metrics[num_metrics];
};

// NaN stays NaN: a missing value must show
template <class V>
SCOPE_FAST_ROW V bounded(V x, Scalar<V> low, Scalar<V> high) {
  return x < low ? V{} + low : x > high ? V{} + high : x;
}

template <class V>
SCOPE_FAST_ROW V absolute(V x) {
  return x < 0 ? -x : x;
}

SCOPE_FAST_ROW float exponential(float x) { return std::exp(x); }
SCOPE_FAST_ROW double exponential(double x) { return std::exp(x); }

template <class V>
struct PolicyTerms {
  V loss, slope, log_ratio, ratio;
  Mask<V> clipped;
};

template <class V>
SCOPE_FAST_ROW PolicyTerms<V> policy_terms(V difference, V logprob, V A, V weight, const RowOptions<Scalar<V>>& o) {
  const V log_ratio = bounded(difference, -kLogRatioClamp, kLogRatioClamp);
  const V ratio = exponential(log_ratio);
  const V within = bounded(ratio, 1 - o.clip_low, 1 + o.clip_high);
  if (o.policy_loss != 0) {
    return {-weight * within * A * logprob, -weight * within * A, log_ratio, ratio, within != ratio};
  }
  V objective = ratio * A;
  Mask<V> clipped = within * A < objective;
  objective = clipped ? within * A : objective;
  if (o.dual_clip != 0) {
    const Mask<V> floored = A < 0 && o.dual_clip * A > objective;
    objective = floored ? o.dual_clip * A : objective;
    clipped = clipped || floored;
  }
  const Mask<V> flows = !clipped && absolute(difference) <= kLogRatioClamp;
  const V slope = objective != objective ? objective : flows ? ratio * A : V{};
  return {-weight * objective, -weight * slope, log_ratio, ratio, clipped};
}

template <class V>
struct ValueAndSlope {
  V value, slope;  // slope: in logprob
};

// an estimate of KL(policy || reference)
template <class V>
SCOPE_FAST_ROW ValueAndSlope<V> kl_terms(V difference, int kl) {
  if (kl == 1) return {difference, V{} + 1};
  if (kl == 2) return {difference * difference / 2, difference};
  const V c = bounded(-difference, -kLogRatioClamp, kLogRatioClamp);
  const V e = exponential(c);
  return {e - c - 1, absolute(difference) <= kLogRatioClamp ? 1 - e : V{}};
}

template <class V>
SCOPE_FAST_ROW ValueAndSlope<V> nll_terms(V logprob, V entropy, V weight, int shape) {
  constexpr Scalar<V> gamma = 0.1;  // LUFFY's p / (p + gamma)
  if (shape == 1) {
    const V p = exponential(logprob), q = p + gamma;
    return {-weight * p / q, -weight * gamma * p / (q * q)};
  }
  if (shape == 2) weight *= exponential(-entropy);
  return {-weight * logprob, -weight};
}

template <class V>
SCOPE_FAST_ROW RowTerms<V> row_terms(
    V logprob, V entropy, const Row<V>& row, const Present& has, const RowOptions<Scalar<V>>& o) {
  const V zero{};
  const Mask<V> weighted = row.weight != 0;
  Mask<V> is_rl = row.segment == rl && weighted;
  if (has.advantage && o.kl == 0 && o.entropy_coef == 0) is_rl = is_rl && row.advantage != 0;
  const Mask<V> is_nll = row.segment == nll && weighted;

  const V old = has.old_logprob ? row.old_logprob : logprob;
  // on policy not logprob - logprob: that is NaN for -inf; but a missing value shows
  const V difference = has.old_logprob ? logprob - old : logprob != logprob ? logprob : zero;
  V weight = row.weight;
  if (o.importance_cap != 0) {
    weight *= bounded(has.rollout_logprob ? exponential(old - row.rollout_logprob) : zero + 1, 0, o.importance_cap);
  }
  const V advantage = has.advantage ? row.advantage : zero + std::numeric_limits<Scalar<V>>::quiet_NaN();
  const PolicyTerms<V> policy = policy_terms(difference, logprob, advantage, weight, o);
  V loss = policy.loss, g = policy.slope, h = zero;
  if (o.kl != 0) {
    const auto kl = kl_terms(logprob - row.ref_logprob, static_cast<int>(o.kl));
    loss += row.weight * o.kl_coef * kl.value;
    g += row.weight * o.kl_coef * kl.slope;
  }
  if (o.entropy_coef != 0) {
    loss -= row.weight * o.entropy_coef * entropy;
    h = -row.weight * o.entropy_coef;
  }
  const V gap = has.rollout_logprob ? absolute(logprob - row.rollout_logprob) : zero;
  const auto likelihood = nll_terms(logprob, entropy, row.weight, static_cast<int>(o.nll_shape));

  RowTerms<V> terms;
  terms.g = is_rl ? g : is_nll ? likelihood.slope : zero;
  terms.h = is_rl ? h : zero;
  terms.metrics[loss_rl] = is_rl ? loss : zero;
  terms.metrics[loss_nll] = is_nll ? likelihood.value : zero;
  terms.metrics[rows] = is_rl ? zero + 1 : zero;
  terms.metrics[entropy_sum] = is_rl ? entropy : zero;
  terms.metrics[kl_sum] = is_rl ? policy.ratio - 1 - policy.log_ratio : zero;
  terms.metrics[clipped_rows] = is_rl && policy.clipped ? zero + 1 : zero;
  terms.metrics[gap_sum] = terms.metrics[gap_max] = is_rl ? gap : zero;
  terms.metrics[ratio_max] = is_rl ? policy.ratio : zero;
  return terms;
}

// metrics of more rows, lane by lane; a NaN stays
template <class V>
SCOPE_FAST_ROW void add_metrics(V* total, const V* more) {
  for (int i = 0; i < kNumSums; ++i) total[i] += more[i];
  for (int i = kNumSums; i < num_metrics; ++i) total[i] = more[i] > total[i] || more[i] != more[i] ? more[i] : total[i];
}

}  // namespace scope_fast
