// A row's steered logits without writing them, split by split: what the operators share that choose tokens.
#pragma once

#include "row.h"

namespace svdecode {
namespace cuda {

struct SteeredRow {
  Row row;
  float threshold, mu, shift;
};

// Merge the splits of a row into `steered`, in shared memory, by all threads of the block that is the last of the row.
__device__ inline void merge_steered(const Statistics* splits, int count, const Settings& settings, float mu,
                                     SteeredRow& steered, Shared& shared) {
  const Statistics merged = merge_splits(splits, count, false, shared);
  if (threadIdx.x == 0) {
    steered.row = finalise(merged);
    steered.threshold = steered.row.max + settings.log_alpha;
    steered.mu = mu;
    steered.shift = shift_outside(mu, settings.penalty);
  }
  __syncthreads();
}

// zs of the tokens of a thread, relative to the row's maximum, -inf where there is none.
__device__ inline void steered_tokens(const RowInputs& in, int split, const SteeredRow& s, bool kl_direction,
                                      float (&zs)[PER_THREAD]) {
  float a[PER_THREAD];
  load(in.ft, first_token(split), in.vocabulary, zs);
  load(in.pre, first_token(split), in.vocabulary, a);
#pragma unroll
  for (int i = 0; i < PER_THREAD; ++i) {
    const bool inside = first_token(split) + i < in.vocabulary;
    const Steering token = steering(zs[i], a[i], s.row, kl_direction);
    zs[i] = inside ? steered(token.u, token.delta, zs[i] >= s.threshold, s.mu, s.shift) : -INFINITE;
  }
}

__device__ inline bool is_reachable(const Statistics& split, const SteeredRow& s) {
  return s.shift > -INFINITE || split.max >= s.threshold;
}

struct Best {
  float max;
  int token;  // the lowest one at the maximum, NO_TOKEN where all are -inf
};

// The best of what the threads of a block hold, the same in all of them.
__device__ inline Best block_best(const Best& own, Shared& shared) {
  Best best;
  best.max = block_reduce(own.max, shared, Max());
  // Token ids below 2^24 are exact in fp32; larger vocabularies do not exist.
  const bool is_best = own.max == best.max && own.token != NO_TOKEN;
  const float lowest = -block_reduce(is_best ? static_cast<float>(-own.token) : -0x1p30f, shared, Max());
  best.token = lowest < 0x1p30f ? static_cast<int>(lowest) : NO_TOKEN;
  return best;
}

// The best of the tokens of a thread.
__device__ inline Best thread_best(const float (&zs)[PER_THREAD], int split) {
  Best own = {-INFINITE, NO_TOKEN};
#pragma unroll
  for (int i = 0; i < PER_THREAD; ++i) {
    if (zs[i] > own.max) own.token = first_token(split) + i;
    own.max = larger(zs[i], own.max);
  }
  return own;
}

}  // namespace cuda
}  // namespace svdecode
