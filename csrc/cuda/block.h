// Warps and blocks of threads: their sizes and reductions, what nvcc and the host emulation both compile.
#pragma once

#ifdef SVDECODE_EMULATION
#include "../emulation/cuda_on_host.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

#define SVDECODE_TARGET cuda
#include "../arguments.h"
#include "../row_algebra.h"
#include "../row_layout.h"

namespace svdecode {
namespace cuda {

constexpr unsigned ALL_LANES = 0xFFFFFFFFu;
constexpr int WARP = 32;
constexpr int THREADS = 256;
constexpr int WARPS = THREADS / WARP;
constexpr int PER_LANE = 8;             // consecutive tokens of a lane: 16 bytes of bf16, twice 16 of fp32
constexpr int CHUNK = WARP * PER_LANE;  // tokens that a warp loads at once
constexpr int CHUNKS = 2;
constexpr int TILE = CHUNKS * CHUNK;  // tokens whose sums are kept together: the work of one warp, without a barrier
constexpr int SPLIT = WARPS * TILE;   // tokens of a block

__device__ inline int lane_index() { return static_cast<int>(threadIdx.x) % WARP; }
__device__ inline int warp_index() { return static_cast<int>(threadIdx.x) / WARP; }

struct Sum {
  __device__ float operator()(float x, float y) const { return x + y; }
};
struct Max {
  __device__ float operator()(float x, float y) const { return fmaxf(x, y); }
};

// Reduce N values over a warp by a butterfly, which gives all lanes the same bits.
template <int N, class Op>
__device__ inline void warp_reduce(float (&x)[N], Op op) {
#pragma unroll
  for (int offset = WARP / 2; offset > 0; offset /= 2) {
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = op(x[i], __shfl_xor_sync(ALL_LANES, x[i], offset));
  }
}

template <class Op>
__device__ inline float warp_reduce(float x, Op op) {
  float one[1] = {x};
  warp_reduce(one, op);
  return one[0];
}

// A token and its value; better is larger, ties go to the lower token.
struct Best {
  float max = -INFINITE;
  int token = NO_TOKEN;  // where all are -inf
};

__device__ inline void keep_better(Best& best, float max, int token) {
  const bool better = max > best.max || (max == best.max && token < best.token);
  best.max = better ? max : best.max;
  best.token = better ? token : best.token;
}

__device__ inline Best warp_best(Best best) {
#pragma unroll
  for (int offset = WARP / 2; offset > 0; offset /= 2) {
    const float max = __shfl_xor_sync(ALL_LANES, best.max, offset);
    keep_better(best, max, __shfl_xor_sync(ALL_LANES, best.token, offset));
  }
  return best;
}

// Memory that a block's reductions share.
constexpr int REDUCED = 5;  // values reduced at once
struct Shared {
  float reduced[REDUCED][WARPS];
  int tokens[WARPS];
};

// Reduce N values over the block, the same result in every thread: in each warp, then the warps in their order.
template <int N, class Op>
__device__ inline void block_reduce(float (&x)[N], Shared& shared, Op op) {
  static_assert(N <= REDUCED, "Shared is too small");
  warp_reduce(x, op);
  if (lane_index() == 0) {
#pragma unroll
    for (int i = 0; i < N; ++i) shared.reduced[i][warp_index()] = x[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < N; ++i) {
    x[i] = shared.reduced[i][0];
    for (int warp = 1; warp < WARPS; ++warp) x[i] = op(x[i], shared.reduced[i][warp]);
  }
  __syncthreads();  // before the next reduction overwrites what a slow warp still reads
}

template <class Op>
__device__ inline float block_reduce(float x, Shared& shared, Op op) {
  float one[1] = {x};
  block_reduce(one, shared, op);
  return one[0];
}

__device__ inline Best block_best(Best best, Shared& shared) {
  best = warp_best(best);
  if (lane_index() == 0) {
    shared.reduced[0][warp_index()] = best.max;
    shared.tokens[warp_index()] = best.token;
  }
  __syncthreads();
  for (int warp = 0; warp < WARPS; ++warp) keep_better(best, shared.reduced[0][warp], shared.tokens[warp]);
  __syncthreads();
  return best;
}

// Inclusive prefix sum over the threads of a block; `total` is the sum over all of them.
__device__ inline float block_prefix_sum(float x, Shared& shared, float& total) {
  const int lane = lane_index();
#pragma unroll
  for (int offset = 1; offset < WARP; offset *= 2) {
    const float other = __shfl_up_sync(ALL_LANES, x, offset);
    if (lane >= offset) x += other;
  }
  if (lane == WARP - 1) shared.reduced[0][warp_index()] = x;
  __syncthreads();
  float before = 0.0f;
  total = 0.0f;
  for (int warp = 0; warp < WARPS; ++warp) {
    if (warp == warp_index()) before = total;
    total += shared.reduced[0][warp];
  }
  __syncthreads();
  return before + x;
}

// Count an arrival and return the number of earlier ones: what they wrote before theirs is visible after this one.
__device__ inline unsigned arrive(unsigned* counter) {
#ifdef SVDECODE_EMULATION
  return atomicAdd(counter, 1u);
#else
  unsigned before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
  return before;
#endif
}

// True in the one block that is the last of `blocks` to arrive; what the others wrote before is visible to it.
__device__ inline bool is_last(unsigned* arrived, int blocks, bool& shared_flag) {
  __syncthreads();
  if (threadIdx.x == 0) shared_flag = arrive(arrived) == static_cast<unsigned>(blocks) - 1;
  __syncthreads();
  return shared_flag;
}

}  // namespace cuda
}  // namespace svdecode
