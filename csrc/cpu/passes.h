// The two passes over a chunk: softmax statistics of every token, then gradients from two coefficients per token.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/entry.h"
#include "cpu/head.h"

namespace scope_fast {

// What the passes know of each token of a chunk (padded). `top` and `log_sum` apart, because their sum loses digits of a
// huge max. The gradient in y is p (slope + curve log p), plus `indicator` at the target; slope and curve are already
// divided by the temperature. Tokens of the padding have p = 0 whatever the bias: their slope of 0 times infinity would
// be NaN in dweight.
template <class Acc>
struct TokenValues {
  std::vector<Acc> inverse_temperature, top, log_sum, slope, curve, indicator;
  std::vector<double> logprob, entropy;

  explicit TokenValues(int64_t padded)
      : inverse_temperature(padded, 1), top(padded, std::numeric_limits<Acc>::max()), log_sum(padded, 0), slope(padded, 0), curve(padded, 0),
        indicator(padded, 0), logprob(padded, std::numeric_limits<double>::quiet_NaN()), entropy(padded, 0) {}

  // g, h, k: the gradients of the token's logprob, entropy and logsumexp
  void set_gradient(int64_t c, double g, double h, double k) {
    const double inverse = inverse_temperature[c];
    slope[c] = static_cast<Acc>(inverse * (k - g - h * entropy[c]));
    curve[c] = static_cast<Acc>(-inverse * h);
    indicator[c] = static_cast<Acc>(inverse * g);
  }
};

// Fills top, log_sum, logprob and entropy of `values`, and `store` with the logits if it keeps them.
template <class In, class Op, class Acc>
void stats_pass(
    const Head<In, Op>& head, const Tokens<In, Op>& tokens, const Targets& targets, const LogitStore<Acc>& store,
    TokenValues<Acc>& values) {
  const int64_t tasks = head.blocks.tasks, padded = tokens.padded;
  std::vector<Acc> top(tasks * padded, -std::numeric_limits<Acc>::infinity());
  std::vector<double> sum(tasks * padded, 0.0), weighted(tasks * padded, 0.0);
  std::vector<double> target_logit(padded, std::numeric_limits<double>::quiet_NaN());
  head.blocks.for_each([&](int64_t task, int64_t first, int64_t last) {
    Buffer<Acc> scratch(kBlock * kPanel);
    Buffer<BFloat16> rounded(kBlock * kPanel);
    Buffer<Op> operand_scratch(std::is_same_v<In, Op> ? 0 : kBlock * head.dim);
    for (int64_t block = first; block < last; ++block) {
      const int64_t v = block * kBlock, rows = head.rows(block);
      const Op* operand = head.operand(block, operand_scratch.data());
      for (int64_t p = 0; p < tokens.num_panels(); ++p) {
        const int64_t c = p * kPanel, at = task * padded + c;
        Acc* z = store.slot(p, v, scratch.data());
        head.logits(operand, block, tokens, p, z);
        store.finish(p, v, rows, z, rounded.data());
        const Acc* bias = head.bias.data() + v;
        update_stats(
            Block<Acc>{z, rows, tokens.width(p), bias, values.inverse_temperature.data() + c},
            Stats<Acc>{top.data() + at, sum.data() + at, weighted.data() + at});
        targets.for_each_in(p, v, v + rows, [&](int64_t target, int64_t token) {
          const Acc y = (z[(target - v) * kPanel + token - c] + bias[target - v]) * values.inverse_temperature[token];
          target_logit[token] = y;
        });
      }
    }
  });
  for (int64_t c = 0; c < padded; ++c) {
    const Stats<Acc> total{top.data(), sum.data(), weighted.data()};
    for (int64_t task = 1; task < tasks; ++task) {
      const int64_t at = task * padded + c;
      merge_stats<Acc>(total, c, top[at], sum[at], weighted[at]);
    }
    const double log_sum = std::log(sum[c]);
    values.top[c] = top[c];
    values.log_sum[c] = static_cast<Acc>(log_sum);
    // a scaled logit may be rounded in one place and not in another: never a probability above 1. NaN stays
    values.logprob[c] = std::min((target_logit[c] - top[c]) - log_sum, 0.0);
    values.entropy[c] = std::max(log_sum - weighted[c] / sum[c], 0.0);
  }
}

// dhidden, dweight and dbias of one call, chunk by chunk.
template <class In, class Op>
class Gradients {
 public:
  using Acc = typename Head<In, Op>::Acc;
  static constexpr bool kCasts = !std::is_same_v<In, Acc>;  // dweight is summed wider than it is returned

  // one_chunk: every chunk is the first and the last, so that a block of dweight can be cast without a copy of V x D
  Gradients(const Head<In, Op>& head, int64_t max_padded, Needs needs, const Outputs& out, bool one_chunk)
      : head_(head), needs_(needs), dhidden_(out.dhidden_.template mutable_data_ptr<In>()),
        dweight_(out.dweight_.template mutable_data_ptr<In>()), dbias_(out.dbias.template mutable_data_ptr<In>()),
        partial_stride_(max_padded * head.dim), partial_(needs.dhidden ? head.blocks.tasks * partial_stride_ : 0),
        wide_(needs.dweight && kCasts && !one_chunk ? head.vocab * head.dim : 0), one_chunk_(one_chunk),
        wide_bias_(needs.dbias ? head.vocab : 0) {
    advise_huge(dweight_, out.dweight_.nbytes());
  }

  void add(const Tokens<In, Op>& tokens, const int64_t* index, const Targets& targets, const LogitStore<Acc>& store,
           const TokenValues<Acc>& values, bool last_chunk) {
    head_.blocks.for_each([&](int64_t task, int64_t first, int64_t last) {
      Workspace ws(head_.dim, needs_, one_chunk_);
      for (int64_t block = first; block < last; ++block) {
        Place at{tokens, targets, store, values, block, task, block == first};
        add_block(at, ws);
        if (last_chunk) cast_block(block, ws);
      }
    });
    if (needs_.dhidden) reduce_dhidden(tokens, index);
    first_chunk_ = false;
  }

 private:
  struct Workspace {
    Buffer<Acc> logits, dz, dweight;
    Buffer<Op> operand, weight_rows, rounded, transposed;
    Buffer<uint32_t> pairs;
    Buffer<BFloat16> narrow;
    Workspace(int64_t dim, const Needs& needs, bool one_chunk)
        : logits(kBlock * kPanel), dz(kBlock * kGroup), dweight(kCasts && needs.dweight && one_chunk ? kBlock * dim : 0),
          operand(std::is_same_v<In, Op> ? 0 : kBlock * dim), weight_rows(needs.dhidden ? kBlock * dim : 0),
          rounded(kPair<Op> == 2 ? kBlock * kGroup : 0), transposed(kGroup * kBlock),
          pairs(kPair<Op> == 2 ? kBlock / 2 * kPanel : 0), narrow(kBlock * kPanel) {}
    const Op* dlogits() const {
      if constexpr (std::is_same_v<Op, Acc>) {
        return dz.data();
      } else {
        return rounded.data();
      }
    }
  };
  struct Place {
    const Tokens<In, Op>& tokens;
    const Targets& targets;
    const LogitStore<Acc>& store;
    const TokenValues<Acc>& values;
    int64_t block, task;
    bool first_block;
  };

  void add_block(const Place& at, const Workspace& ws) {
    const int64_t rows = head_.rows(at.block);
    const Op* operand = at.store.kept() ? nullptr : head_.operand(at.block, ws.operand.data());
    if (needs_.dhidden) {
      pack_rows(head_.weight + at.block * kBlock * head_.dim, rows, head_.dim, ws.weight_rows.data());
    }
    for (int64_t group = 0; group < at.tokens.num_groups(); ++group) {
      for (int64_t p = at.tokens.first_panel(group); p < at.tokens.last_panel(group); ++p) {
        const int64_t column = (p - at.tokens.first_panel(group)) * kPanel;
        panel_dlogits(at, p, operand, column, ws);
        if (needs_.dbias) add_bias(at, p, ws.dz + column);
        transpose_panel(rows, at.tokens.width(p), column, ws);
      }
      if (needs_.dweight) add_dweight(at, group, ws);
      if (needs_.dhidden) add_dhidden(at, group, ws);
    }
  }

  // dz (rows, kGroup) at `column`, and zeros below it to whole tiles of the transposition
  void panel_dlogits(const Place& at, int64_t p, const Op* operand, int64_t column, const Workspace& ws) const {
    const int64_t v = at.block * kBlock, rows = head_.rows(at.block), width = at.tokens.width(p), c = p * kPanel;
    const Acc* z = ws.logits.data();
    if (at.store.kept()) {
      z = at.store.load(p, v, rows, ws.logits.data());
    } else {
      head_.logits(operand, at.block, at.tokens, p, ws.logits.data());
      at.store.finish(p, v, rows, ws.logits.data(), ws.narrow.data());
    }
    Acc* dz = ws.dz + column;
    const auto& t = at.values;
    slopes_of(
        Block<Acc>{z, rows, width, head_.bias.data() + v, t.inverse_temperature.data() + c},
        Slopes<Acc>{t.top.data() + c, t.log_sum.data() + c, t.slope.data() + c, t.curve.data() + c}, dz);
    at.targets.for_each_in(p, v, v + rows, [&](int64_t target, int64_t token) {
      dz[(target - v) * kGroup + token - c] += t.indicator[token];
    });
    for (int64_t r = rows; r < std::min(round_up(rows, 32), kBlock); ++r) std::fill_n(dz + r * kGroup, width, Acc(0));
  }

  void add_bias(const Place& at, int64_t p, const Acc* dz) {
    for (int64_t r = 0; r < head_.rows(at.block); ++r) {
      Acc total = 0;
      for (int64_t c = 0; c < at.tokens.width(p); ++c) total += dz[r * kGroup + c];
      Acc& sum = *(wide_bias_ + (at.block * kBlock + r));
      sum = first_chunk_ && p == 0 ? total : sum + total;
    }
  }

  void transpose_panel(int64_t rows, int64_t width, int64_t column, const Workspace& ws) const {
    const Acc* dz = ws.dz + column;
    Op* to = ws.transposed + column * kBlock;
    const int64_t whole = std::min(round_up(rows, 32), kBlock);
    if constexpr (std::is_same_v<Op, double>) {
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t c = 0; c < width; ++c) to[c * kBlock + r] = dz[r * kGroup + c];
      }
    } else if constexpr (std::is_same_v<Op, float>) {
      transpose_words(
          reinterpret_cast<const uint32_t*>(dz), kGroup, whole, width, reinterpret_cast<uint32_t*>(to), kBlock);
    } else {
      round_pairs(dz, whole, width, reinterpret_cast<uint16_t*>(ws.rounded + column), ws.pairs.data());
      transpose_words(ws.pairs.data(), kPanel, whole / 2, width, reinterpret_cast<uint32_t*>(to), kBlock / 2);
    }
  }

  // dweight[block] (rows, dim) += dz (rows, tokens of the group) @ hidden
  void add_dweight(const Place& at, int64_t group, const Workspace& ws) {
    const int64_t dim = head_.dim, depth = at.tokens.depth(group);
    const bool add = group > 0 || !first_chunk_;
    Acc* to = sum_of(at.block, ws);
    for (int64_t d = 0; d < dim; d += kPanel) {
      const int64_t columns = std::min(kPanel, dim - d);
      const Op* hidden = at.tokens.rows + (group * kGroup * dim + d * depth);
      multiply({head_.rows(at.block), columns, depth}, ws.dlogits(), kGroup, hidden, columns, to + d, dim, add);
    }
  }

  // where the block's dweight is summed
  Acc* sum_of(int64_t block, const Workspace& ws) const {
    if constexpr (kCasts) {
      return one_chunk_ ? ws.dweight.data() : wide_ + block * kBlock * head_.dim;
    } else {
      return dweight_ + block * kBlock * head_.dim;
    }
  }

  // partial dhidden of this task, (tokens of the group, dim) += dz^T @ weight[block]
  void add_dhidden(const Place& at, int64_t group, const Workspace& ws) {
    const int64_t dim = head_.dim, depth = round_up(head_.rows(at.block), kPair<Op>);
    Acc* to = partial_ + (at.task * partial_stride_ + group * kGroup * dim);
    for (int64_t p = at.tokens.first_panel(group); p < at.tokens.last_panel(group); ++p) {
      const int64_t row = (p - at.tokens.first_panel(group)) * kPanel;
      for (int64_t d = 0; d < dim; d += kPanel) {
        const int64_t columns = std::min(kPanel, dim - d);
        multiply({at.tokens.width(p), columns, depth}, ws.transposed + row * kBlock, kBlock, ws.weight_rows + d * depth,
                 columns, to + row * dim + d, dim, !at.first_block);
      }
    }
  }

  void cast_block(int64_t block, const Workspace& ws) {
    const int64_t v = block * kBlock, rows = head_.rows(block), dim = head_.dim;
    if constexpr (kCasts) {
      if (needs_.dweight) convert(sum_of(block, ws), rows * dim, dweight_ + v * dim);
    }
    if (needs_.dbias) convert(wide_bias_ + v, rows, dbias_ + v);
  }

  void reduce_dhidden(const Tokens<In, Op>& tokens, const int64_t* index) {
    const int64_t dim = head_.dim, tasks = head_.blocks.tasks;
    at::parallel_for(0, tokens.count, 8, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) {
        Acc* total = partial_ + c * dim;
        for (int64_t task = 1; task < tasks; ++task) {
          const Acc* part = partial_ + (task * partial_stride_ + c * dim);
          for (int64_t d = 0; d < dim; ++d) total[d] += part[d];
        }
        convert(total, dim, dhidden_ + index[c] * dim);
      }
    });
  }

  const Head<In, Op>& head_;
  Needs needs_;
  In *dhidden_, *dweight_, *dbias_;
  int64_t partial_stride_;
  Buffer<Acc> partial_;
  Buffer<Acc> wide_;  // dweight (V, D) between chunks, where it is summed wider than it is returned
  bool one_chunk_, first_chunk_ = true;
  Buffer<Acc> wide_bias_;
};

}  // namespace scope_fast
