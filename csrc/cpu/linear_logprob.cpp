// linear_logprob on CPU. The forward reads each block of logits from cache and never writes them to memory; the backward
// recomputes them block by block, so neither direction ever holds a chunk of logits (2*T*V*D and 6*T*V*D flops).
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <torch/library.h>

#include "cpu/entry.h"
#include "cpu/passes.h"

namespace scope_fast {
namespace {

using OptionalTensor = std::optional<Tensor>;

struct Inputs {
  Operands operands;
  Tensor target, temperature, index;  // temperature in double; index: every row
  bool rounded;
  int64_t chunk_tokens;

  Inputs(const Tensor& hidden, const Tensor& weight, const OptionalTensor& bias, const Tensor& target,
         const OptionalTensor& temperature, double scale, std::string_view logits_dtype, int64_t chunk_tokens)
      : operands(prepare(hidden, weight, bias)), target(target.contiguous()),
        temperature(temperature ? doubles(*temperature) : at::full({target.numel()}, scale, at::kDouble)),
        index(at::arange(target.numel(), at::kLong)), rounded(is_rounded(hidden, logits_dtype)),
        chunk_tokens(chunk_tokens) {}
};

// f(tokens, targets, values, store, first row, last chunk?) for every chunk
template <class In, class Op, class F>
void for_each_chunk(const Inputs& in, const Head<In, Op>& head, int64_t size, bool need_rows, const F& f) {
  using Acc = typename Head<In, Op>::Acc;
  const int64_t total = in.target.numel();
  const LogitStore<Acc> store(0, head.vocab, /*kept=*/false, in.rounded);
  for (int64_t first = 0; first < total; first += size) {
    const int64_t count = std::min(size, total - first);
    const int64_t* index = in.index.template const_data_ptr<int64_t>() + first;
    const Tokens<In, Op> tokens(in.operands.hidden.template const_data_ptr<In>(), index, count, head.dim, need_rows);
    const Targets targets(in.target.template const_data_ptr<int64_t>() + first, count, head.vocab);
    TokenValues<Acc> values(tokens.padded);
    for (int64_t c = 0; c < count; ++c) {
      values.inverse_temperature[c] = 1.0 / in.temperature.template const_data_ptr<double>()[first + c];
    }
    f(tokens, targets, values, store, first, first + size >= total);
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_logprob(
    const Tensor& hidden, const Tensor& weight, const OptionalTensor& bias, const Tensor& target,
    const OptionalTensor& temperature, double scale, std::string_view logits_dtype, int64_t chunk_tokens) {
  const Inputs in(hidden, weight, bias, target, temperature, scale, logits_dtype, chunk_tokens);
  const int64_t total = target.numel();
  const Tensor out = at::empty({5, total}, at::kDouble);  // logprob, entropy, logsumexp, top, log_sum
  double* to = out.mutable_data_ptr<double>();
  dispatch_dtypes(hidden, [&](auto i, auto o) {
    const Head<decltype(i), decltype(o)> head(in.operands.weight, in.operands.bias);
    const int64_t size = chunk_size(total, kForwardTokens, chunk_tokens);
    for_each_chunk(in, head, size, false, [&](auto& tokens, auto& targets, auto& values, auto& store, int64_t first, bool) {
      stats_pass(head, tokens, targets, store, values);
      for (int64_t c = 0; c < tokens.count; ++c) {
        const double top = values.top[c], log_sum = values.log_sum[c];
        const double row[5] = {values.logprob[c], values.entropy[c], top + log_sum, top, log_sum};
        for (int k = 0; k < 5; ++k) to[k * total + first + c] = row[k];
      }
    });
  });
  const Tensor result = out.to(hidden.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
  // copies: a custom op's outputs may not share memory
  return {result.select(0, 0).clone(), result.select(0, 1).clone(), result.select(0, 2).clone(),
          result.narrow(0, 3, 2).clone()};
}

std::tuple<Tensor, Tensor, Tensor> linear_logprob_backward(
    const Tensor& grad_logprob, const Tensor& grad_entropy, const Tensor& grad_logsumexp, const Tensor& hidden,
    const Tensor& weight, const OptionalTensor& bias, const Tensor& target, const OptionalTensor& temperature,
    double scale, const Tensor& entropy, const Tensor& state, std::string_view logits_dtype, int64_t chunk_tokens,
    bool need_dhidden, bool need_dweight, bool need_dbias) {
  const Inputs in(hidden, weight, bias, target, temperature, scale, logits_dtype, chunk_tokens);
  const Needs needs{need_dhidden, need_dweight, need_dbias};
  const Outputs out = allocate(in.operands, needs, target.numel());
  const Tensor grads[] = {doubles(grad_logprob), doubles(grad_entropy), doubles(grad_logsumexp)};
  const Tensor entropies = doubles(entropy), states = doubles(state);
  const int64_t total = target.numel();
  dispatch_dtypes(hidden, [&](auto i, auto o) {
    using In = decltype(i);
    const Head<In, decltype(o)> head(in.operands.weight, in.operands.bias);
    const int64_t size = chunk_size(total, head.tokens_within_partials(kBackwardTokens), chunk_tokens);
    Gradients<In, decltype(o)> gradients(head, round_up(size, kMultiple), needs, out, size >= total);
    for_each_chunk(in, head, size, needs.dweight, [&](auto& tokens, auto& targets, auto& values, auto& store, int64_t first, bool last) {
      const auto at = [first](const Tensor& x, int64_t c) { return x.const_data_ptr<double>()[first + c]; };
      for (int64_t c = 0; c < tokens.count; ++c) {
        values.top[c] = at(states, c);
        values.log_sum[c] = at(states, total + c);
        values.entropy[c] = at(entropies, c);
        values.set_gradient(c, at(grads[0], c), at(grads[1], c), at(grads[2], c));
      }
      gradients.add(tokens, in.index.const_data_ptr<int64_t>() + first, targets, store, values, last);
    });
  });
  return {out.dhidden(in.operands), out.dweight(in.operands), out.dbias};
}

TORCH_LIBRARY_IMPL(scope_fast_native, CPU, m) {
  m.impl("linear_logprob", &linear_logprob);
  m.impl("linear_logprob_backward", &linear_logprob_backward);
}

}  // namespace
}  // namespace scope_fast
