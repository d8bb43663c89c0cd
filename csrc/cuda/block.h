// A block of threads working on one piece of a row: what nvcc and the host emulation both compile.
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

constexpr int WARP = 32;
constexpr int THREADS = 256;
constexpr int PER_THREAD = 8;                // 16 bytes of bf16, twice 16 of fp32: full-width loads, few registers
constexpr int SPLIT = THREADS * PER_THREAD;  // tokens of a block; depends on nothing, so neither do the sums' orders

struct Sum {
  __device__ float operator()(float x, float y) const { return x + y; }
};
struct Max {
  __device__ float operator()(float x, float y) const { return larger(x, y); }
};

// Memory that a block's reductions share.
constexpr int REDUCED = 5;  // values reduced at once
struct Shared {
  float reduced[REDUCED][THREADS / WARP];
};

// Reduce N values over the block, the same result in every thread: a butterfly in each warp, then the warps in their order.
template <int N, class Op>
__device__ inline void block_reduce(float (&x)[N], Shared& shared, Op op) {
  static_assert(N <= REDUCED, "Shared is too small");
#pragma unroll
  for (int offset = WARP / 2; offset > 0; offset /= 2) {
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = op(x[i], __shfl_xor_sync(0xFFFFFFFFu, x[i], offset));
  }
  if (threadIdx.x % WARP == 0) {
#pragma unroll
    for (int i = 0; i < N; ++i) shared.reduced[i][threadIdx.x / WARP] = x[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < N; ++i) {
    x[i] = shared.reduced[i][0];
    for (int warp = 1; warp < THREADS / WARP; ++warp) x[i] = op(x[i], shared.reduced[i][warp]);
  }
  __syncthreads();  // before the next reduction overwrites what a slow warp still reads
}

template <class Op>
__device__ inline float block_reduce(float x, Shared& shared, Op op) {
  float one[1] = {x};
  block_reduce(one, shared, op);
  return one[0];
}

// Inclusive prefix sum over the threads of a block; `total` is the sum over all of them.
__device__ inline float block_prefix_sum(float x, Shared& shared, float& total) {
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  for (int offset = 1; offset < WARP; offset *= 2) {
    const float other = __shfl_up_sync(0xFFFFFFFFu, x, offset);
    if (lane >= offset) x += other;
  }
  if (lane == WARP - 1) shared.reduced[0][warp] = x;
  __syncthreads();
  float before = 0.0f;
  total = 0.0f;
  for (int w = 0; w < THREADS / WARP; ++w) {
    if (w == warp) before = total;
    total += shared.reduced[0][w];
  }
  __syncthreads();
  return before + x;
}

__device__ inline float to_float(uint16_t bits, Dtype dtype) {
  return dtype == Dtype::bfloat16 ? __bfloat162float(__ushort_as_bfloat16(bits)) : __half2float(__ushort_as_half(bits));
}

// A row of one input.
struct RowPointer {
  const char* data;
  Dtype dtype;
};

__device__ inline RowPointer row_pointer(const Rows& rows, const Logits& logits, int64_t row) {
  const int64_t start = row_start(rows, logits.strides, row);
  return {static_cast<const char*>(logits.data) + start * (logits.dtype == Dtype::float32 ? 4 : 2), logits.dtype};
}

__device__ inline float load_one(const RowPointer& row, int64_t token) {
  if (row.dtype == Dtype::float32) return reinterpret_cast<const float*>(row.data)[token];
  return to_float(reinterpret_cast<const uint16_t*>(row.data)[token], row.dtype);
}

// PER_THREAD tokens from `first` on, -inf outside the vocabulary; by 16 bytes where the row begins at a multiple of 16.
__device__ inline void load(const RowPointer& row, int first, int vocabulary, float* values) {
  const bool aligned = reinterpret_cast<uintptr_t>(row.data) % 16 == 0;
  if (aligned && first + PER_THREAD <= vocabulary) {
    if (row.dtype == Dtype::float32) {
      const uint4* from = reinterpret_cast<const uint4*>(row.data + 4 * int64_t{first});
      const uint4 low = __ldg(from), high = __ldg(from + 1);
      const uint32_t words[PER_THREAD] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
      for (int i = 0; i < PER_THREAD; ++i) values[i] = __uint_as_float(words[i]);
    } else {
      const uint4 word = __ldg(reinterpret_cast<const uint4*>(row.data + 2 * int64_t{first}));
      const uint32_t pairs[PER_THREAD / 2] = {word.x, word.y, word.z, word.w};
#pragma unroll
      for (int i = 0; i < PER_THREAD / 2; ++i) {
        values[2 * i] = to_float(static_cast<uint16_t>(pairs[i] & 0xFFFF), row.dtype);
        values[2 * i + 1] = to_float(static_cast<uint16_t>(pairs[i] >> 16), row.dtype);
      }
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < PER_THREAD; ++i) values[i] = first + i < vocabulary ? load_one(row, first + i) : -INFINITE;
}

__device__ inline void store(float* row, int first, int vocabulary, const float* values) {
  float* out = row + first;
  if (first + PER_THREAD <= vocabulary && reinterpret_cast<uintptr_t>(out) % 16 == 0) {
    reinterpret_cast<float4*>(out)[0] = make_float4(values[0], values[1], values[2], values[3]);
    reinterpret_cast<float4*>(out)[1] = make_float4(values[4], values[5], values[6], values[7]);
    return;
  }
#pragma unroll
  for (int i = 0; i < PER_THREAD; ++i) {
    if (first + i < vocabulary) out[i] = values[i];
  }
}

__host__ __device__ inline int splits(int32_t vocabulary) { return (vocabulary + SPLIT - 1) / SPLIT; }

}  // namespace cuda
}  // namespace svdecode
