#include "cpu/row_kernels.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/vec.h"

namespace scope_fast {

// sums taken relative to `old`, relative to `now`
static void rescale(double old, double now, double& sum, double& weighted) {
  if (old == now) return;
  const double shift = std::max(old - now, static_cast<double>(kFloor));
  const double scale = std::exp(shift);
  weighted = scale * (weighted + sum * shift);
  sum *= scale;
}

template <class T>
void merge_stats(const Stats<T>& into, int64_t i, T top, double sum, double weighted) {
  if (sum == 0) return;  // excluded tokens only; their top says nothing
  const T now = into.top[i] > top ? into.top[i] : top;
  rescale(into.top[i], now, into.sum[i], into.weighted[i]);
  rescale(top, now, sum, weighted);
  into.top[i] = now;
  into.sum[i] += sum;
  into.weighted[i] += weighted;
}

template void merge_stats(const Stats<float>&, int64_t, float, double, double);
template void merge_stats(const Stats<double>&, int64_t, double, double, double);

// float sums over one block, double between blocks: at a vocabulary of 150000 the sum is good to float's last digit
template <int BYTES, class T>
SCOPE_FAST_INLINE void update_stats_body(const Block<T>& block, const Stats<T>& stats) {
  using V = Vec<T, BYTES>;
  constexpr int lanes = BYTES / sizeof(T);
  constexpr T lowest = -std::numeric_limits<T>::infinity();
  for (int64_t c = 0; c < block.width; c += lanes) {
    const V inverse = load<BYTES>(block.inverse_temperature + c);
    V top = V{} + lowest;
    for (int64_t v = 0; v < block.rows; ++v) {
      top = larger(top, (load<BYTES>(block.z + v * kPanel + c) + block.bias[v]) * inverse);
    }
    const V base = top == lowest ? V{} : top;  // a block of excluded tokens only: -inf - 0, not -inf - -inf
    V sum{}, weighted{};
    for (int64_t v = 0; v < block.rows; ++v) {
      const V y = (load<BYTES>(block.z + v * kPanel + c) + block.bias[v]) * inverse;
      const V d = larger(V{} + kFloor, y - base);
      const V e = exp_of<BYTES>(d);
      sum += e;
      weighted += e * d;
    }
    for (int i = 0; i < lanes; ++i) merge_stats<T>(stats, c + i, base[i], sum[i], weighted[i]);
  }
}
SCOPE_FAST_MULTIVERSION(update_stats, (const Block<float>& block, const Stats<float>& stats), (block, stats))
SCOPE_FAST_MULTIVERSION(update_stats, (const Block<double>& block, const Stats<double>& stats), (block, stats))

// dz (rows, kGroup) of one panel; the indicator of the target is added by the caller
// rows outside, so that logits stream from memory in order; the coefficients come from the first-level cache
template <int BYTES, class T>
SCOPE_FAST_INLINE void slopes_of_body(const Block<T>& block, const Slopes<T>& slopes, T* dz) {
  using V = Vec<T, BYTES>;
  constexpr int lanes = BYTES / sizeof(T);
  const T *z = block.z, *inverse = block.inverse_temperature;
  const auto [top, log_sum, slope, curve] = slopes;
  const int64_t rows = block.rows, width = block.width;
  for (int64_t v = 0; v < rows; ++v) {
    const T bias = block.bias[v];
    for (int64_t c = 0; c < width; c += lanes) {
      const V y = (load<BYTES>(z + v * kPanel + c) + bias) * load<BYTES>(inverse + c);
      const V log_p = larger(V{} + kFloor, (y - load<BYTES>(top + c)) - load<BYTES>(log_sum + c));
      store(dz + v * kGroup + c, exp_of<BYTES>(log_p) * (load<BYTES>(slope + c) + load<BYTES>(curve + c) * log_p));
    }
  }
}
SCOPE_FAST_MULTIVERSION(slopes_of, (const Block<float>& block, const Slopes<float>& slopes, float* dz), (block, slopes, dz))
SCOPE_FAST_MULTIVERSION(
    slopes_of, (const Block<double>& block, const Slopes<double>& slopes, double* dz), (block, slopes, dz))

template <int BYTES>
SCOPE_FAST_INLINE void transpose_words_body(const uint32_t* from, int64_t stride, int64_t rows, int64_t width, uint32_t* to,
                                            int64_t to_stride) {
  using V = Vec<uint32_t, BYTES>;
  constexpr int lanes = BYTES / sizeof(uint32_t);
  for (int64_t v = 0; v < rows; v += lanes) {
    for (int64_t c = 0; c < width; c += lanes) {
      V square[lanes];
#pragma GCC unroll 16
      for (int i = 0; i < lanes; ++i) square[i] = load<BYTES>(from + (v + i) * stride + c);
      transpose(square);
#pragma GCC unroll 16
      for (int i = 0; i < lanes; ++i) store(to + (c + i) * to_stride + v, square[i]);
    }
  }
}
SCOPE_FAST_MULTIVERSION(
    transpose_words,
    (const uint32_t* from, int64_t stride, int64_t rows, int64_t width, uint32_t* to, int64_t to_stride),
    (from, stride, rows, width, to, to_stride))

template <int BYTES>
SCOPE_FAST_INLINE void round_pairs_body(const float* dz, int64_t rows, int64_t width, uint16_t* rounded, uint32_t* pairs) {
  using Half = typename VecOf<uint16_t, BYTES / 2>::type;
  constexpr int64_t lanes = BYTES / sizeof(float);
  for (int64_t v = 0; v < rows; v += 2) {
    for (int64_t c = 0; c < width; c += lanes) {
      const auto low = bfloat16_bits<BYTES>(load<BYTES>(dz + v * kGroup + c));
      const auto high = bfloat16_bits<BYTES>(load<BYTES>(dz + (v + 1) * kGroup + c));
      store(rounded + v * kGroup + c, __builtin_convertvector(low, Half));
      store(rounded + (v + 1) * kGroup + c, __builtin_convertvector(high, Half));
      store(pairs + v / 2 * kPanel + c, low | (high << 16));
    }
  }
}
SCOPE_FAST_MULTIVERSION(
    round_pairs, (const float* dz, int64_t rows, int64_t width, uint16_t* rounded, uint32_t* pairs),
    (dz, rows, width, rounded, pairs))

// low and high (count) -> words of one of each
template <int BYTES>
SCOPE_FAST_INLINE void interleave_body(const uint16_t* low, const uint16_t* high, int64_t count, uint32_t* to) {
  using Words = Vec<uint32_t, BYTES>;
  constexpr int64_t lanes = BYTES / sizeof(uint32_t);
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) {
    const auto a = __builtin_convertvector(load<BYTES / 2>(low + i), Words);
    const auto b = __builtin_convertvector(load<BYTES / 2>(high + i), Words);
    store(to + i, a | (b << 16));
  }
  for (; i < count; ++i) to[i] = low[i] | (static_cast<uint32_t>(high[i]) << 16);
}
SCOPE_FAST_MULTIVERSION(
    interleave, (const uint16_t* low, const uint16_t* high, int64_t count, uint32_t* to), (low, high, count, to))

template <int BYTES>
SCOPE_FAST_INLINE void to_bfloat16_body(const float* from, int64_t count, BFloat16* to) {
  constexpr int64_t lanes = BYTES / sizeof(float);
  using Half = typename VecOf<uint16_t, BYTES / 2>::type;
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) {
    store(reinterpret_cast<uint16_t*>(to + i), __builtin_convertvector(bfloat16_bits<BYTES>(load<BYTES>(from + i)), Half));
  }
  for (; i < count; ++i) to[i] = static_cast<BFloat16>(from[i]);
}
SCOPE_FAST_MULTIVERSION(to_bfloat16, (const float* from, int64_t count, BFloat16* to), (from, count, to))

template <int BYTES>
SCOPE_FAST_INLINE void to_float_body(const BFloat16* from, int64_t count, float* to) {
  constexpr int64_t lanes = BYTES / sizeof(float);
  using Words = Vec<uint32_t, BYTES>;
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) {
    const auto bits = load<BYTES / 2>(reinterpret_cast<const uint16_t*>(from + i));
    store(to + i, std::bit_cast<Vec<float, BYTES>>(__builtin_convertvector(bits, Words) << 16));
  }
  for (; i < count; ++i) to[i] = static_cast<float>(from[i]);
}
SCOPE_FAST_MULTIVERSION(to_float, (const BFloat16* from, int64_t count, float* to), (from, count, to))

template <int BYTES>
SCOPE_FAST_INLINE void multiply_double_body(
    int64_t M, int64_t N, int64_t K, int64_t lda, int64_t ldb, int64_t ldc, bool add, const double* A, const double* B,
    double* C) {
  for (int64_t m = 0; m < M; ++m) {
    double* c = C + m * ldc;
    if (!add) std::fill(c, c + N, 0.0);
    for (int64_t k = 0; k < K; ++k) {
      const double a = A[m * lda + k];
      for (int64_t n = 0; n < N; ++n) c[n] += a * B[k * ldb + n];
    }
  }
}
SCOPE_FAST_MULTIVERSION(
    multiply_double,
    (int64_t M, int64_t N, int64_t K, int64_t lda, int64_t ldb, int64_t ldc, bool add, const double* A, const double* B,
     double* C),
    (M, N, K, lda, ldb, ldc, add, A, B, C))

}  // namespace scope_fast
