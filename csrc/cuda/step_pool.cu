// scope_fast_native::step_pool on CUDA tensors: checks, allocation, and the launch of step_pool.cuh.
#include "cuda/step_pool.cuh"

#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>

#include "cuda/entry.h"

namespace scope_fast {
namespace {

using at::Tensor;
using Result = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Result step_pool(const Tensor& hidden, const Tensor& step_end, const Tensor& cu_steps, const Tensor& weight,
                 const std::optional<Tensor>& bias, const std::optional<Tensor>& hidden_weight,
                 const std::optional<Tensor>& hidden_bias, int64_t positive, double tau) {
  TORCH_CHECK_VALUE(!hidden_weight && !hidden_bias, "hidden_weight: the cuda backend has no kernel for MLP heads, use triton");
  TORCH_CHECK_VALUE(weight.dim() == 2 && (weight.size(0) == 1 || weight.size(0) == 2), "weight ", weight.sizes(),
                    ": expected (1, D) or (2, D)");
  TORCH_CHECK_VALUE(hidden.dim() == 2 && hidden.size(1) == weight.size(1), "hidden ", hidden.sizes(), " and weight ",
                    weight.sizes(), ": expected (T, D) and (C, D)");
  for (const auto& [name, index] : {std::pair{"step_end", step_end}, std::pair{"cu_steps", cu_steps}}) {
    TORCH_CHECK_VALUE(index.scalar_type() == at::kLong && index.dim() == 1, name, " ", index.sizes(), " ",
                      index.scalar_type(), ": expected one dimension of int64");
    require_device(name, index, hidden);
  }
  TORCH_CHECK_VALUE(cu_steps.numel() > 0, "cu_steps ", cu_steps.sizes(), ": expected (R + 1,)");
  require_device("weight", weight, hidden);
  if (bias) require_device("bias", *bias, hidden);
  const c10::cuda::CUDAGuard guard(hidden.device());

  // of strided rows the boundary ones alone are copied, never all of hidden
  const bool strided = hidden.stride(1) != 1;
  const Tensor rows = strided ? hidden.index_select(0, step_end) : hidden;
  const Tensor ends = strided ? at::arange(step_end.numel(), step_end.options()) : step_end.contiguous();
  const Tensor offsets = cu_steps.contiguous(), head = weight.contiguous();
  // a bias of another type is two numbers to cast: the only case of a second launch
  const std::optional<Tensor> shift = bias ? std::optional(bias->to(weight.scalar_type()).contiguous()) : std::nullopt;
  const int64_t num_rollouts = offsets.numel() - 1;
  const auto options = hidden.options().dtype(at::kFloat);
  const auto per_rollout = [&](at::ScalarType dtype) { return at::empty({num_rollouts}, options.dtype(dtype)); };
  const Result result(at::empty(ends.sizes(), options), per_rollout(at::kLong), per_rollout(at::kFloat),
                      per_rollout(at::kFloat), per_rollout(at::kFloat), per_rollout(at::kFloat));
  const auto& [prob, first_error, min, mean, prod, last] = result;

  StepPool s{};
  s.hidden = rows.const_data_ptr();
  s.weight = head.const_data_ptr();
  s.bias = shift ? shift->const_data_ptr() : nullptr;
  s.step_end = ends.const_data_ptr<int64_t>();
  s.cu_steps = offsets.const_data_ptr<int64_t>();
  s.prob = prob.mutable_data_ptr<float>();
  s.first_error = first_error.mutable_data_ptr<int64_t>();
  s.min = min.mutable_data_ptr<float>();
  s.mean = mean.mutable_data_ptr<float>();
  s.prod = prod.mutable_data_ptr<float>();
  s.last = last.mutable_data_ptr<float>();
  s.num_rollouts = num_rollouts;
  s.dim = hidden.size(1);
  s.hidden_stride = rows.stride(0);
  s.classes = static_cast<int32_t>(weight.size(0));
  s.positive = static_cast<int32_t>(positive);
  s.tau = static_cast<float>(tau);
  const auto stream = c10::cuda::getCurrentCUDAStream();
  C10_CUDA_CHECK(launch_step_pool(s, require_floating("hidden", rows), require_floating("weight", head), stream));
  return result;
}

TORCH_LIBRARY_IMPL(scope_fast_native, CUDA, m) { m.impl("step_pool", &step_pool); }

}  // namespace
}  // namespace scope_fast
