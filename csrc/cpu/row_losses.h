// What linear_scope_loss and scope_loss share around row_terms: its options read (row_options), its metrics returned.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>

#include <algorithm>
#include <array>
#include <utility>

#include "cpu/vec.h"

#include "row_options.h"  // after the vectors, whose exponential row_terms calls

namespace scope_fast {

using Metrics = std::array<double, num_metrics>;

inline std::pair<at::Tensor, at::Tensor> loss_and_metrics(const Metrics& sums, at::ScalarType dtype) {
  at::Tensor metrics = at::empty({num_metrics}, at::kDouble);
  std::copy(sums.begin(), sums.end(), metrics.mutable_data_ptr<double>());
  // through a tensor: a Scalar refuses a value that overflows float, and an overflowing loss must be infinite, not an error
  return {at::full({}, sums[loss_rl] + sums[loss_nll], at::kDouble).to(dtype), metrics.to(dtype)};
}

}  // namespace scope_fast
