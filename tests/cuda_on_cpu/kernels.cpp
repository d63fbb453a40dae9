// The CUDA launchers as C functions on CPU memory, for tests/test_native_cuda.py. Each returns the launches it took.
#include "cuda/step_pool.cuh"
#include "cuda/weight_bucket.cuh"

using namespace scope_fast;

extern "C" int64_t step_pool(const void* hidden, int32_t hidden_type, const void* weight, int32_t weight_type, const void* bias,
                             const int64_t* step_end, const int64_t* cu_steps, int64_t num_rollouts, int64_t dim,
                             int64_t hidden_stride, int32_t classes, int32_t positive, float tau, float* prob,
                             int64_t* first_error, float* min, float* mean, float* prod, float* last) {
  num_launches = 0;
  const StepPool s{hidden, weight, bias, step_end, cu_steps, prob, first_error, min, mean, prod, last,
                   num_rollouts, dim, hidden_stride, classes, positive, tau, false};
  const auto status = launch_step_pool(s, static_cast<Element>(hidden_type), static_cast<Element>(weight_type), nullptr);
  return status == cudaSuccess ? num_launches : -1;
}

extern "C" int64_t weight_bucket(Piece* pieces, int64_t size) {
  num_launches = 0;
  return launch_weight_bucket(pieces, size, nullptr) == cudaSuccess ? num_launches : -1;
}
