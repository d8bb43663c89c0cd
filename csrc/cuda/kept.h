// The second pass: sums over the kept tokens of a tile, by one warp, and their merge, by a block.
#pragma once

#include "scratch.h"

namespace svdecode {
namespace cuda {

// zs of a token relative to the row's maximum: the one place where the CUDA kernels compute it.
__device__ inline float token_zs(float z, float a, const Merged& m, bool kl_direction) {
  const Steering s = steering(z, a, m.row, kl_direction);
  return steered(s.u, s.delta, z >= m.threshold, m.mu, m.shift);
}

// zs of a lane's tokens of a chunk, -inf outside the vocabulary.
template <Dtype D>
__device__ inline void chunk_zs(const Inputs<D>& in, int tile, int chunk, const Merged& m, bool kl_direction,
                                float (&zs)[PER_LANE]) {
  const auto tokens = load<1>(in, tile, chunk);
#pragma unroll
  for (int i = 0; i < PER_LANE; ++i) {
    const bool inside = first_token(tile, chunk) + i < in.vocabulary;
    zs[i] = inside ? token_zs(tokens.z[0][i], tokens.a[0][i], m, kl_direction) : -INFINITE;
  }
}

// Merge the tiles of a row into `m`, and list those that the operator goes on with, by all threads of a block.
__device__ inline void merge_row(const RowScratch& own, int tiles, const Settings& settings, float mu, bool with_kl, bool all,
                                 Merged& m, Shared& shared) {
  const Statistics statistics = merge_pieces(own.pieces, tiles, with_kl, shared);
  const float threshold = statistics.max + settings.log_alpha;
  const int listed = list_tiles(own.pieces, tiles, all ? -INFINITE : threshold, own.list, shared);
  if (threadIdx.x == 0) {
    m.statistics = statistics;
    m.row = finalise(statistics);
    m.threshold = threshold;
    m.mu = mu;
    m.shift = shift_outside(mu, settings.penalty);
    m.normaliser = 0.0f;
    m.moments = {0.0f, 0.0f, 0.0f, 0.0f};
    m.listed = listed;
  }
  __syncthreads();
}

// What is reduced at once, in this order.
__device__ inline KeptSums kept_sums(const float (&x)[5]) {
  KeptSums sums;
  sums.count = x[0];
  sums.outside = x[1];
  sums.mean = x[2];
  sums.squares = x[3];
  sums.weighted_squares = x[4];
  return sums;
}

// The moment sums of a tile that holds a kept token.
template <Dtype D>
__device__ inline KeptSums tile_moments(const Inputs<D>& in, int tile, const Merged& m, bool kl_direction) {
  const float r = top_delta(m.row, kl_direction);
  float x[5] = {};
  for (int chunk = 0; chunk < CHUNKS; ++chunk) {
    const auto tokens = load<1>(in, tile, chunk);
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i) {
      const float z = tokens.z[0][i];
      const bool keep = first_token(tile, chunk) + i < in.vocabulary && z >= m.threshold;
      const Steering s = steering(z, tokens.a[0][i], m.row, kl_direction);
      const float relative = keep ? s.delta - r : 0.0f;
      x[0] += keep ? 1.0f : 0.0f;
      x[1] += keep ? 0.0f : s.p;
      x[2] += s.p * relative;
      x[3] += keep ? s.delta * s.delta : 0.0f;
      x[4] += s.p * relative * relative;
    }
  }
  warp_reduce(x, Sum());
  return kept_sums(x);
}

// The count of the kept tokens of such a tile, and its part of the steered normaliser.
template <Dtype D>
__device__ inline KeptSums tile_steered(const Inputs<D>& in, int tile, const Merged& m, bool kl_direction) {
  float zs[CHUNKS][PER_LANE], max = -INFINITE, sums[2] = {};
#pragma unroll
  for (int chunk = 0; chunk < CHUNKS; ++chunk) {
    const auto tokens = load<1>(in, tile, chunk);
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i) {
      const bool inside = first_token(tile, chunk) + i < in.vocabulary;
      sums[0] += inside && tokens.z[0][i] >= m.threshold ? 1.0f : 0.0f;
      zs[chunk][i] = inside ? token_zs(tokens.z[0][i], tokens.a[0][i], m, kl_direction) : -INFINITE;
      max = fmaxf(max, zs[chunk][i]);
    }
  }
  KeptSums found;
  found.steered_max = warp_reduce(max, Max());
#pragma unroll
  for (int i = 0; i < CHUNKS * PER_LANE; ++i) {
    sums[1] += exponential(zs[i / PER_LANE][i % PER_LANE] - finite_or_zero(found.steered_max));
  }
  warp_reduce(sums, Sum());
  found.count = sums[0];
  found.steered_total = sums[1];
  return found;
}

// A tile without a kept token enters as it is.
__device__ inline KeptSums outside_tile(const Statistics& tile, const Merged& m, float shift) {
  KeptSums sums;
  sums.outside = tile.total * scale_to(tile.max, m.row.max) / m.row.total;
  if (shift > -INFINITE) {
    sums.steered_max = tile.max - m.row.max + shift;
    sums.steered_total = tile.total;
  }
  return sums;
}

__device__ inline KeptSums merge_kept(const RowScratch& scratch, int tiles, const Merged& m, float shift, Shared& shared) {
  KeptSums own;
  for (int i = threadIdx.x; i < tiles; i += THREADS) {
    if (scratch.pieces[i].max >= m.threshold) {
      add(own, scratch.kept[i]);
    } else {
      add(own, outside_tile(scratch.pieces[i], m, shift));
    }
  }
  float sums[5] = {own.count, own.outside, own.mean, own.squares, own.weighted_squares};
  block_reduce(sums, shared, Sum());
  KeptSums all = kept_sums(sums);
  all.steered_max = block_reduce(own.steered_max, shared, Max());
  all.steered_total = block_reduce(own.steered_total * scale_to(own.steered_max, all.steered_max), shared, Sum());
  return all;
}

}  // namespace cuda
}  // namespace svdecode
