// A row's steered logits without writing them: its statistics, then a walk over the tiles that hold a token with a finite zs.
#pragma once

#include "kept.h"

namespace svdecode {
namespace SVDECODE_TARGET {

struct Best {
  float max = -INFINITE, total = 0;  // steered maximum and normaliser
  int64_t token = NO_TOKEN;          // the lowest token at the maximum
};

class SteeredRow {
 public:
  SteeredRow(const Rows& rows, const Settings& settings, float mu, int64_t row)
      : pair_(rows, row),
        mu_(mu),
        shift_(shift_outside(mu, settings.penalty)),
        pieces_(pair_.tiles()),
        bests_(pair_.tiles()),
        log_alpha_(settings.log_alpha),
        kl_direction_(settings.kl_direction) {}

 protected:
  // The row's best token, maximum and normaliser; false where the row is not valid.
  bool look(const Workers& workers) {
    values_ = finalise(row_statistics<false>(pair_, pieces_.get(), workers));
    threshold_ = values_.max + log_alpha_;
    if (values_.valid) find_bests(workers);
    return values_.valid;
  }

  bool reachable(int64_t tile) { return !drop() || pieces_[tile].max >= threshold_; }

  // body(first token, zs, count) over the blocks of a tile that hold a token with a finite zs.
  template <class Body>
  void for_steered(int64_t t, Buffers& buffers, const Body& body) {
    const Tile tile = pair_.load(t, buffers);
    for_blocks(tile, threshold_, drop(), [&](int begin, int count) {
      alignas(64) float zs[BLOCK];
      steered_block(tile, begin, count, values_, threshold_, mu_, shift_, 0.0f, kl_direction_, zs);
      body(tile.begin + begin, zs, count);
    });
  }

  // Steered log-probability of one token.
  float logprob(int64_t token) const {
    const float z = pair_.z(token);
    const Steering s = steering(z, pair_.a(token), values_, kl_direction_);
    return steered(s.u, s.delta, z >= threshold_, mu_, shift_) - best_.max - logarithm(best_.total);
  }

  const RowPair pair_;
  const float mu_, shift_;
  Scratch<Statistics> pieces_;
  Scratch<Best> bests_;  // of each tile
  Best best_;            // of the row
  Row values_;
  float threshold_ = 0;

 private:
  bool drop() const { return shift_ == -INFINITE; }

  void find_bests(const Workers& workers) {
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
        bests_[t] = best;
      }
    });
    for (int64_t t = 0; t < pair_.tiles(); ++t) {
      if (bests_[t].max > best_.max) best_.token = bests_[t].token;
      add_totals(best_.max, best_.total, bests_[t].max, bests_[t].total);
    }
  }

  const float log_alpha_;
  const bool kl_direction_;
};

}  // namespace SVDECODE_TARGET
}  // namespace svdecode
