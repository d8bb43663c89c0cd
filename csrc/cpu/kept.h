// Second pass: the sums over the kept tokens, from the tiles that hold one.
#pragma once

#include "tile.h"

namespace svdecode {
namespace SVDECODE_TARGET {

inline bool holds_kept(const float* z, int count, float threshold) {
  int found = 0;
#pragma omp simd reduction(| : found)
  for (int i = 0; i < count; ++i) found |= z[i] >= threshold;
  return found;
}

// body(begin, count) for the blocks of a tile, leaving out those without a kept token if `only_kept`.
template <class Body>
inline void for_blocks(const Tile& tile, float threshold, bool only_kept, const Body& body) {
  for (int begin = 0; begin < tile.count; begin += BLOCK) {
    const int count = begin + BLOCK < tile.count ? BLOCK : tile.count - begin;
    if (only_kept && !holds_kept(tile.z + begin, count, threshold)) continue;
    body(begin, count);
  }
}

inline void add_moment_sums(KeptSums& sums, const Tile& tile, const Row& row, float threshold, bool kl_direction) {
  const float r = top_delta(row, kl_direction);
  float count = 0, outside = 0, mean = 0, squares = 0, weighted = 0;
#pragma omp simd reduction(+ : count, outside, mean, squares, weighted)
  for (int i = 0; i < tile.count; ++i) {
    const Steering s = steering(tile.z[i], tile.a[i], row, kl_direction);
    const bool keep = tile.z[i] >= threshold;
    const float x = keep ? s.delta - r : 0.0f, delta = keep ? s.delta : 0.0f;
    count += keep ? 1.0f : 0.0f;
    outside += keep ? 0.0f : s.p;
    mean += s.p * x;
    squares += delta * delta;
    weighted += s.p * x * x;
  }
  sums.count += count;
  sums.outside += outside;
  sums.mean += mean;
  sums.squares += squares;
  sums.weighted_squares += weighted;
}

inline void count_kept(KeptSums& sums, const Tile& tile, float threshold) {
  int count = 0;
#pragma omp simd reduction(+ : count)
  for (int i = 0; i < tile.count; ++i) count += tile.z[i] >= threshold;
  sums.count += static_cast<float>(count);
}

// zs - base of a block, zs relative to the row's maximum.
inline void steered_block(const Tile& tile, int begin, int count, const Row& row, float threshold, float mu, float shift,
                          float base, bool kl_direction, float* __restrict__ out) {
  const float* __restrict__ z = tile.z + begin;
  const float* __restrict__ a = tile.a + begin;
#pragma omp simd
  for (int i = 0; i < count; ++i) {
    const Steering s = steering(z[i], a[i], row, kl_direction);
    out[i] = steered(s.u, s.delta, z[i] >= threshold, mu, shift) - base;
  }
}

inline void add_block_total(float& max, float& total, const float* __restrict__ zs, int count) {
  float block_max = -INFINITE, block_total = 0;
#pragma omp simd reduction(max : block_max)
  for (int i = 0; i < count; ++i) block_max = zs[i] > block_max ? zs[i] : block_max;
  const float base = finite_or_zero(block_max);
#pragma omp simd reduction(+ : block_total)
  for (int i = 0; i < count; ++i) block_total += exponential(zs[i] - base);
  add_totals(max, total, block_max, block_total);
}

inline void add_steered(KeptSums& sums, const Tile& tile, const Row& row, float threshold, float mu, float shift,
                        bool kl_direction) {
  for_blocks(tile, threshold, shift == -INFINITE, [&](int begin, int count) {
    alignas(64) float zs[BLOCK];
    steered_block(tile, begin, count, row, threshold, mu, shift, 0.0f, kl_direction, zs);
    add_block_total(sums.steered_max, sums.steered_total, zs, count);
  });
}

// A tile without a kept token enters as it is: no difference of masses, nothing cancels.
inline void add_outside_tile(KeptSums& sums, const Statistics& tile, const Row& row, float shift) {
  sums.outside += tile.total * scale_to(tile.max, row.max) / row.total;
  if (shift > -INFINITE) add_totals(sums.steered_max, sums.steered_total, tile.max - row.max + shift, tile.total);
}

}  // namespace SVDECODE_TARGET
}  // namespace svdecode
