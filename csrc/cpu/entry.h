// From tensors to the kernels' pointers and back: what linear_scope_loss and linear_logprob share at their door.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <optional>
#include <string_view>

#include "cpu/matmul.h"

namespace scope_fast {

using at::Tensor;

struct Needs {
  bool dhidden, dweight, dbias;
  bool any() const { return dhidden || dweight || dbias; }
};

// Contiguous, and with an even hidden size where bfloat16 operands are packed in pairs.
struct Operands {
  Tensor hidden, weight;
  std::optional<Tensor> bias;
  int64_t dim;  // before padding
};

inline Operands prepare(const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias) {
  const int64_t dim = hidden.size(1);
  const bool odd = hidden.scalar_type() == at::kBFloat16 && dim % 2 == 1;
  const auto even = [odd](const Tensor& x) { return odd ? at::constant_pad_nd(x, {0, 1}) : x.contiguous(); };
  return {even(hidden), even(weight), bias ? std::optional<Tensor>(bias->contiguous()) : std::nullopt, dim};
}

// The gradients of Operands; one that is not needed has shape (0,).
struct Outputs {
  Tensor dhidden_, dweight_, dbias;
  // without the column of padding
  static Tensor unpadded(const Tensor& gradient, const Operands& x) {
    return gradient.dim() == 2 && gradient.size(1) != x.dim ? gradient.narrow(1, 0, x.dim).contiguous() : gradient;
  }
  Tensor dhidden(const Operands& x) const { return unpadded(dhidden_, x); }
  Tensor dweight(const Operands& x) const { return unpadded(dweight_, x); }
};

// num_rows: how many rows of hidden will be written; all of weight's are, unless there are none
inline Outputs allocate(const Operands& x, const Needs& needs, int64_t num_rows) {
  const auto new_like = [](const Tensor& like, bool needed, bool covered) {
    if (!needed) return at::empty({0}, like.options());
    return covered ? at::empty(like.sizes(), like.options()) : at::zeros(like.sizes(), like.options());
  };
  Tensor dbias = at::empty({0}, x.weight.options());
  if (needs.dbias) dbias = at::zeros({x.weight.size(0)}, x.weight.options());
  return {new_like(x.hidden, needs.dhidden, num_rows == x.hidden.size(0)), new_like(x.weight, needs.dweight, num_rows > 0),
          dbias};
}

inline Tensor doubles(const Tensor& x) { return x.to(at::kDouble).contiguous(); }

// tokens per chunk: as asked, else at most `most`, in chunks of equal size
inline int64_t chunk_size(int64_t tokens, int64_t most, int64_t chunk_tokens) {
  if (tokens == 0) return 1;
  if (chunk_tokens > 0) return std::min(chunk_tokens, tokens);
  const int64_t chunks = (tokens + most - 1) / most;
  return (tokens + chunks - 1) / chunks;
}

inline bool is_rounded(const Tensor& hidden, std::string_view logits_dtype) {
  return hidden.scalar_type() == at::kBFloat16 && logits_dtype == "bfloat16";
}

// f(In, Op): element types of the inputs and of the matmuls' operands
template <class F>
auto dispatch_dtypes(const Tensor& hidden, const F& f) {
  switch (hidden.scalar_type()) {
    case at::kDouble: return f(double{}, double{});
    case at::kFloat: return f(float{}, float{});
    default:
      TORCH_CHECK_VALUE(hidden.scalar_type() == at::kBFloat16, "hidden is ", hidden.scalar_type());
      return has_bfloat16_matmul() ? f(BFloat16{}, BFloat16{}) : f(BFloat16{}, float{});
  }
}

}  // namespace scope_fast
