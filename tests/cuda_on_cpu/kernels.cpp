// The CUDA launchers as C functions on CPU memory, for tests/test_native_cuda.py. Each returns the launches it took.
#include "cuda/linear_scope_loss.cuh"
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

extern "C" int64_t linear_scope_loss_rows(
    const void* logits, int32_t logits_type, void* dlogits, int32_t dlogits_type, const float* bias, const int64_t* index,
    const int64_t* target, const uint8_t* segment, const float* loss_weight, const float* old_logprob, const float* advantage,
    const float* ref_logprob, const float* rollout_logprob, const float* temperature, const float* options, float* table,
    int64_t num_rows, int64_t vocab, int64_t logits_stride, int64_t dlogits_stride, int64_t first_column, int64_t columns) {
  num_launches = 0;
  const float* o = options;
  const LogitRows x{logits, dlogits, bias, index, target, segment, loss_weight, old_logprob, advantage, ref_logprob,
                    rollout_logprob, temperature, table, num_rows, vocab, logits_stride, dlogits_stride, first_column, columns,
                    0, {o[0], o[1], o[2], o[3], o[4], o[5], o[6], o[7], o[8], o[9]}};
  const auto status =
      launch_linear_scope_loss(x, static_cast<Element>(logits_type), static_cast<Element>(dlogits_type), nullptr);
  return status == cudaSuccess ? num_launches : -1;
}

extern "C" int64_t max_row_bytes() { return kMaxRowBytes; }
