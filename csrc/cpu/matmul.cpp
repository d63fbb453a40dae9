#include "cpu/matmul.h"

#include <ATen/Context.h>

#include <array>
#include <exception>

namespace scope_fast {

// No query for it is exported: ask for the smallest product, and look at what comes back. A CPU without AVX512 gets a
// c10::Error; one with AVX512 but no bfloat16 instructions an exception of oneDNN's ("could not generate a kernel"),
// whose type is not exported either.
bool has_bfloat16_matmul() {
  if (!at::globalContext().userEnabledMkldnn()) return false;  // torch asks at every product, so not once for all
  static const bool has = [] {
    const std::array<BFloat16, 2> A{BFloat16(2.0f), BFloat16(3.0f)}, B{BFloat16(5.0f), BFloat16(7.0f)};
    float C = 0.0f;
    try {
      multiply({1, 1, 2}, A.data(), 2, B.data(), 1, &C, 1, /*add=*/false);
      at::native::cpublas::brgemm_release();
    } catch (const std::exception&) {
      return false;
    }
    return C == 31.0f;
  }();
  return has;
}

}  // namespace scope_fast
