// What linear_scope_loss and scope_loss share around row_terms: its options read, its metrics returned.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>

#include <algorithm>
#include <array>
#include <utility>

#include "cpu/row_terms.h"

namespace scope_fast {

using Metrics = std::array<double, num_metrics>;

template <class T>
RowOptions<T> row_options(at::ArrayRef<double> values) {
  TORCH_CHECK_VALUE(values.size() == 10, "options has ", values.size(), " values: expected RowOptions' 10");
  const auto at = [&](int i) { return static_cast<T>(values[i]); };
  return {at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7), at(8), at(9)};
}

inline std::pair<at::Tensor, at::Tensor> loss_and_metrics(const Metrics& sums, at::ScalarType dtype) {
  at::Tensor metrics = at::empty({num_metrics}, at::kDouble);
  std::copy(sums.begin(), sums.end(), metrics.mutable_data_ptr<double>());
  // through a tensor: a Scalar refuses a value that overflows float, and an overflowing loss must be infinite, not an error
  return {at::full({}, sums[loss_rl] + sums[loss_nll], at::kDouble).to(dtype), metrics.to(dtype)};
}

}  // namespace scope_fast
