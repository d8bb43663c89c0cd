// steer_topk on a CPU: the k best tokens of a row, nothing of size V.
//
// The best found so far are a heap in the results themselves, the worst of them first. Tokens come in their order, so one that
// ties with the worst is never better; tiles whose best token is not better than the worst are left out.
#pragma once

#include "steered_row.h"

namespace svdecode {
namespace SVDECODE_TARGET {

class TopkRow : SteeredRow {
 public:
  TopkRow(const TopkArguments& arguments, int64_t row)
      : SteeredRow(arguments.rows, arguments.settings, arguments.mu_rows ? arguments.mu_rows[row] : arguments.mu, row),
        k_(arguments.k),
        tokens_(arguments.tokens_out + row * arguments.k),
        logprobs_(arguments.logprobs_out + row * arguments.k) {}

  void run(const Workers& workers) {
    if (!look(workers) || !(best_.total > 0.0f) || !(best_.total < INFINITE)) return fill(0, NOT_A_NUMBER);
    Buffers buffers;
    for (int64_t t = 0; t < pair_.tiles(); ++t) {
      if (!reachable(t) || !is_better(bests_[t].max)) continue;
      for_steered(t, buffers, [&](int64_t first, const float* zs, int count) {
        for (int i = 0; i < count; ++i) {
          if (zs[i] > -INFINITE && is_better(zs[i])) add(first + i, zs[i]);
        }
      });
    }
    const int64_t found = size_;
    while (size_ > 1) {  // the worst goes behind the rest, until the best is left at the front
      swap(0, --size_);
      sink(0);
    }
    const float normaliser = best_.max + logarithm(best_.total);
    for (int64_t i = 0; i < found; ++i) logprobs_[i] -= normaliser;
    fill(found, -INFINITE);
  }

 private:
  void fill(int64_t from, float logprob) {
    for (int64_t i = from; i < k_; ++i) {
      tokens_[i] = -1;
      logprobs_[i] = logprob;
    }
  }

  bool is_better(float zs) const { return size_ < k_ || zs > logprobs_[0]; }
  bool is_worse(int64_t i, int64_t j) const {
    return logprobs_[i] < logprobs_[j] || (logprobs_[i] == logprobs_[j] && tokens_[i] > tokens_[j]);
  }

  void swap(int64_t i, int64_t j) {
    const int64_t token = tokens_[i];
    const float value = logprobs_[i];
    tokens_[i] = tokens_[j];
    logprobs_[i] = logprobs_[j];
    tokens_[j] = token;
    logprobs_[j] = value;
  }

  void add(int64_t token, float zs) {
    const bool full = size_ == k_;
    int64_t i = full ? 0 : size_++;
    tokens_[i] = token;
    logprobs_[i] = zs;
    if (full) return sink(0);
    for (; i > 0 && is_worse(i, (i - 1) / 2); i = (i - 1) / 2) swap(i, (i - 1) / 2);
  }

  void sink(int64_t i) {
    for (;;) {
      int64_t worst = i;
      for (int64_t child = 2 * i + 1; child <= 2 * i + 2 && child < size_; ++child) {
        if (is_worse(child, worst)) worst = child;
      }
      if (worst == i) return;
      swap(i, worst);
      i = worst;
    }
  }

  const int64_t k_;
  int64_t* const tokens_;
  float* const logprobs_;  // zs, at the end log-probs
  int64_t size_ = 0;
};

inline void steer_topk(const TopkArguments& arguments, ParallelFor parallel_for, int threads) {
  Workers(parallel_for, threads).rows(arguments.rows, [&](int64_t row, const Workers& inside) {
    TopkRow(arguments, row).run(inside);
  });
}

}  // namespace SVDECODE_TARGET
}  // namespace svdecode
