// steer_sample on a CPU: one token a row, no sort, nothing of size V.
//
// Greedy takes the best kept token (of all tokens with a finite penalty). A draw inverts the cumulative distribution at the row's
// uniform number. top_k and top_p are limits on the cost max(zs) - zs >= 0 of a token, as in kernels/steer_sample.py. The tokens
// that can be drawn are gathered once if there are few, which is nearly always, and else computed again on every walk.
#pragma once

#include "kept.h"

namespace svdecode {
namespace SVDECODE_TARGET {

constexpr int GATHERED = 4096;

struct Best {
  float max = -INFINITE, total = 0;  // steered maximum and normaliser
  int64_t token = NO_TOKEN;          // the lowest token at the maximum
};

class SampleRow {
 public:
  SampleRow(const SampleArguments& arguments, int64_t row)
      : g_(arguments), row_(row), pair_(arguments.rows, row), pieces_(pair_.tiles()) {}

  void run(const Workers& workers) {
    values_ = finalise(row_statistics<false>(pair_, pieces_.get(), workers));
    if (!values_.valid) return write(-1, NOT_A_NUMBER);
    threshold_ = values_.max + g_.settings.log_alpha;
    mu_ = g_.mu_rows ? g_.mu_rows[row_] : g_.mu;
    shift_ = shift_outside(mu_, g_.settings.penalty);
    const Best best = best_of_row(workers);
    top_ = best.max;
    const int64_t token = g_.temperature == 0.0f || best.token == NO_TOKEN ? best.token : draw();
    if (!pair_.holds(token)) return write(-1, NOT_A_NUMBER);
    const float z = pair_.z(token);
    const Steering s = steering(z, pair_.a(token), values_, g_.settings.kl_direction);
    write(token, steered(s.u, s.delta, z >= threshold_, mu_, shift_) - best.max - logarithm(best.total));
  }

 private:
  bool drop() const { return shift_ == -INFINITE; }
  bool reachable(int64_t tile) { return !drop() || pieces_[tile].max >= threshold_; }

  void write(int64_t token, float logprob) {
    g_.tokens_out[row_] = logprob == logprob ? token : -1;
    g_.logprobs_out[row_] = logprob;
  }

  // body(first token, zs, count) over the blocks of a tile that hold a token with a finite zs.
  template <class Body>
  void for_steered(int64_t t, Buffers& buffers, const Body& body) {
    const Tile tile = pair_.load(t, buffers);
    for_blocks(tile, threshold_, drop(), [&](int begin, int count) {
      alignas(64) float zs[BLOCK];
      steered_block(tile, begin, count, values_, threshold_, mu_, shift_, 0.0f, g_.settings.kl_direction, zs);
      body(tile.begin + begin, zs, count);
    });
  }

  Best best_of_row(const Workers& workers) {
    Scratch<Best> bests(pair_.tiles());
    int64_t busy = 0;
    for (int64_t t = 0; t < pair_.tiles(); ++t) busy += reachable(t);
    workers.tiles(pair_.tiles(), busy, [&](int64_t begin, int64_t end) {
      Buffers buffers;
      for (int64_t t = begin; t < end; ++t) {
        Best best;
        if (reachable(t)) {
          float max = -INFINITE;
          for_steered(t, buffers, [&](int64_t first, const float* zs, int count) {
            add_block_total(max, best.total, zs, count);
            if (!(max > best.max)) return;  // a tie keeps the lower token
            best.max = max;
            best.token = first;
            while (zs[best.token - first] != max) ++best.token;
          });
        }
        bests[t] = best;
      }
    });
    Best all;
    for (int64_t t = 0; t < pair_.tiles(); ++t) {
      if (bests[t].max > all.max) all.token = bests[t].token;
      add_totals(all.max, all.total, bests[t].max, bests[t].total);
    }
    return all;
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
          if (zs[i] > -INFINITE) go_on = body(first + i, top_ - zs[i]);
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
  const RowPair pair_;
  Scratch<Statistics> pieces_;
  Row values_;
  float threshold_ = 0, mu_ = 0, shift_ = 0, top_ = 0;
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
