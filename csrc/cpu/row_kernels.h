// The row kernels: what is done to the logits of a block (vocabulary rows x token columns), all vectorised over tokens,
// so that no lane ever waits for another. Shared by linear_scope_loss and linear_logprob.
#pragma once

#include <c10/util/BFloat16.h>

#include <cstdint>

namespace scope_fast {

using c10::BFloat16;

constexpr int64_t kPanel = 64;    // tokens of a panel, the columns of one matmul; logits blocks have this row stride
constexpr int64_t kGroup = 256;   // tokens of a group, the depth of one weight-gradient matmul
constexpr int64_t kBlock = 128;   // vocabulary rows of a block
constexpr int64_t kMultiple = 16; // token counts are padded to this, so that every vector loop ends evenly
constexpr float kFloor = -1e4f;   // least log-probability: p is 0 long before; keeps p * log p of an excluded token from NaN

// A block's logits as the matmul left them, and what turns them into y = (z + bias) / temperature.
template <class T>
struct Block {
  const T* z;  // (rows, kPanel)
  int64_t rows, width;
  const T* bias;                 // (rows)
  const T* inverse_temperature;  // (width)
};

// Running softmax statistics of each token (width): max y, and in double sum exp(y - max), sum exp(y - max) (y - max).
template <class T>
struct Stats {
  T* top;
  double* sum;
  double* weighted;
};

// adds statistics relative to `top` to those of token i
template <class T>
void merge_stats(const Stats<T>& into, int64_t i, T top, double sum, double weighted);

// adds a block to the statistics of its tokens
void update_stats(const Block<float>& block, const Stats<float>& stats);
void update_stats(const Block<double>& block, const Stats<double>& stats);

// What the gradient of each token (width) is made of: dy = p (slope + curve log p), log p = (y - top) - log_sum.
template <class T>
struct Slopes {
  const T *top, *log_sum, *slope, *curve;
};

// dz (rows, kGroup) of one panel; the indicator of the target is added by the caller
void slopes_of(const Block<float>& block, const Slopes<float>& slopes, float* dz);
void slopes_of(const Block<double>& block, const Slopes<double>& slopes, double* dz);

// dz (rows, kGroup) -> its bfloat16 (rows, kGroup), and the same in pairs of rows, words of (rows / 2, kPanel); an even
// number of rows
void round_pairs(const float* dz, int64_t rows, int64_t width, uint16_t* rounded, uint32_t* pairs);

// words (rows, stride) -> (width, to_stride); rows and width multiples of 16
void transpose_words(const uint32_t* from, int64_t stride, int64_t rows, int64_t width, uint32_t* to, int64_t to_stride);

// low and high (count) -> words of one of each
void interleave(const uint16_t* low, const uint16_t* high, int64_t count, uint32_t* to);

void to_bfloat16(const float* from, int64_t count, BFloat16* to);
void to_float(const BFloat16* from, int64_t count, float* to);

// C (M, N) [+]= A (M, K) @ B (K, N) without a BLAS: float64 is for exactness
void multiply_double(
    int64_t M, int64_t N, int64_t K, int64_t lda, int64_t ldb, int64_t ldc, bool add, const double* A, const double* B,
    double* C);

}  // namespace scope_fast
