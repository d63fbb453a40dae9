// scope_fast_native::weight_bucket_copy on CUDA tensors: the list of pieces, and the launches of weight_bucket.cuh.
#include "cuda/weight_bucket.cuh"

#include <torch/library.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "cuda/entry.h"

namespace scope_fast {
namespace {

using at::Tensor;

// elements of one size that are only moved; a wider element (complex128) is several of them
std::pair<Element, int64_t> bits(const Tensor& x) {
  const int64_t size = std::min<int64_t>(x.element_size(), 8);
  const Element element = size == 1 ? Element::u8 : size == 2 ? Element::u16 : size == 4 ? Element::u32 : Element::u64;
  return {element, static_cast<int64_t>(x.nbytes()) / size};
}

// nothing where torch's own copy serves: strided sources, and casts that no weight sync makes
std::optional<Piece> piece_of(const Tensor& from, const Tensor& to) {
  if (!from.is_contiguous()) return std::nullopt;
  Piece piece{from.const_data_ptr(), to.mutable_data_ptr(), from.numel(), 0, 0, 0};
  auto source = floating_element(from), target = floating_element(to);
  if (from.scalar_type() == to.scalar_type()) {
    const auto [element, count] = bits(from);
    source = target = element;
    piece.count = count;
  }
  if (!source || !target) return std::nullopt;
  piece.from_type = static_cast<int16_t>(*source);
  piece.to_type = static_cast<int16_t>(*target);
  return piece;
}

void weight_bucket_copy(at::TensorList sources, at::TensorList destinations) {
  TORCH_CHECK_VALUE(
      sources.size() == destinations.size(), sources.size(), " sources for ", destinations.size(), " destinations");
  if (sources.empty()) return;
  const c10::cuda::CUDAGuard guard(destinations[0].device());
  std::vector<Piece> pieces;
  pieces.reserve(sources.size());
  for (size_t i = 0; i < sources.size(); ++i) {
    const Tensor &from = sources[i], &to = destinations[i];
    require_device("source", from, destinations[0]);
    require_device("destination", to, destinations[0]);
    TORCH_CHECK_VALUE(from.sizes() == to.sizes() && to.is_contiguous(), "source ", from.sizes(), " and destination ",
                      to.sizes(), ": expected one shape, the destination contiguous");
    if (to.numel() == 0) continue;
    if (const auto piece = piece_of(from, to)) {
      pieces.push_back(*piece);
    } else {
      const_cast<Tensor&>(to).copy_(from);
    }
  }
  C10_CUDA_CHECK(launch_weight_bucket(pieces.data(), static_cast<int64_t>(pieces.size()), c10::cuda::getCurrentCUDAStream()));
}

TORCH_LIBRARY_IMPL(scope_fast_native, CUDA, m) { m.impl("weight_bucket_copy", &weight_bucket_copy); }

}  // namespace
}  // namespace scope_fast
