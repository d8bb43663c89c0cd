// steering_vector on a CPU: delta on K, 0 elsewhere.
#pragma once

#include "tile.h"

namespace svdecode {
namespace SVDECODE_TARGET {

inline void steering_vector(const VectorArguments& g, ParallelFor parallel_for, int threads) {
  Workers(parallel_for, threads).rows(g.rows, [&](int64_t row, const Workers& inside) {
    const RowPair pair(g.rows, row);
    Scratch<Statistics> pieces(pair.tiles());
    const Row values = finalise(row_statistics<false>(pair, pieces.get(), inside));
    const float threshold = values.max + g.settings.log_alpha;
    float* const out = out_row(g.rows, g.out, row);
    if (g.saved_out) save_row(g.saved_out + SAVED_FIELDS * row, values, 0.0f, 0.0f);
    if (!values.valid) return fill(out, g.rows.vocabulary, NOT_A_NUMBER);
    inside.tiles(pair.tiles(), pair.tiles(), [&, values, threshold](int64_t begin, int64_t end) {
      Buffers buffers;
      const bool kl_direction = g.settings.kl_direction;
      for (int64_t t = begin; t < end; ++t) {
        float* __restrict__ delta = out + pair.begin(t);
        if (pieces[t].max < threshold) {
          fill(delta, pair.count(t), 0.0f);
          continue;
        }
        const Tile tile = pair.load(t, buffers);
        const Row row = values;
#pragma omp simd
        for (int i = 0; i < tile.count; ++i) {
          const float kept =
              tile.z[i] >= threshold ? 1.0f : 0.0f;  // a factor: a branch would keep the loop from being vectorised
          delta[i] = kept * steering(tile.z[i], tile.a[i], row, kl_direction).delta;
        }
      }
    });
  });
}

}  // namespace SVDECODE_TARGET
}  // namespace svdecode
