// What every operator begins with, and what those share that choose tokens from a row's steered logits without writing them.
#pragma once

#include "kept.h"

namespace svdecode {
namespace cuda {

// Statistics of a warp's tile; its output, where there is one, is filled with -inf while the inputs are on their way.
template <Dtype D>
__device__ inline void first_pass(const Inputs<D>& in, const Place& at, const RowScratch& own, bool with_kl, float* out) {
  if (at.tile >= at.tiles) return;
  const auto tokens = load<CHUNKS>(in, at.tile, 0);
  if (out) fill(out, at.tile, in.vocabulary, -INFINITE);
  const Statistics s = tile_statistics(tokens, with_kl, (at.tile + 1) * TILE <= in.vocabulary);
  if (lane_index() == 0) own.pieces[at.tile] = {s};
}

// Merge the tiles of a row and list those that can hold its best token.
template <class Arguments>
__device__ inline void merge_steered(const Arguments& g, const Place& at, const RowScratch& own, Merged& m, Shared& shared) {
  const float mu = g.mu_rows ? g.mu_rows[at.row] : g.mu;
  merge_row(own, at.tiles, g.settings, mu, false, shift_outside(mu, g.settings.penalty) > -INFINITE, m, shared);
}

// (max, total) of a steered normaliser.
struct Normaliser {
  float max = -INFINITE, total = 0.0f;
};

__device__ inline float log_total(const Normaliser& n) { return n.max + logarithm(n.total); }

// Add a lane's tokens of a chunk to what its warp has seen.
__device__ inline void add_chunk(Normaliser& normaliser, Best& best, const float (&zs)[PER_LANE], int first) {
  Best here;
#pragma unroll
  for (int i = 0; i < PER_LANE; ++i) {
    if (zs[i] > here.max) here.token = first + i;
    here.max = fmaxf(here.max, zs[i]);
  }
  here = warp_best(here);
  keep_better(best, here.max, here.token);
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < PER_LANE; ++i) sum += exponential(zs[i] - finite_or_zero(here.max));
  add_totals(normaliser.max, normaliser.total, here.max, warp_reduce(sum, Sum()));
}

// The normaliser of a row from those of a block's warps, in their order.
__device__ inline Normaliser merge_normalisers(const Normaliser& own, Shared& shared) {
  if (lane_index() == 0) {
    shared.reduced[0][warp_index()] = own.max;
    shared.reduced[1][warp_index()] = own.total;
  }
  __syncthreads();
  Normaliser all;
  for (int warp = 0; warp < WARPS; ++warp) {
    add_totals(all.max, all.total, shared.reduced[0][warp], shared.reduced[1][warp]);
  }
  __syncthreads();
  return all;
}

}  // namespace cuda
}  // namespace svdecode
