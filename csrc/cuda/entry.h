// From tensors to the CUDA kernels' words: what the torch files of csrc/cuda share.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <optional>

#include "cuda/elements.cuh"

namespace scope_fast {

inline std::optional<Element> floating_element(const at::Tensor& x) {
  switch (x.scalar_type()) {
    case at::kDouble: return Element::f64;
    case at::kFloat: return Element::f32;
    case at::kHalf: return Element::f16;
    case at::kBFloat16: return Element::bf16;
    default: return std::nullopt;
  }
}

inline Element require_floating(const char* name, const at::Tensor& x) {
  const auto element = floating_element(x);
  TORCH_CHECK_VALUE(element, name, " is ", x.scalar_type(), ": expected float64, float32, float16 or bfloat16");
  return *element;
}

inline void require_device(const char* name, const at::Tensor& x, const at::Tensor& like) {
  TORCH_CHECK_VALUE(x.device() == like.device(), name, " is on ", x.device(), ": expected ", like.device());
}

}  // namespace scope_fast
