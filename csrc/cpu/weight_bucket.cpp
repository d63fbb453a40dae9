// weight_bucket on CPU: copies with a cast, over threads. A bucket is one sequence of bytes cut into even shares, so that
// one huge tensor and a thousand small ones cost the same; at most one read and one write of every element.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <cstring>

#include "cpu/huge_pages.h"
#include "cpu/pack.h"

namespace scope_fast {
namespace {

using at::Tensor;

constexpr int64_t kShareBytes = 256 << 10;  // below this a thread costs more than it moves

// a contiguous copy that needs no kernel of torch: the same dtype, or one of the casts a weight sync makes
struct Piece {
  const char* from;
  char* to;
  int64_t count, from_size, to_size;
  enum Kind { bytes, narrow, widen } kind;

  void copy(int64_t first, int64_t last) const {
    const char* source = from + first * from_size;
    char* destination = to + first * to_size;
    switch (kind) {
      case bytes: std::memcpy(destination, source, (last - first) * to_size); break;
      case narrow:
        convert(reinterpret_cast<const float*>(source), last - first, reinterpret_cast<BFloat16*>(destination));
        break;
      case widen:
        convert(reinterpret_cast<const BFloat16*>(source), last - first, reinterpret_cast<float*>(destination));
        break;
    }
  }
};

std::optional<Piece::Kind> kind_of(const Tensor& from, const Tensor& to) {
  if (!from.is_contiguous()) return std::nullopt;
  const auto a = from.scalar_type(), b = to.scalar_type();
  if (a == b) return Piece::bytes;
  if (a == at::kFloat && b == at::kBFloat16) return Piece::narrow;
  if (a == at::kBFloat16 && b == at::kFloat) return Piece::widen;
  return std::nullopt;
}

void weight_bucket_copy(at::TensorList sources, at::TensorList destinations) {
  TORCH_CHECK_VALUE(
      sources.size() == destinations.size(), sources.size(), " sources for ", destinations.size(), " destinations");
  std::vector<Piece> pieces;
  std::vector<int64_t> start{0};  // where each piece begins, in destination bytes
  for (size_t i = 0; i < sources.size(); ++i) {
    const Tensor &from = sources[i], &to = destinations[i];
    const auto kind = kind_of(from, to);
    if (!kind) {
      const_cast<Tensor&>(to).copy_(from);  // strided, or a rare cast: torch's own kernel
      continue;
    }
    advise_huge(to.mutable_data_ptr(), to.nbytes());  // a bucket is often fresh memory
    pieces.push_back({static_cast<const char*>(from.const_data_ptr()), static_cast<char*>(to.mutable_data_ptr()),
                      from.numel(), static_cast<int64_t>(from.element_size()), static_cast<int64_t>(to.element_size()), *kind});
    start.push_back(start.back() + to.nbytes());
  }
  at::parallel_for(0, start.back(), kShareBytes, [&](int64_t begin, int64_t end) {
    size_t i = std::upper_bound(start.begin(), start.end(), begin) - start.begin() - 1;
    for (; i < pieces.size() && start[i] < end; ++i) {
      // an element belongs to the share its first byte lies in
      const int64_t size = pieces[i].to_size;
      const auto element = [&](int64_t byte) { return (std::clamp(byte, start[i], start[i + 1]) - start[i] + size - 1) / size; };
      pieces[i].copy(element(begin), element(end));
    }
  });
}

TORCH_LIBRARY_IMPL(scope_fast_native, CPU, m) { m.impl("weight_bucket_copy", &weight_bucket_copy); }

}  // namespace
}  // namespace scope_fast
