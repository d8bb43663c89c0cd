// steered_nll on a CPU: the NLL of a row's label under M strengths; nothing of size V is written.
#pragma once

#include "kept.h"

namespace svdecode {
namespace SVDECODE_TARGET {

struct Normaliser {
  float max, total;
};

inline void nll_of_row(const NllArguments& g, int64_t row, const Workers& workers) {
  const RowPair pair(g.rows, row);
  const bool kl_direction = g.settings.kl_direction;
  Scratch<Statistics> pieces(pair.tiles());
  const Row values = finalise(row_statistics<false>(pair, pieces.get(), workers));
  const float threshold = values.max + g.settings.log_alpha;
  float* const nll = g.nll_out + g.strengths * row;
  if (g.saved_out) save_row(g.saved_out + SAVED_FIELDS * row, values, 0.0f, 0.0f);
  if (!values.valid) return fill(nll, g.strengths, NOT_A_NUMBER);

  float outside = 0;
  Scratch<int64_t> kept(pair.tiles());
  int64_t num_kept = 0;
  for (int64_t t = 0; t < pair.tiles(); ++t) {
    if (pieces[t].max >= threshold) {
      kept[num_kept++] = t;
    } else {
      outside += pieces[t].total * scale_to(pieces[t].max, values.max);
    }
  }
  // One running normaliser a strength and kept tile, merged in the order of the tiles.
  Scratch<Normaliser> normalisers(num_kept * g.strengths);
  workers.tiles(num_kept, num_kept, [&](int64_t begin, int64_t end) {
    Buffers buffers;
    for (int64_t k = begin; k < end; ++k) {
      const Tile tile = pair.load(kept[k], buffers);
      for (int64_t m = 0; m < g.strengths; ++m) {
        KeptSums sums;
        const float mu = g.mu[m];
        add_steered(sums, tile, values, threshold, mu, shift_outside(mu, g.settings.penalty), kl_direction);
        normalisers[k * g.strengths + m] = {sums.steered_max, sums.steered_total};
      }
    }
  });
  const int64_t label = g.labels[row];
  const float z = pair.z(label), a = pair.a(label);
  const Steering s = steering(z, a, values, kl_direction);
  for (int64_t m = 0; m < g.strengths; ++m) {
    const float mu = g.mu[m], shift = shift_outside(mu, g.settings.penalty);
    float max = outside > 0 ? shift : -INFINITE;
    float total = shift > -INFINITE ? outside : 0.0f;
    for (int64_t k = 0; k < num_kept; ++k) {
      const Normaliser& piece = normalisers[k * g.strengths + m];
      add_totals(max, total, piece.max, piece.total);
    }
    const float value = max + logarithm(total) - steered(s.u, s.delta, z >= threshold, mu, shift);
    nll[m] = pair.holds(label) ? value : label == IGNORE_INDEX ? 0.0f : NOT_A_NUMBER;
  }
}

inline void steered_nll(const NllArguments& arguments, ParallelFor parallel_for, int threads) {
  Workers(parallel_for, threads).rows(arguments.rows, [&](int64_t row, const Workers& inside) {
    nll_of_row(arguments, row, inside);
  });
}

}  // namespace SVDECODE_TARGET
}  // namespace svdecode
