// What a loss asks of one row: its loss by component, its two gradient scalars, its metrics. The scalar twin, in double,
// of row_terms in scope_fast/ops/reference.py; the formulas are those of batch.LossOptions' documentation.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>

namespace scope_fast {

constexpr double kLogRatioClamp = 20.0;  // exp(20) = 5e8: far beyond any clip
constexpr double kShapedGamma = 0.1;     // LUFFY's p / (p + gamma)
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

// METRICS of scope_fast/ops/options.py: sums, then maxima (0 over no rows)
enum Metric { loss_rl, loss_nll, rows, entropy_sum, kl_sum, clipped_rows, gap_sum, ratio_max, gap_max, num_metrics };
constexpr int kNumSums = 7;
using Metrics = std::array<double, num_metrics>;

// RowOptions of scope_fast/ops/options.py, in its order
struct RowOptions {
  double clip_low, clip_high, dual_clip, policy_loss, kl, kl_coef, entropy_coef, importance_cap, nll_shape, temperature;
};

enum Segment : int { ignore = 0, rl = 1, nll = 2 };

// The streams of one row; an absent stream is false in `Present` and its value is not read.
struct Row {
  int segment;
  double weight, old_logprob, advantage, ref_logprob, rollout_logprob;
};
struct Present {
  bool old_logprob, advantage, rollout_logprob;
};

struct RowTerms {
  double g = 0, h = 0;  // dloss/dlogprob, dloss/dentropy
  Metrics metrics{};
};

// NaN stays NaN: a missing value must show
inline double bounded(double x, double low, double high) { return x < low ? low : x > high ? high : x; }

struct PolicyTerms {
  double loss, slope, log_ratio;
  bool clipped;
};

inline PolicyTerms policy_terms(double difference, double logprob, double A, double weight, const RowOptions& o) {
  const double log_ratio = bounded(difference, -kLogRatioClamp, kLogRatioClamp);
  const double ratio = std::exp(log_ratio);
  const double within = bounded(ratio, 1 - o.clip_low, 1 + o.clip_high);
  if (o.policy_loss != 0) {
    return {-weight * within * A * logprob, -weight * within * A, log_ratio, within != ratio};
  }
  double objective = ratio * A;
  bool clipped = within * A < objective;
  if (clipped) objective = within * A;
  if (o.dual_clip != 0 && A < 0 && o.dual_clip * A > objective) {
    objective = o.dual_clip * A;
    clipped = true;
  }
  const bool flows = !clipped && std::abs(difference) <= kLogRatioClamp;
  const double slope = std::isnan(objective) ? objective : flows ? ratio * A : 0.0;
  return {-weight * objective, -weight * slope, log_ratio, clipped};
}

// {estimate of KL(policy || reference), its slope in logprob}
inline std::pair<double, double> kl_terms(double difference, int kl) {
  if (kl == 1) return {difference, 1.0};
  if (kl == 2) return {difference * difference / 2, difference};
  const double c = bounded(-difference, -kLogRatioClamp, kLogRatioClamp);
  const double slope = std::abs(difference) <= kLogRatioClamp ? 1 - std::exp(c) : 0.0;
  return {std::exp(c) - c - 1, slope};
}

// {loss, its slope in logprob}
inline std::pair<double, double> nll_terms(double logprob, double entropy, double weight, int shape) {
  if (shape == 1) {
    const double p = std::exp(logprob), q = p + kShapedGamma;
    return {-weight * p / q, -weight * kShapedGamma * p / (q * q)};
  }
  if (shape == 2) weight *= std::exp(-entropy);
  return {-weight * logprob, -weight};
}

inline RowTerms rl_terms(double logprob, double entropy, const Row& row, const Present& has, const RowOptions& o) {
  const double old = has.old_logprob ? row.old_logprob : logprob;
  const double difference = has.old_logprob ? logprob - old : 0.0;
  const double gap = has.rollout_logprob ? logprob - row.rollout_logprob : 0.0;
  double weight = row.weight;
  if (o.importance_cap != 0) {
    const double rho = has.rollout_logprob ? std::exp(old - row.rollout_logprob) : 1.0;
    weight *= bounded(rho, 0.0, o.importance_cap);
  }
  const PolicyTerms policy = policy_terms(difference, logprob, has.advantage ? row.advantage : kNan, weight, o);
  RowTerms terms;
  double loss = policy.loss;
  terms.g = policy.slope;
  if (o.kl != 0) {
    const auto [value, slope] = kl_terms(logprob - row.ref_logprob, static_cast<int>(o.kl));
    loss += row.weight * o.kl_coef * value;
    terms.g += row.weight * o.kl_coef * slope;
  }
  if (o.entropy_coef != 0) {
    loss -= row.weight * o.entropy_coef * entropy;
    terms.h = -row.weight * o.entropy_coef;
  }
  const double old_kl = std::exp(-policy.log_ratio) - 1 + policy.log_ratio;
  terms.metrics = {loss,          0.0, 1.0, entropy, old_kl, policy.clipped ? 1.0 : 0.0, std::abs(gap),
                   std::exp(policy.log_ratio), std::abs(gap)};
  return terms;
}

inline RowTerms row_terms(double logprob, double entropy, const Row& row, const Present& has, const RowOptions& o) {
  RowTerms terms;
  const bool weighted = row.weight != 0;
  const bool flows = !has.advantage || row.advantage != 0 || o.kl != 0 || o.entropy_coef != 0;
  if (row.segment == rl && weighted && flows) return rl_terms(logprob, entropy, row, has, o);
  if (row.segment == nll && weighted) {
    const auto [loss, slope] = nll_terms(logprob, entropy, row.weight, static_cast<int>(o.nll_shape));
    terms.g = slope;
    terms.metrics[loss_nll] = loss;
  }
  return terms;
}

inline void add_metrics(Metrics& total, const Metrics& row) {
  for (int i = 0; i < kNumSums; ++i) total[i] += row[i];
  for (int i = kNumSums; i < num_metrics; ++i) {
    if (row[i] > total[i] || std::isnan(row[i])) total[i] = row[i];  // a NaN in the total stays
  }
}

}  // namespace scope_fast
