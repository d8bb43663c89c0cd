// fused_steer and optimal_strength on a CPU: one pass over both inputs, then the tiles that hold kept tokens.
#pragma once

#include "kept.h"

namespace svdecode {
namespace SVDECODE_TARGET {

class SteerRow {
 public:
  SteerRow(const SteerArguments& arguments, int64_t row)
      : g_(arguments),
        row_(row),
        pair_(arguments.rows, row),
        out_(out_row(arguments.rows, arguments.out, row)),
        streamed_(arguments.rows.count * arguments.rows.vocabulary > STREAMED),
        pieces_(pair_.tiles()),
        sums_(pair_.tiles()),
        filled_(pair_.tiles()) {}

  void run(const Workers& workers) {
    statistics_ = g_.kl_out ? statistics<true>(workers) : statistics<false>(workers);
    values_ = finalise(statistics_);
    threshold_ = values_.max + g_.settings.log_alpha;
    for (int64_t t = 0; t < pair_.tiles(); ++t) {
      num_kept_tiles_ += is_kept(t);
      num_written_ += !drop() || is_kept(t) || !filled_[t];
    }
    if (!values_.valid) return write_invalid();
    mu_ = g_.source == Strength::per_row ? g_.mu_rows[row_] : g_.mu;
    const bool own = g_.source == Strength::own;
    kept_sums(workers, g_.labels != nullptr, out_ != nullptr && !own);
    if (g_.labels) write_moments();
    if (own && out_) kept_sums(workers, false, true);
    const float normaliser = out_ ? all_.steered_max + logarithm(all_.steered_total) : 0.0f;
    if (out_) write_logprobs(workers, normaliser);
    write_scalars(normaliser);
  }

 private:
  bool drop() const { return g_.settings.penalty == -INFINITE; }
  bool is_kept(int64_t tile) { return pieces_[tile].max >= threshold_; }

  void drop_tile(int64_t tile) {
    float* out = out_ + pair_.begin(tile);
    streamed_ ? stream(out, pair_.count(tile), -INFINITE) : fill(out, pair_.count(tile), -INFINITE);
  }

  // With a penalty of -inf, a tile that cannot hold a kept token (its maximum is below what this thread has seen) is filled
  // here, while the next tile is on its way.
  template <bool WITH_KL>
  Statistics statistics(const Workers& workers) {
    workers.tiles(pair_.tiles(), pair_.tiles(), [&](int64_t begin, int64_t end) {
      Buffers buffers;
      float seen = -INFINITE;
      for (int64_t t = begin; t < end; ++t) {
        const Tile tile = pair_.load(t, buffers);
        pieces_[t] = tile_statistics<WITH_KL>(pair_, tile);
        seen = larger(seen, pieces_[t].max);
        filled_[t] = out_ && drop() && pieces_[t].max < seen + g_.settings.log_alpha;
        if (filled_[t]) drop_tile(t);
      }
      finish_stream();
    });
    return merge(pieces_.get(), pair_.tiles(), WITH_KL);
  }

  void kept_sums(const Workers& workers, bool moments, bool steer) {
    const float shift = shift_outside(mu_, g_.settings.penalty);
    workers.tiles(pair_.tiles(), num_kept_tiles_, [&](int64_t begin, int64_t end) {
      Buffers buffers;
      for (int64_t t = begin; t < end; ++t) {
        KeptSums sums;
        if (!is_kept(t)) {
          add_outside_tile(sums, pieces_[t], values_, steer ? shift : -INFINITE);
        } else {
          const Tile tile = pair_.load(t, buffers);
          if (moments) {
            add_moment_sums(sums, tile, values_, threshold_, g_.settings.kl_direction);
          } else {
            count_kept(sums, tile, threshold_);
          }
          if (steer) add_steered(sums, tile, values_, threshold_, mu_, shift, g_.settings.kl_direction);
        }
        sums_[t] = sums;
      }
    });
    all_ = KeptSums();
    for (int64_t t = 0; t < pair_.tiles(); ++t) add(all_, sums_[t]);
  }

  void write_moments() {
    const int64_t label = g_.labels[row_];
    const bool ignored = label == IGNORE_INDEX;
    const Moments m = label_moments(all_, values_, pair_.z(label), pair_.a(label), threshold_, pair_.holds(label),
                                    ignored ? 0.0f : NOT_A_NUMBER, g_.settings.kl_direction);
    const float mu_star = optimal_mu(m, ignored, g_.settings.eps);
    mean_ = m.mean;
    g_.mu_star_out[row_] = mu_star;
    g_.moments_out[3 * row_] = m.n;
    g_.moments_out[3 * row_ + 1] = m.d;
    g_.moments_out[3 * row_ + 2] = m.h;
    if (g_.source == Strength::own) mu_ = mu_star;
  }

  void write_logprobs(const Workers& workers, float normaliser) {
    const float shift = shift_outside(mu_, g_.settings.penalty);
    workers.tiles(pair_.tiles(), num_written_, [&](int64_t begin, int64_t end) {
      Buffers buffers;
      for (int64_t t = begin; t < end; ++t) {
        float* out = out_ + pair_.begin(t);
        if (is_kept(t)) {
          const Tile tile = pair_.load(t, buffers);
          if (drop()) fill(out, tile.count, -INFINITE);
          for_blocks(tile, threshold_, drop(), [&](int first, int count) {
            steered_block(tile, first, count, values_, threshold_, mu_, shift, normaliser, g_.settings.kl_direction,
                          out + first);
          });
        } else if (!drop()) {
          write_shifted(pair_.load_ft(t, buffers), pair_.count(t), shift, normaliser, out);
        } else if (!filled_[t]) {
          drop_tile(t);
        }
      }
      finish_stream();
    });
  }

  void write_shifted(const float* __restrict__ z, int count, float shift, float normaliser, float* __restrict__ out) {
#pragma omp simd
    for (int i = 0; i < count; ++i) out[i] = z[i] - values_.max + shift - normaliser;
  }

  void write_scalars(float normaliser) {
    if (g_.mu_out) g_.mu_out[row_] = mu_;
    if (g_.count_out) g_.count_out[row_] = static_cast<int32_t>(all_.count);
    if (g_.kl_out) g_.kl_out[row_] = row_kl(statistics_, values_);
    if (g_.saved_out) save_row(g_.saved_out + SAVED_FIELDS * row_, values_, normaliser, mean_);
  }

  void write_invalid() {
    if (out_) fill(out_, g_.rows.vocabulary, NOT_A_NUMBER);
    if (g_.mu_out) g_.mu_out[row_] = NOT_A_NUMBER;
    if (g_.count_out) g_.count_out[row_] = 0;
    if (g_.kl_out) g_.kl_out[row_] = NOT_A_NUMBER;
    if (g_.labels) {
      g_.mu_star_out[row_] = NOT_A_NUMBER;
      for (int i = 0; i < 3; ++i) g_.moments_out[3 * row_ + i] = NOT_A_NUMBER;
    }
    if (g_.saved_out) save_row(g_.saved_out + SAVED_FIELDS * row_, values_, NOT_A_NUMBER, 0.0f);
  }

  const SteerArguments& g_;
  const int64_t row_;
  const RowPair pair_;
  float* const out_;
  const bool streamed_;
  Scratch<Statistics> pieces_;
  Scratch<KeptSums> sums_;
  Scratch<char> filled_;
  Statistics statistics_;
  KeptSums all_;
  Row values_;
  int64_t num_kept_tiles_ = 0, num_written_ = 0;
  float threshold_ = 0, mu_ = 0, mean_ = 0;
};

inline void fused_steer(const SteerArguments& arguments, ParallelFor parallel_for, int threads) {
  Workers(parallel_for, threads).rows(arguments.rows, [&](int64_t row, const Workers& inside) {
    SteerRow(arguments, row).run(inside);
  });
}

}  // namespace SVDECODE_TARGET
}  // namespace svdecode
