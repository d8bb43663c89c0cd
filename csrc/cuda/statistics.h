// Statistics of a tile, and of a row from those of its tiles.
//
// A tile's numbers depend on its tokens alone and are merged in a fixed order, so that one launch or several, alone or in a
// batch, a row's results are bitwise the same.
#pragma once

#include "tile.h"

namespace svdecode {
namespace cuda {

struct alignas(16) Piece : Statistics {};
struct alignas(16) KeptPiece : KeptSums {};

constexpr float LARGE = 0x1p100f;  // a sum beyond this is not far from overflowing where it is merged

// As if no logit were infinite, which the sums tell afterwards: they are then not finite, or have overflowed.
template <bool WITH_KL, Dtype D>
__device__ inline Statistics plain_statistics(const Tokens<D, CHUNKS>& tokens) {
  float max = -INFINITE, at_top = -INFINITE, sums[3] = {};
#pragma unroll
  for (int i = 0; i < CHUNKS * PER_LANE; ++i) max = fmaxf(max, tokens.z[i / PER_LANE][i % PER_LANE]);
  const float lane_max = max;
  max = warp_reduce(max, Max());
#pragma unroll
  for (int i = 0; i < CHUNKS * PER_LANE; ++i) {
    if (tokens.z[i / PER_LANE][i % PER_LANE] == max) at_top = tokens.a[i / PER_LANE][i % PER_LANE];
  }
  const int winner = __ffs(static_cast<int>(__ballot_sync(ALL_LANES, lane_max == max))) - 1;
  const float pre_top = __shfl_sync(ALL_LANES, at_top, winner);
#pragma unroll
  for (int i = 0; i < CHUNKS * PER_LANE; ++i) {
    const float u = tokens.z[i / PER_LANE][i % PER_LANE] - max, w = tokens.a[i / PER_LANE][i % PER_LANE] - pre_top;
    const float e = exponential(u);
    sums[0] += e;
    sums[1] = __fmaf_rn(e, u - w, sums[1]);
    if (WITH_KL) sums[2] += exponential(w);
  }
  warp_reduce(sums, Sum());
  Statistics s;
  s.max = max;
  s.pre_top = s.pre_max = pre_top;
  s.total = sums[0];
  s.weighted = sums[1];
  s.pre_total = sums[2];
  return s;
}

// The same with all that infinities ask for.
template <Dtype D>
__device__ inline Statistics careful_statistics(const Tokens<D, CHUNKS>& tokens, bool with_kl) {
  float maxima[2] = {-INFINITE, -INFINITE}, at_top = -INFINITE, sums[4] = {};
#pragma unroll
  for (int i = 0; i < CHUNKS * PER_LANE; ++i) {
    maxima[0] = fmaxf(maxima[0], tokens.z[i / PER_LANE][i % PER_LANE]);
    maxima[1] = fmaxf(maxima[1], tokens.a[i / PER_LANE][i % PER_LANE]);
  }
  warp_reduce(maxima, Max());
#pragma unroll
  for (int i = 0; i < CHUNKS * PER_LANE; ++i) {
    if (tokens.z[i / PER_LANE][i % PER_LANE] == maxima[0]) at_top = fmaxf(at_top, tokens.a[i / PER_LANE][i % PER_LANE]);
  }
  Statistics s;
  s.max = maxima[0];
  s.pre_max = maxima[1];
  s.pre_top = warp_reduce(at_top, Max());
  const float top = finite_or_zero(s.max), pre_base = finite_or_zero(s.pre_max), pre_top = top_base(s);
#pragma unroll
  for (int i = 0; i < CHUNKS * PER_LANE; ++i) {
    const float z = tokens.z[i / PER_LANE][i % PER_LANE], a = tokens.a[i / PER_LANE][i % PER_LANE];
    const float u = z - top, e = exponential(u);
    sums[0] += e;
    sums[1] += e * difference_from_top(u, a, top, pre_top);
    if (with_kl) {
      sums[2] += exponential(a - pre_base);
      sums[3] += a == -INFINITE && z > -INFINITE ? 1.0f : 0.0f;
    }
  }
  warp_reduce(sums, Sum());
  s.total = sums[0];
  s.weighted = sums[1];
  s.pre_total = sums[2];
  s.lost = sums[3];
  return s;
}

template <Dtype D>
__device__ inline Statistics tile_statistics(const Tokens<D, CHUNKS>& tokens, bool with_kl, bool whole) {
  Statistics s;
  bool sound = false;
  if (whole) {
    s = with_kl ? plain_statistics<true>(tokens) : plain_statistics<false>(tokens);
    sound = is_finite(s.weighted) && s.total < LARGE && s.pre_total < LARGE;
  }
  return sound ? s : careful_statistics(tokens, with_kl);
}

// Statistics of a row from those of its tiles, by all threads of a block.
__device__ inline Statistics merge_pieces(const Piece* pieces, int count, bool with_kl, Shared& shared) {
  float maxima[2] = {-INFINITE, -INFINITE};
  for (int i = threadIdx.x; i < count; i += THREADS) {
    maxima[0] = fmaxf(pieces[i].max, maxima[0]);
    maxima[1] = fmaxf(pieces[i].pre_max, maxima[1]);
  }
  block_reduce(maxima, shared, Max());
  float at_top = -INFINITE;
  for (int i = threadIdx.x; i < count; i += THREADS) {
    if (pieces[i].max == maxima[0]) at_top = fmaxf(pieces[i].pre_top, at_top);
  }
  Statistics row;
  row.max = maxima[0];
  row.pre_max = maxima[1];
  row.pre_top = block_reduce(at_top, shared, Max());
  for (int i = threadIdx.x; i < count; i += THREADS) {
    add_piece(row, pieces[i]);
    if (with_kl) add_pre_piece(row, pieces[i]);
  }
  float sums[4] = {row.total, row.weighted, row.pre_total, row.lost};
  block_reduce(sums, shared, Sum());
  row.total = sums[0];
  row.weighted = sums[1];
  row.pre_total = sums[2];
  row.lost = sums[3];
  return row;
}

// List, in their order, the tiles whose maximum is at least `least`, and return how many there are; by all threads of a block.
__device__ inline int list_tiles(const Piece* pieces, int count, float least, int* list, Shared& shared) {
  const int each = (count + THREADS - 1) / THREADS, begin = static_cast<int>(threadIdx.x) * each;
  const int end = begin + each < count ? begin + each : count;
  int own = 0;
  for (int i = begin; i < end; ++i) own += pieces[i].max >= least;
  float total;
  int at = static_cast<int>(block_prefix_sum(static_cast<float>(own), shared, total)) - own;
  for (int i = begin; i < end; ++i) {
    if (pieces[i].max >= least) list[at++] = i;
  }
  __syncthreads();
  return static_cast<int>(total);
}

}  // namespace cuda
}  // namespace svdecode
