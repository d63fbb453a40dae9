// The schemas of scope_fast_native, documented in scope_fast/native.py: private kernels that the Python custom ops call.
// Importing scope_fast._native registers them.
#include <Python.h>
#include <torch/library.h>

TORCH_LIBRARY(scope_fast_native, m) {
  m.def(
      "linear_scope_loss(Tensor hidden, Tensor weight, Tensor? bias, Tensor target, Tensor segment, Tensor loss_weight, "
      "Tensor? old_logprob, Tensor? advantage, Tensor? ref_logprob, Tensor? rollout_logprob, Tensor? temperature, "
      "Tensor rows, float[] options, str logits_dtype, int chunk_tokens, bool need_dhidden, bool need_dweight, "
      "bool need_dbias) -> (Tensor loss, Tensor metrics, Tensor dhidden, Tensor dweight, Tensor dbias)");
  m.def(
      "linear_scope_loss_rows(Tensor logits, Tensor(a!)? dlogits, Tensor? bias, Tensor index, Tensor target, "
      "Tensor segment, Tensor loss_weight, Tensor? old_logprob, Tensor? advantage, Tensor? ref_logprob, "
      "Tensor? rollout_logprob, Tensor? temperature, float[] options, Tensor(b!) table, int first_column) -> ()");
  m.def(
      "scope_loss(Tensor logprob, Tensor? entropy, Tensor segment, Tensor loss_weight, Tensor? old_logprob, "
      "Tensor? advantage, Tensor? ref_logprob, Tensor? rollout_logprob, float[] options) "
      "-> (Tensor loss, Tensor metrics, Tensor g, Tensor h)");
  m.def(
      "linear_logprob(Tensor hidden, Tensor weight, Tensor? bias, Tensor target, Tensor? temperature, float scale, "
      "str logits_dtype, int chunk_tokens) -> (Tensor logprob, Tensor entropy, Tensor logsumexp, Tensor state)");
  m.def(
      "linear_logprob_backward(Tensor grad_logprob, Tensor grad_entropy, Tensor grad_logsumexp, Tensor hidden, "
      "Tensor weight, Tensor? bias, Tensor target, Tensor? temperature, float scale, Tensor entropy, Tensor state, "
      "str logits_dtype, int chunk_tokens, bool need_dhidden, bool need_dweight, bool need_dbias) "
      "-> (Tensor dhidden, Tensor dweight, Tensor dbias)");
  m.def(
      "step_pool(Tensor hidden, Tensor step_end, Tensor cu_steps, Tensor weight, Tensor? bias, Tensor? hidden_weight, "
      "Tensor? hidden_bias, int positive, float tau) "
      "-> (Tensor prob, Tensor first_error, Tensor min, Tensor mean, Tensor prod, Tensor last)");
  m.def("weight_bucket_copy(Tensor[] sources, Tensor(a!)[] destinations) -> ()");
}

PyMODINIT_FUNC PyInit__native(void) {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_native", nullptr, 0, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
