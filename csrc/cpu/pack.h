// Packing of matmul operands into panels, and of dlogits into the two operands the gradient matmuls read.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "cpu/matmul.h"
#include "cpu/row_kernels.h"

namespace scope_fast {

template <class Op>
constexpr int64_t kPair = std::is_same_v<Op, BFloat16> ? 2 : 1;  // rows of B that lie together

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// B = rows^T: `rows` (width, dim) contiguous -> (dim / pair, width, pair)
template <class In, class Op>
void pack_columns(const In* rows, int64_t width, int64_t dim, Op* to) {
  constexpr int64_t pair = kPair<Op>;
  for (int64_t d = 0; d < dim; d += pair) {
    for (int64_t c = 0; c < width; ++c) {
      for (int64_t i = 0; i < pair; ++i) *to++ = static_cast<Op>(rows[c * dim + d + i]);
    }
  }
}

inline void convert(const float* from, int64_t count, float* to) { std::copy(from, from + count, to); }
inline void convert(const double* from, int64_t count, double* to) { std::copy(from, from + count, to); }
inline void convert(const float* from, int64_t count, BFloat16* to) { to_bfloat16(from, count, to); }
inline void convert(const BFloat16* from, int64_t count, float* to) { to_float(from, count, to); }


// B = rows: `rows` (depth, dim) contiguous -> panels of kPanel columns, each (depth / pair, columns, pair), the depth
// rounded up to whole pairs with zeros
template <class In, class Op>
void pack_rows(const In* rows, int64_t depth, int64_t dim, Op* to) {
  for (int64_t d = 0; d < dim; d += kPanel) {
    const int64_t columns = std::min(kPanel, dim - d);
    for (int64_t k = 0; k < depth; ++k, to += columns) convert(rows + k * dim + d, columns, to);
  }
}
inline void pack_rows(const BFloat16* rows, int64_t depth, int64_t dim, BFloat16* to) {
  static constexpr uint16_t zeros[kPanel] = {};
  const auto* words = reinterpret_cast<const uint16_t*>(rows);
  for (int64_t d = 0; d < dim; d += kPanel) {
    const int64_t columns = std::min(kPanel, dim - d);
    for (int64_t k = 0; k < depth; k += 2, to += 2 * columns) {
      const uint16_t *low = words + k * dim + d, *high = k + 1 < depth ? low + dim : zeros;
      interleave(low, high, columns, reinterpret_cast<uint32_t*>(to));
    }
  }
}

}  // namespace scope_fast
