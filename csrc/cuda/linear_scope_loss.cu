// scope_fast_native::linear_scope_loss_rows on CUDA tensors: checks, and the launch of linear_scope_loss.cuh.
#include "cuda/linear_scope_loss.cuh"

#include <torch/library.h>

#include "cuda/entry.h"
#include "row_options.h"

namespace scope_fast {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

void require_stream(const char* name, const Tensor& x, at::ScalarType dtype, int64_t size, const Tensor& like) {
  TORCH_CHECK_VALUE(x.scalar_type() == dtype && x.dim() == 1 && x.is_contiguous() && x.numel() == size, name, " ", x.sizes(),
                    " ", x.scalar_type(), ": expected (", size, ",) ", dtype, ", contiguous");
  require_device(name, x, like);
}

void require_rows(const char* name, const Tensor& x, const Tensor& logits) {
  TORCH_CHECK_VALUE(x.dim() == 2 && x.sizes() == logits.sizes() && x.stride(1) == 1, name, " ", x.sizes(),
                    ": expected (N, V) with rows of their own");
  // of one row the stride says nothing
  const bool padded = x.size(0) <= 1 || (x.stride(0) % kLogitAlign == 0 && x.stride(0) >= x.size(1));
  TORCH_CHECK_VALUE(padded && aligned(x.const_data_ptr()), name, ": expected rows that start on ", kLogitAlign, " elements");
  require_device(name, x, logits);
}

void linear_scope_loss_rows(
    const Tensor& logits, const OptionalTensor& dlogits, const OptionalTensor& bias, const Tensor& index, const Tensor& target,
    const Tensor& segment, const Tensor& loss_weight, const OptionalTensor& old_logprob, const OptionalTensor& advantage,
    const OptionalTensor& ref_logprob, const OptionalTensor& rollout_logprob, const OptionalTensor& temperature,
    at::ArrayRef<double> options, const Tensor& table, int64_t first_column) {
  require_rows("logits", logits, logits);
  if (dlogits) require_rows("dlogits", *dlogits, logits);
  const int64_t size = target.numel();
  require_stream("index", index, at::kLong, logits.size(0), logits);
  require_stream("target", target, at::kLong, size, logits);
  require_stream("segment", segment, at::kByte, size, logits);
  const auto floats = [&](const char* name, const OptionalTensor& x, int64_t expected) -> const float* {
    if (!x) return nullptr;
    require_stream(name, *x, at::kFloat, expected, logits);
    return x->const_data_ptr<float>();
  };
  TORCH_CHECK_VALUE(table.scalar_type() == at::kFloat && table.dim() == 2 && table.size(0) == num_metrics &&
                        table.is_contiguous() && first_column >= 0 && first_column + index.numel() <= table.size(1),
                    "table ", table.sizes(), ": expected ", num_metrics, " contiguous rows of float32, ",
                    first_column + index.numel(), " long or longer");
  require_device("table", table, logits);

  LogitRows x{};
  x.logits = logits.const_data_ptr();
  x.dlogits = dlogits ? dlogits->mutable_data_ptr() : nullptr;
  x.bias = floats("bias", bias, logits.size(1));
  x.index = index.const_data_ptr<int64_t>();
  x.target = target.const_data_ptr<int64_t>();
  x.segment = segment.const_data_ptr<uint8_t>();
  x.loss_weight = floats("loss_weight", loss_weight, size);
  x.old_logprob = floats("old_logprob", old_logprob, size);
  x.advantage = floats("advantage", advantage, size);
  x.ref_logprob = floats("ref_logprob", ref_logprob, size);
  x.rollout_logprob = floats("rollout_logprob", rollout_logprob, size);
  x.temperature = floats("temperature", temperature, size);
  x.table = table.mutable_data_ptr<float>();
  x.num_rows = logits.size(0);
  x.vocab = logits.size(1);
  x.logits_stride = logits.stride(0);
  x.dlogits_stride = dlogits ? dlogits->stride(0) : 0;
  x.first_column = first_column;
  x.columns = table.size(1);
  x.options = row_options<float>(options);
  const Element kept = require_floating("logits", logits), written = dlogits ? require_floating("dlogits", *dlogits) : kept;
  const bool pair = (kept == Element::f32 || kept == Element::bf16) && (written == kept || written == Element::bf16);
  TORCH_CHECK_VALUE(pair, "logits ", logits.scalar_type(), " and dlogits ", (dlogits ? *dlogits : logits).scalar_type(),
                    ": expected float32 or bfloat16, and the same or bfloat16");
  TORCH_CHECK_VALUE(row_cluster(x.vocab * logits.element_size()) > 0, "logits ", logits.sizes(), ": rows of more than ",
                    kMaxRowBytes, " bytes do not fit into a cluster");
  const c10::cuda::CUDAGuard guard(logits.device());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  C10_CUDA_CHECK(launch_linear_scope_loss(x, kept, written, stream));
}

TORCH_LIBRARY_FRAGMENT(scope_fast_native, m) { m.def("linear_scope_loss_fits() -> bool", &linear_scope_loss_fits); }
TORCH_LIBRARY_IMPL(scope_fast_native, CUDA, m) { m.impl("linear_scope_loss_rows", &linear_scope_loss_rows); }

}  // namespace
}  // namespace scope_fast
