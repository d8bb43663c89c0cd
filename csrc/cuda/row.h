// What the CUDA kernels do with a split of a row, and with a row: statistics, their merge, kept sums, log-probs.
//
// Every function here is called by all threads of a block. A split's numbers depend on its tokens alone and are merged in a
// fixed order, so one launch or three, alone or in a batch, a row's results are bitwise the same.
#pragma once

#include "block.h"

namespace svdecode {
namespace cuda {

// The row and split of a block; a grid has fewer than 2^31 of them.
struct Place {
  int row, split, splits;
};

__device__ inline Place place(const Rows& rows) {
  const int count = splits(rows.vocabulary);
  return {static_cast<int>(blockIdx.x / count), static_cast<int>(blockIdx.x % count), count};
}

// A row's place in the scratch of a call.
struct RowScratch {
  Statistics* splits;
  KeptSums* kept;
};

struct RowInputs {
  RowPointer pre, ft;
  int32_t vocabulary;
};

__device__ inline RowInputs row_inputs(const Rows& rows, int64_t row) {
  return {row_pointer(rows, rows.pre, row), row_pointer(rows, rows.ft, row), rows.vocabulary};
}

__device__ inline int first_token(int split) { return split * SPLIT + static_cast<int>(threadIdx.x) * PER_THREAD; }

// Statistics of one split, reading both inputs once.
__device__ inline Statistics split_statistics(const RowInputs& in, int split, bool with_kl, Shared& shared) {
  float z[PER_THREAD], a[PER_THREAD];
  load(in.ft, first_token(split), in.vocabulary, z);
  load(in.pre, first_token(split), in.vocabulary, a);
  float maxima[2] = {-INFINITE, -INFINITE};
#pragma unroll
  for (int i = 0; i < PER_THREAD; ++i) {
    maxima[0] = larger(z[i], maxima[0]);
    maxima[1] = larger(a[i], maxima[1]);
  }
  block_reduce(maxima, shared, Max());
  float at_top = -INFINITE;
#pragma unroll
  for (int i = 0; i < PER_THREAD; ++i) at_top = larger(z[i] == maxima[0] ? a[i] : -INFINITE, at_top);

  Statistics s;
  s.max = maxima[0];
  s.pre_max = maxima[1];
  s.pre_top = finite_or_zero(block_reduce(at_top, shared, Max()));
  const float top = finite_or_zero(s.max), pre_base = finite_or_zero(s.pre_max);
  float sums[4] = {};
#pragma unroll
  for (int i = 0; i < PER_THREAD; ++i) {
    const float u = z[i] - top, e = exponential(u);
    sums[0] += e;
    sums[1] += e * difference_from_top(u, a[i], top, s.pre_top);
    if (with_kl) {
      sums[2] += exponential(a[i] - pre_base);
      sums[3] += a[i] == -INFINITE && z[i] > -INFINITE ? 1.0f : 0.0f;
    }
  }
  block_reduce(sums, shared, Sum());
  s.total = sums[0];
  s.weighted = sums[1];
  s.pre_total = sums[2];
  s.lost = sums[3];
  return s;
}

// Statistics of a row from those of its splits.
__device__ inline Statistics merge_splits(const Statistics* splits, int count, bool with_kl, Shared& shared) {
  float maxima[2] = {-INFINITE, -INFINITE};
  for (int i = threadIdx.x; i < count; i += THREADS) {
    maxima[0] = larger(splits[i].max, maxima[0]);
    maxima[1] = larger(splits[i].pre_max, maxima[1]);
  }
  block_reduce(maxima, shared, Max());
  float at_top = -INFINITE;
  for (int i = threadIdx.x; i < count; i += THREADS) {
    at_top = larger(splits[i].max == maxima[0] ? splits[i].pre_top : -INFINITE, at_top);
  }
  Statistics row;
  row.max = maxima[0];
  row.pre_max = maxima[1];
  row.pre_top = block_reduce(at_top, shared, Max());
  for (int i = threadIdx.x; i < count; i += THREADS) {
    add_piece(row, splits[i]);
    if (with_kl) add_pre_piece(row, splits[i]);
  }
  float sums[4] = {row.total, row.weighted, row.pre_total, row.lost};
  block_reduce(sums, shared, Sum());
  row.total = sums[0];
  row.weighted = sums[1];
  row.pre_total = sums[2];
  row.lost = sums[3];
  return row;
}

// The moment sums over the kept tokens of a split that holds one.
__device__ inline KeptSums split_moments(const RowInputs& in, int split, const Row& row, float threshold, bool kl_direction,
                                         Shared& shared) {
  float z[PER_THREAD], a[PER_THREAD];
  load(in.ft, first_token(split), in.vocabulary, z);
  load(in.pre, first_token(split), in.vocabulary, a);
  const float r = top_delta(row, kl_direction);
  float x[5] = {};
#pragma unroll
  for (int i = 0; i < PER_THREAD; ++i) {
    const bool keep = first_token(split) + i < in.vocabulary && z[i] >= threshold;
    const Steering s = steering(z[i], a[i], row, kl_direction);
    const float relative = keep ? s.delta - r : 0.0f;
    x[0] += keep ? 1.0f : 0.0f;
    x[1] += keep ? 0.0f : s.p;
    x[2] += s.p * relative;
    x[3] += keep ? s.delta * s.delta : 0.0f;
    x[4] += s.p * relative * relative;
  }
  block_reduce(x, shared, Sum());
  KeptSums sums;
  sums.count = x[0];
  sums.outside = x[1];
  sums.mean = x[2];
  sums.squares = x[3];
  sums.weighted_squares = x[4];
  return sums;
}

// The count of the kept tokens of such a split, and its part of the steered normaliser.
__device__ inline KeptSums split_steered(const RowInputs& in, int split, const Row& row, float threshold, float mu, float shift,
                                         bool kl_direction, Shared& shared) {
  float z[PER_THREAD], a[PER_THREAD];
  load(in.ft, first_token(split), in.vocabulary, z);
  load(in.pre, first_token(split), in.vocabulary, a);
  float max = -INFINITE, sums[2] = {};
#pragma unroll
  for (int i = 0; i < PER_THREAD; ++i) {
    const bool inside = first_token(split) + i < in.vocabulary, keep = inside && z[i] >= threshold;
    const Steering s = steering(z[i], a[i], row, kl_direction);
    sums[0] += keep ? 1.0f : 0.0f;
    z[i] = inside ? steered(s.u, s.delta, keep, mu, shift) : -INFINITE;
    max = larger(z[i], max);
  }
  KeptSums found;
  found.steered_max = block_reduce(max, shared, Max());
#pragma unroll
  for (int i = 0; i < PER_THREAD; ++i) sums[1] += exponential(z[i] - finite_or_zero(found.steered_max));
  block_reduce(sums, shared, Sum());
  found.count = sums[0];
  found.steered_total = sums[1];
  return found;
}

// A split without a kept token enters as it is.
__device__ inline KeptSums outside_split(const Statistics& split, const Row& row, float shift) {
  KeptSums sums;
  sums.outside = split.total * scale_to(split.max, row.max) / row.total;
  if (shift > -INFINITE) {
    sums.steered_max = split.max - row.max + shift;
    sums.steered_total = split.total;
  }
  return sums;
}

__device__ inline KeptSums merge_kept(const RowScratch& scratch, int count, const Row& row, float threshold, float shift,
                                      Shared& shared) {
  KeptSums own;
  for (int i = threadIdx.x; i < count; i += THREADS) {
    add(own, scratch.splits[i].max >= threshold ? scratch.kept[i] : outside_split(scratch.splits[i], row, shift));
  }
  float sums[5] = {own.count, own.outside, own.mean, own.squares, own.weighted_squares};
  block_reduce(sums, shared, Sum());
  KeptSums all;
  all.count = sums[0];
  all.outside = sums[1];
  all.mean = sums[2];
  all.squares = sums[3];
  all.weighted_squares = sums[4];
  all.steered_max = block_reduce(own.steered_max, shared, Max());
  all.steered_total = block_reduce(own.steered_total * scale_to(own.steered_max, all.steered_max), shared, Sum());
  return all;
}

// True in the one block that is the last of its row to arrive; what the others wrote before is visible to it.
__device__ inline bool is_last_of_row(unsigned* arrived, int splits, bool& shared_flag) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    shared_flag = atomicAdd(arrived, 1u) == static_cast<unsigned>(splits) - 1;
    __threadfence();
  }
  __syncthreads();
  return shared_flag;
}

}  // namespace cuda
}  // namespace svdecode
