// Vectors for the row kernels, and the choice of instruction set at run time.
//
// Plain GCC/Clang vector types: a body is a template over the register width in bytes, and the compiler lowers it. The
// extension itself is built for the baseline CPU; SCOPE_FAST_MULTIVERSION compiles a body three times and runs the one
// for the level torch detected, so a wheel never meets an instruction its CPU lacks (and ATEN_CPU_CAPABITILY's values
// default and avx2 work here too).
#pragma once

#include <ATen/Version.h>
#include <c10/util/BFloat16.h>

#include <bit>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors only cross inlined calls
#endif

#define SCOPE_FAST_INLINE inline __attribute__((always_inline))

namespace scope_fast {

enum class CpuLevel { baseline, avx2, avx512 };

inline CpuLevel cpu_level() {
  static const CpuLevel level = [] {
    const auto name = at::get_cpu_capability();
    if (name == "AVX512") return CpuLevel::avx512;
    return name == "AVX2" ? CpuLevel::avx2 : CpuLevel::baseline;
  }();
  return level;
}

// SCOPE_FAST_MULTIVERSION(name, (int a, int b), (a, b)) defines name(a, b), which runs name_body<BYTES>(a, b), an
// always-inline template, compiled for vectors of 64, 32 and 16 bytes.
#if defined(__x86_64__)
#define SCOPE_FAST_TARGET(features) __attribute__((target(features))) static
#define SCOPE_FAST_MULTIVERSION(name, parameters, arguments)                                              \
  SCOPE_FAST_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")                 \
  void name##_avx512 parameters { name##_body<64> arguments; }                                            \
  SCOPE_FAST_TARGET("avx2,fma") void name##_avx2 parameters { name##_body<32> arguments; }                \
  static void name##_baseline parameters { name##_body<16> arguments; }                                   \
  void name parameters {                                                                                  \
    switch (cpu_level()) {                                                                                \
      case CpuLevel::avx512: return name##_avx512 arguments;                                              \
      case CpuLevel::avx2: return name##_avx2 arguments;                                                  \
      default: return name##_baseline arguments;                                                          \
    }                                                                                                     \
  }
#else
#define SCOPE_FAST_MULTIVERSION(name, parameters, arguments) \
  void name parameters { name##_body<16> arguments; }
#endif


template <class T, int BYTES>
struct VecOf {
  typedef T type __attribute__((vector_size(BYTES)));
};
template <class T, int BYTES>
using Vec = typename VecOf<T, BYTES>::type;

template <int BYTES, class T>
SCOPE_FAST_INLINE Vec<T, BYTES> load(const T* from) {
  Vec<T, BYTES> v;
  std::memcpy(&v, from, sizeof(v));
  return v;
}

template <class V, class T>
SCOPE_FAST_INLINE void store(T* to, V v) {
  static_assert(sizeof(v[0]) == sizeof(T));
  std::memcpy(to, &v, sizeof(v));
}

// the larger of each lane; a NaN in b stays, so that a missing value shows
template <class V>
SCOPE_FAST_INLINE V larger(V a, V b) {
  return b < a ? a : b;
}

constexpr float kExpUnderflow = -87.33654f;  // below: exp is 0; the subnormals are given up

// exp(x) for x <= 88, within 1.2 units in the last place (tests/test_native_linear.py); 0 under kExpUnderflow; NaN stays NaN.
// exp(x) = 2^n exp(r), r = x - n log 2 in two steps (Cody and Waite), exp(r) by a polynomial of degree 6 on
// |r| <= log(2)/2; adding 1.5 * 2^23 rounds x / log 2 to n and leaves n in the low bits.
template <int BYTES>
SCOPE_FAST_INLINE Vec<float, BYTES> exp_of(Vec<float, BYTES> x) {
  using F = Vec<float, BYTES>;
  using I = Vec<int32_t, BYTES>;
  const F shifted = x * 1.44269504088896341f + 12582912.0f;
  const F n = shifted - 12582912.0f;
  const F r = (x - n * 0.693145751953125f) - n * 1.428606820309417e-6f;
  F p = r * 0.0013814539f + 0.008368745f;
  p = p * r + 0.04166839f;
  p = p * r + 0.16666521f;
  p = p * r + 0.49999994f;
  p = p * (r * r) + r;
  p = p + 1.0f;
  const I exponent = (std::bit_cast<I>(shifted) << 23) + 0x3f800000;  // the low 9 bits of 1.5 * 2^23 are 0
  const F value = p * std::bit_cast<F>(exponent);
  return x < kExpUnderflow ? F{} : value;
}

// float64 is for exactness: lane by lane through libm
template <int BYTES>
SCOPE_FAST_INLINE Vec<double, BYTES> exp_of(Vec<double, BYTES> x) {
  for (size_t i = 0; i < sizeof(x) / sizeof(x[0]); ++i) x[i] = __builtin_exp(x[i]);
  return x;
}

// nearest bfloat16, ties to even, as its bits; NaN stays NaN
template <int BYTES>
SCOPE_FAST_INLINE Vec<uint32_t, BYTES> bfloat16_bits(Vec<float, BYTES> x) {
  using U = Vec<uint32_t, BYTES>;
  const U bits = std::bit_cast<U>(x);
  const U rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return x == x ? rounded : (bits >> 16) | 0x40;
}

constexpr float kMaxExponent = 88.0f;  // exp_of ends here, at 1.7e38

// exp as row_terms.h wants it of a vector: infinite where exp_of ends
template <class V>
SCOPE_FAST_INLINE V exponential(V x) {
  if constexpr (sizeof(x[0]) == sizeof(double)) {
    return exp_of<sizeof(V)>(x);
  } else {
    const V within = x > kMaxExponent ? V{} : x;
    return x > kMaxExponent ? V{} + std::numeric_limits<float>::infinity() : exp_of<sizeof(V)>(within);
  }
}

template <int DISTANCE, bool HIGH, class V, size_t... LANE>
SCOPE_FAST_INLINE V butterfly(V a, V b, std::index_sequence<LANE...>) {
  constexpr size_t lanes = sizeof...(LANE);
  if constexpr (HIGH) {
    return __builtin_shufflevector(a, b, ((LANE & DISTANCE) ? LANE + lanes : LANE + DISTANCE)...);
  } else {
    return __builtin_shufflevector(a, b, ((LANE & DISTANCE) ? LANE - DISTANCE + lanes : LANE)...);
  }
}

template <int DISTANCE, class V>
SCOPE_FAST_INLINE void transpose_step(V* rows) {
  constexpr int lanes = sizeof(V) / sizeof(rows[0][0]);
  if constexpr (DISTANCE < lanes) {
    using Lanes = std::make_index_sequence<lanes>;
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) {
      if (i & DISTANCE) continue;
      const V a = rows[i], b = rows[i + DISTANCE];
      rows[i] = butterfly<DISTANCE, false>(a, b, Lanes{});
      rows[i + DISTANCE] = butterfly<DISTANCE, true>(a, b, Lanes{});
    }
    transpose_step<2 * DISTANCE>(rows);
  }
}

// a square of vectors in registers, transposed: log2(lanes) rounds of two-input shuffles
template <class V>
SCOPE_FAST_INLINE void transpose(V* rows) {
  transpose_step<1>(rows);
}

}  // namespace scope_fast
