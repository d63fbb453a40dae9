// linear_scope_loss on CPU: one pass at 6*T*V*D flops. Per chunk of active rows: logits and softmax statistics, the row
// losses in double, then dlogits, dX and dW block by block while a block's dlogits are in cache. Replaces (T, V) logits,
// their log-softmax and their gradient by one chunk of logits; chunk_tokens=0 keeps not even those, at 8*T*V*D flops.
#include <ATen/ops/index_select.h>
#include <torch/library.h>

#include "cpu/entry.h"
#include "cpu/passes.h"
#include "cpu/row_losses.h"

namespace scope_fast {
namespace {

using OptionalTensor = std::optional<Tensor>;
using Options = RowOptions<double>;

// The streams of the active rows as doubles.
struct ActiveStreams {
  Tensor target, segment, weight, old_logprob, advantage, ref_logprob, rollout_logprob, temperature;
  Present has;

  Row<double> row(int64_t i) const {
    return {static_cast<double>(segment.const_data_ptr<uint8_t>()[i]), at(weight, i), at(old_logprob, i),
            at(advantage, i), at(ref_logprob, i), at(rollout_logprob, i)};
  }
  // the stream's, else the options' on RL rows and 1 on NLL rows; 1 on a row that is ignored
  double temperature_of(int64_t i, const Options& o) const {
    const int kind = segment.const_data_ptr<uint8_t>()[i];
    if (kind == ignore) return 1.0;
    return temperature.defined() ? at(temperature, i) : kind == rl ? o.temperature : 1.0;
  }

 private:
  static double at(const Tensor& stream, int64_t i) {
    return stream.defined() ? stream.const_data_ptr<double>()[i] : std::numeric_limits<double>::quiet_NaN();
  }
};

Tensor take(const OptionalTensor& stream, const Tensor& rows) {
  return stream ? doubles(at::index_select(*stream, 0, rows)) : Tensor();
}

// Tokens of a chunk whose logits are kept, of row_bytes each. Adding a chunk of C tokens to dweight moves 8 bytes per 6*C
// flops, so bfloat16, whose matmuls are twice as fast, wants twice the tokens.
int64_t kept_tokens(int64_t row_bytes, int64_t most, bool fast) {
  const int64_t least = fast ? 256 : 128;
  return std::max(least, std::min(most, least * (128 << 10) / row_bytes));
}

template <class Acc>
void row_losses(
    const ActiveStreams& streams, int64_t first, int64_t count, const Options& o, TokenValues<Acc>& values, Metrics& sums) {
  for (int64_t c = 0; c < count; ++c) {
    const auto terms = row_terms<double>(values.logprob[c], values.entropy[c], streams.row(first + c), streams.has, o);
    add_metrics(sums.data(), terms.metrics);
    values.set_gradient(c, terms.g, terms.h, 0.0);
  }
}

template <class In, class Op>
Metrics run(
    const Operands& x, const ActiveStreams& streams, const Tensor& rows, const Options& o, bool rounded,
    int64_t chunk_tokens, Needs needs, const Outputs& out) {
  using Acc = typename Head<In, Op>::Acc;
  const Head<In, Op> head(x.weight, x.bias);
  const int64_t total = rows.numel();
  const bool kept = needs.any() && chunk_tokens != 0;
  const int64_t most = head.tokens_within_partials(kept ? total : kBackwardTokens);
  const int64_t row_bytes = head.vocab * (rounded ? 2 : sizeof(Acc));
  const int64_t budget = kept ? kept_tokens(row_bytes, most, kPair<Op> == 2) : most;
  const int64_t size = chunk_size(total, budget, chunk_tokens);
  Gradients<In, Op> gradients(head, round_up(size, kMultiple), needs, out, /*one_chunk=*/size >= total);
  const LogitStore<Acc> store((size + kPanel - 1) / kPanel, head.vocab, kept, rounded);
  Metrics sums{};
  for (int64_t first = 0; first < total; first += size) {
    const int64_t count = std::min(size, total - first);
    const int64_t* index = rows.const_data_ptr<int64_t>() + first;
    const Tokens<In, Op> tokens(x.hidden.const_data_ptr<In>(), index, count, head.dim, needs.dweight);
    const Targets targets(streams.target.const_data_ptr<int64_t>() + first, count, head.vocab);
    TokenValues<Acc> values(tokens.padded);
    for (int64_t c = 0; c < count; ++c) values.inverse_temperature[c] = 1.0 / streams.temperature_of(first + c, o);
    stats_pass(head, tokens, targets, store, values);
    row_losses(streams, first, count, o, values, sums);
    if (needs.any()) gradients.add(tokens, index, targets, store, values, first + size >= total);
  }
  return sums;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> linear_scope_loss(
    const Tensor& hidden, const Tensor& weight, const OptionalTensor& bias, const Tensor& target, const Tensor& segment,
    const Tensor& loss_weight, const OptionalTensor& old_logprob, const OptionalTensor& advantage,
    const OptionalTensor& ref_logprob, const OptionalTensor& rollout_logprob, const OptionalTensor& temperature,
    const Tensor& rows, at::ArrayRef<double> options, std::string_view logits_dtype, int64_t chunk_tokens,
    bool need_dhidden, bool need_dweight, bool need_dbias) {
  const Options o = row_options<double>(options);
  const Tensor index = rows.contiguous();
  const ActiveStreams streams{
      at::index_select(target, 0, index), at::index_select(segment, 0, index), take(loss_weight, index),
      take(old_logprob, index), take(advantage, index), take(ref_logprob, index), take(rollout_logprob, index),
      take(temperature, index), {old_logprob.has_value(), advantage.has_value(), rollout_logprob.has_value()}};
  const Needs needs{need_dhidden, need_dweight, need_dbias};
  const Operands operands = prepare(hidden, weight, bias);
  const Outputs out = allocate(operands, needs, index.numel());
  const Metrics sums = dispatch_dtypes(hidden, [&](auto in, auto op) {
    return run<decltype(in), decltype(op)>(
        operands, streams, index, o, is_rounded(hidden, logits_dtype), chunk_tokens, needs, out);
  });
  const auto dtype = hidden.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const auto [loss, metrics] = loss_and_metrics(sums, dtype);
  return {loss, metrics, out.dhidden(operands), out.dweight(operands), out.dbias};
}

TORCH_LIBRARY_IMPL(scope_fast_native, CPU, m) { m.impl("linear_scope_loss", &linear_scope_loss); }

}  // namespace
}  // namespace scope_fast
