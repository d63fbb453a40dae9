// The output layer, one chunk of tokens at a time: logits, softmax statistics, gradients.
//
// Logits are formed transposed, vocabulary x tokens. A block of vocabulary rows is then both the unpacked left operand
// of the logits matmul and the rows of dW it owns; the row kernels run along tokens without horizontal sums; and each
// task owns a range of the vocabulary, so that nothing is shared, nothing is atomic, and for a given number of threads
// every sum has one order. Only dX is summed over tasks.
//
// In: dtype of hidden and weight. Op: dtype of the matmuls' operands. Acc: float32, or float64 for float64 inputs.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu/huge_pages.h"
#include "cpu/matmul.h"
#include "cpu/pack.h"
#include "cpu/row_kernels.h"

namespace scope_fast {

using at::Tensor;

// Tokens of a chunk where nothing is kept between passes.
constexpr int64_t kForwardTokens = 512;
constexpr int64_t kBackwardTokens = 1024;
constexpr int64_t kPartialBytes = 64 << 20;  // of dX, which every task sums for itself, all of them together
constexpr int64_t kDepth = 1024;  // depth of one logits matmul: the panel it reads stays in the second-level cache

// Uninitialised memory from torch's allocator, so that its profiler sees it.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count = 0)
      : memory_(at::empty({static_cast<int64_t>(count * sizeof(T))}, at::TensorOptions().dtype(at::kByte))),
        data_(static_cast<T*>(memory_.data_ptr())) {
    advise_huge(data_, memory_.nbytes());
  }
  T* data() const { return data_; }
  T* operator+(int64_t i) const { return data_ + i; }

 private:
  Tensor memory_;
  T* data_;
};

// Contiguous shares of `count` blocks, one per task; fixed by the thread count alone.
struct Shares {
  int64_t count, tasks;
  explicit Shares(int64_t count)
      : count(count), tasks(at::in_parallel_region() ? 1 : std::max<int64_t>(1, std::min<int64_t>(at::get_num_threads(), count))) {}

  template <class F>
  void for_each(const F& f) const {  // f(task, first, last)
    at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) f(task, task * count / tasks, (task + 1) * count / tasks);
      at::native::cpublas::brgemm_release();
    });
  }
};

// The rows of hidden a chunk computes, packed as right operands: by column for the logits, by row for dW.
template <class In, class Op>
struct Tokens {
  int64_t count, padded, dim;
  Buffer<Op> columns, rows;

  Tokens(const In* hidden, const int64_t* index, int64_t count, int64_t dim, bool need_rows)
      : count(count), padded(round_up(count, kMultiple)), dim(dim), columns(padded * dim), rows(need_rows ? padded * dim : 0) {
    at::parallel_for(0, (padded + kGroup - 1) / kGroup, 1, [&](int64_t begin, int64_t end) {
      std::vector<In> gathered(kGroup * dim);
      for (int64_t group = begin; group < end; ++group) {
        gather(hidden, index, group, gathered.data());
        for (int64_t p = first_panel(group); p < last_panel(group); ++p) {
          pack_columns(gathered.data() + (p - first_panel(group)) * kPanel * dim, width(p), dim, columns + p * kPanel * dim);
        }
        if (need_rows) pack_rows(gathered.data(), depth(group), dim, rows + group * kGroup * dim);
      }
    });
  }

  int64_t num_panels() const { return (padded + kPanel - 1) / kPanel; }
  int64_t num_groups() const { return (padded + kGroup - 1) / kGroup; }
  int64_t width(int64_t panel) const { return std::min(kPanel, padded - panel * kPanel); }
  int64_t depth(int64_t group) const { return std::min(kGroup, padded - group * kGroup); }
  int64_t first_panel(int64_t group) const { return group * (kGroup / kPanel); }
  int64_t last_panel(int64_t group) const { return std::min((group + 1) * (kGroup / kPanel), num_panels()); }

 private:
  void gather(const In* hidden, const int64_t* index, int64_t group, In* to) const {
    for (int64_t c = group * kGroup; c < group * kGroup + depth(group); ++c, to += dim) {
      if (c < count) {
        std::copy_n(hidden + index[c] * dim, dim, to);
      } else {
        std::fill_n(to, dim, static_cast<In>(0));
      }
    }
  }
};

// Where each token's target lies, sorted within its panel; a target outside the vocabulary lies nowhere.
class Targets {
 public:
  Targets(const int64_t* target, int64_t count, int64_t vocab) : panels_((count + kPanel - 1) / kPanel) {
    for (int64_t c = 0; c < count; ++c) {
      if (target[c] >= 0 && target[c] < vocab) panels_[c / kPanel].emplace_back(target[c], c);
    }
    for (auto& panel : panels_) std::sort(panel.begin(), panel.end());
  }

  template <class F>
  void for_each_in(int64_t panel, int64_t first, int64_t last, const F& f) const {  // f(vocabulary row, token)
    if (panel >= static_cast<int64_t>(panels_.size())) return;
    const auto& entries = panels_[panel];
    auto at = std::lower_bound(entries.begin(), entries.end(), std::pair<int64_t, int64_t>(first, -1));
    for (; at != entries.end() && at->first < last; ++at) f(at->first, at->second);
  }

 private:
  std::vector<std::vector<std::pair<int64_t, int64_t>>> panels_;
};

// The logits of a chunk between the two passes, (panels, V, kPanel): as they are, in bfloat16, or not at all.
template <class Acc>
class LogitStore {
 public:
  LogitStore(int64_t panels, int64_t vocab, bool kept, bool rounded)
      : vocab_(vocab), kept_(kept), rounded_(rounded), wide_(kept && !rounded ? panels * vocab * kPanel : 0),
        narrow_(kept && rounded ? panels * vocab * kPanel : 0) {}

  bool kept() const { return kept_; }
  // where the matmul writes a block's logits
  Acc* slot(int64_t panel, int64_t v, Acc* scratch) const { return kept_ && !rounded_ ? wide_ + at(panel, v) : scratch; }

  // rounds the block if logits are bfloat16, and keeps it
  void finish(int64_t panel, int64_t v, int64_t rows, Acc* z, BFloat16* scratch) const {
    if constexpr (std::is_same_v<Acc, float>) {
      if (!rounded_) return;
      BFloat16* to = kept_ ? narrow_ + at(panel, v) : scratch;
      convert(z, rows * kPanel, to);
      convert(to, rows * kPanel, z);
    }
  }

  // a kept block's logits
  const Acc* load(int64_t panel, int64_t v, int64_t rows, Acc* scratch) const {
    if constexpr (std::is_same_v<Acc, float>) {
      if (rounded_) {
        convert(narrow_ + at(panel, v), rows * kPanel, scratch);
        return scratch;
      }
    }
    return wide_ + at(panel, v);
  }

 private:
  int64_t at(int64_t panel, int64_t v) const { return (panel * vocab_ + v) * kPanel; }
  int64_t vocab_;
  bool kept_, rounded_;
  Buffer<Acc> wide_;
  Buffer<BFloat16> narrow_;
};

template <class In, class Op>
struct Head {
  using Acc = std::conditional_t<std::is_same_v<In, double>, double, float>;
  const In* weight;  // (vocab, dim)
  int64_t vocab, dim;
  std::vector<Acc> bias;  // (vocab), zeros where there is none
  Shares blocks;

  Head(const Tensor& weight_, const std::optional<Tensor>& bias_)
      : weight(weight_.const_data_ptr<In>()), vocab(weight_.size(0)), dim(weight_.size(1)), bias(vocab, Acc(0)),
        blocks((vocab + kBlock - 1) / kBlock) {
    if (bias_) convert(bias_->const_data_ptr<In>(), vocab, bias.data());
  }

  int64_t rows(int64_t block) const { return std::min(kBlock, vocab - block * kBlock); }

  // tokens of a chunk, at most `most` and at least a panel, whose dX in all tasks stays within kPartialBytes
  int64_t tokens_within_partials(int64_t most) const {
    const int64_t token_bytes = blocks.tasks * dim * static_cast<int64_t>(sizeof(Acc));
    return std::clamp(kPartialBytes / token_bytes / kPanel * kPanel, kPanel, std::max(most, kPanel));
  }

  // the block's rows of weight as a left operand
  const Op* operand(int64_t block, Op* scratch) const {
    const In* from = weight + block * kBlock * dim;
    if constexpr (std::is_same_v<In, Op>) {
      return from;
    } else {
      convert(from, rows(block) * dim, scratch);
      return scratch;
    }
  }

  // z (rows, kPanel) = weight[block] @ hidden[panel]^T
  void logits(const Op* operand, int64_t block, const Tokens<In, Op>& tokens, int64_t panel, Acc* z) const {
    const int64_t width = tokens.width(panel);
    const Op* columns = tokens.columns + panel * kPanel * dim;
    for (int64_t d = 0; d < dim; d += kDepth) {
      const Shape shape{rows(block), width, std::min(kDepth, dim - d)};
      multiply(shape, operand + d, dim, columns + d * width, width, z, kPanel, /*add=*/d > 0);
    }
  }
};

}  // namespace scope_fast
