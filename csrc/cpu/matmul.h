// Block matmuls on packed operands: C (M, N) [+]= A (M, K) @ B (K, N), accumulated in float32 (float64 for float64).
//
// float and bfloat16 run at::native::cpublas::brgemm, oneDNN's just-in-time kernels: about twice what at::mm reaches in
// float32 on CPUs whose BLAS has no AVX-512 path, AMX where there is one, and float32 results of bfloat16 operands, for
// which at::mm has no output dtype on CPU. A bfloat16 B is packed in pairs of rows, (K/2, N, 2).
#pragma once

#include <ATen/native/CPUBlas.h>
#include <c10/util/BFloat16.h>

#include <cstdint>

#include "cpu/row_kernels.h"

namespace scope_fast {

// whether this CPU multiplies packed bfloat16 (AVX512 or AMX); otherwise its operands are unpacked to float32
bool has_bfloat16_matmul();

struct Shape {
  int64_t M, N, K;
};

inline void multiply(
    Shape s, const double* A, int64_t lda, const double* B, int64_t ldb, double* C, int64_t ldc, bool add) {
  multiply_double(s.M, s.N, s.K, lda, ldb, ldc, add, A, B, C);
}
inline void multiply(Shape s, const float* A, int64_t lda, const float* B, int64_t ldb, float* C, int64_t ldc, bool add) {
  at::native::cpublas::brgemm(s.M, s.N, s.K, lda, ldb, ldc, add, A, B, C, /*is_vnni=*/false);
}
inline void multiply(
    Shape s, const BFloat16* A, int64_t lda, const BFloat16* B, int64_t ldb, float* C, int64_t ldc, bool add) {
  at::native::cpublas::brgemm(s.M, s.N, s.K, lda, ldb, ldc, add, A, B, C, /*is_vnni=*/true);
}

}  // namespace scope_fast
