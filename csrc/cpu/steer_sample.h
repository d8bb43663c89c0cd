// steer_sample on a CPU: one token per row, no sort, nothing of size V.
//
// Greedy takes the best kept token (of all tokens with a finite penalty). A draw inverts the cumulative distribution at the
// row's uniform number. top_k and top_p are limits on the cost max(zs) - zs >= 0 of a token, as in kernels/steer_sample.py. The
// tokens that can be drawn are gathered once if there are few, which is nearly always, and else computed again on every walk.
#pragma once

#include "steered_row.h"

namespace svdecode {
namespace SVDECODE_TARGET {

constexpr int GATHERED = 4096;

class SampleRow : SteeredRow {
 public:
  SampleRow(const SampleArguments& arguments, int64_t row)
      : SteeredRow(arguments.rows, arguments.settings, arguments.mu_rows ? arguments.mu_rows[row] : arguments.mu, row),
        g_(arguments),
        row_(row) {}

  void run(const Workers& workers) {
    if (!look(workers)) return write(-1, NOT_A_NUMBER);
    const int64_t token = g_.temperature == 0.0f || best_.token == NO_TOKEN ? best_.token : draw();
    if (!pair_.holds(token)) return write(-1, NOT_A_NUMBER);
    write(token, logprob(token));
  }

 private:
  void write(int64_t token, float logprob) {
    g_.tokens_out[row_] = logprob == logprob ? token : -1;
    g_.logprobs_out[row_] = logprob;
  }

  struct Gathered {
    int64_t token;
    float cost;
  };

  // body(token, cost) over all tokens that can be drawn, in their order, until it returns false.
  template <class Body>
  void for_costs(const Body& body) {
    if (num_gathered_ <= GATHERED) {
      for (int64_t i = 0; i < num_gathered_; ++i) {
        if (!body(gathered_[i].token, gathered_[i].cost)) return;
      }
      return;
    }
    Buffers buffers;
    bool go_on = true;
    for (int64_t t = 0; t < pair_.tiles() && go_on; ++t) {
      if (!reachable(t)) continue;
      for_steered(t, buffers, [&](int64_t first, const float* zs, int count) {
        for (int i = 0; i < count && go_on; ++i) {
          if (zs[i] > -INFINITE) go_on = body(first + i, best_.max - zs[i]);
        }
      });
    }
  }

  void gather() {
    num_gathered_ = GATHERED + 1;  // walk over the tiles
    int64_t found = 0;
    for_costs([&](int64_t token, float cost) {
      if (found < GATHERED) gathered_[found] = {token, cost};
      return ++found <= GATHERED;
    });
    num_gathered_ = found;
  }

  float weight(float cost) const { return exponential(-cost / g_.temperature); }

  double mass(float cost_kept) {
    double sum = 0;
    for_costs([&](int64_t, float cost) {
      if (cost <= cost_kept) sum += weight(cost);
      return true;
    });
    return sum;
  }

  // The largest cost c for which the measure of all tokens that cost less than c is below `wanted`; tokens that cost more than
  // `cost_kept` do not count. Non-negative floats are ordered as their bits are: one walk for each 8 bits, the highest first.
  template <class Measure>
  float largest_cost(double wanted, float cost_kept, const Measure& measure) {
    uint32_t prefix = 0;
    double below = 0;
    for (int shift = 24; shift >= 0; shift -= 8) {
      double bins[256] = {};
      for_costs([&](int64_t, float cost) {
        const uint32_t bits = to_bits(cost);
        if (cost <= cost_kept && (uint64_t{bits} >> (shift + 8)) == prefix) bins[bits >> shift & 255] += measure(cost);
        return true;
      });
      uint32_t bin = 0;
      while (bin < 256 && below + bins[bin] < wanted) below += bins[bin++];
      if (bin == 256) return INFINITE;
      prefix = prefix << 8 | bin;
    }
    return from_bits(prefix);
  }

  int64_t draw() {
    gather();
    float cost_kept = INFINITE;
    if (g_.top_k > 0) {
      cost_kept = largest_cost(static_cast<double>(g_.top_k), INFINITE, [](float) { return 1.0; });
    }
    if (g_.top_p < 1.0f) {
      const double wanted = g_.top_p * mass(cost_kept);
      cost_kept = smaller(cost_kept, largest_cost(wanted, cost_kept, [&](float cost) { return weight(cost); }));
    }
    const double target = g_.uniform[row_] * mass(cost_kept);
    double before = 0;
    int64_t token = NO_TOKEN;
    for_costs([&](int64_t candidate, float cost) {
      const float w = cost <= cost_kept ? weight(cost) : 0.0f;
      if (w > 0.0f) token = candidate;  // the last one stays where rounding left the target above the whole mass
      before += w;
      return !(before > target && w > 0.0f);
    });
    return token;
  }

  const SampleArguments& g_;
  const int64_t row_;
  Gathered gathered_[GATHERED];
  int64_t num_gathered_ = 0;
};

inline void steer_sample(const SampleArguments& arguments, ParallelFor parallel_for, int threads) {
  Workers(parallel_for, threads).rows(arguments.rows, [&](int64_t row, const Workers& inside) {
    SampleRow(arguments, row).run(inside);
  });
}

}  // namespace SVDECODE_TARGET
}  // namespace svdecode
