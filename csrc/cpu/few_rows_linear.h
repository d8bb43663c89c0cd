// y = x W^T + b for a few rows x, as a decoding step has them: the weights are read once, and that is what it costs.
//
// A matrix product made for many rows packs the weights first, which is as long again as reading them. Here OUTPUTS rows of the
// weights meet all rows of x while they are in the first caches, and the blocks of rows share the work of fetching the next
// OUTPUTS meanwhile: memory is never idle, up to as many rows as there is time for. A row's result does not depend on the
// others.
#pragma once

#include "convert.h"
#include "workers.h"

namespace svdecode {
namespace SVDECODE_TARGET {

constexpr int LANES = 8;
constexpr int BLOCK_ROWS = 4;  // BLOCK_ROWS x OUTPUTS sums, the weights and one row of x: the 16 registers of AVX2
constexpr int OUTPUTS = 3;
constexpr int TILE_OUTPUTS = 48;  // stored together: single results, a row apart, would push each other out of the cache
constexpr int TILE_ROWS = 64;     // of x, which stay in the second cache while a tile's weights pass
constexpr int64_t TASK_WEIGHTS = 65536;

typedef float Floats __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint32_t Words __attribute__((vector_size(LANES * 4)));
typedef uint16_t Halves __attribute__((vector_size(LANES * 2), aligned(2), may_alias));

SVDECODE_FUNCTION Floats lanes(const float* from) { return *reinterpret_cast<const Floats*>(from); }
SVDECODE_FUNCTION Floats lanes(const uint16_t* from) {
  return reinterpret_cast<Floats>(__builtin_convertvector(*reinterpret_cast<const Halves*>(from), Words) << 16);
}
SVDECODE_FUNCTION float number(float x) { return x; }
SVDECODE_FUNCTION float number(uint16_t x) { return from_bfloat16(x); }

SVDECODE_FUNCTION float sum_of(const Floats& x) { return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7])); }

// R rows of x times O rows of the weights; meanwhile the cache is asked for every `stride` bytes from `ahead`.
template <int R, int O, class Weight>
SVDECODE_FUNCTION void block(const float* x, const Weight* weight, int64_t inner, uintptr_t ahead, int64_t stride,
                             float* tile) {
  Floats sums[R][O] = {};
  int64_t k = 0;
#pragma GCC unroll 1  // unrolled by -funroll-loops, a sum leaves its register: 74 instead of 59 ms for 16 rows of SmolLM2
  for (; k + LANES <= inner; k += LANES, ahead += stride) {
    __builtin_prefetch(reinterpret_cast<const void*>(ahead), 0, 2);
    Floats w[O];
    for (int o = 0; o < O; ++o) w[o] = lanes(weight + o * inner + k);
    for (int r = 0; r < R; ++r) {
      const Floats row = lanes(x + r * inner + k);
      for (int o = 0; o < O; ++o) sums[r][o] += row * w[o];
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int o = 0; o < O; ++o) tile[r * TILE_OUTPUTS + o] = sum_of(sums[r][o]);
  }
  // A loop of its own: inside the one above it would keep the sums from being registers.
  for (; k < inner; ++k) {
    for (int r = 0; r < R; ++r) {
      for (int o = 0; o < O; ++o) tile[r * TILE_OUTPUTS + o] += x[r * inner + k] * number(weight[o * inner + k]);
    }
  }
}

// `next` are the weights that come after these, as large in bytes as `bytes`.
template <int O, class Weight>
SVDECODE_FUNCTION void all_rows(const float* x, int64_t rows, const Weight* weight, int64_t inner, const void* next,
                                int64_t bytes, float* tile) {
  const int64_t blocks = (rows + BLOCK_ROWS - 1) / BLOCK_ROWS, steps = inner / LANES;
  const int64_t share = bytes / blocks, stride = steps ? share / steps : 0;
  uintptr_t ahead = reinterpret_cast<uintptr_t>(next);
  for (; rows > 0; rows -= BLOCK_ROWS, ahead += share) {
    switch (rows) {
      case 1:
        block<1, O>(x, weight, inner, ahead, stride, tile);
        break;
      case 2:
        block<2, O>(x, weight, inner, ahead, stride, tile);
        break;
      case 3:
        block<3, O>(x, weight, inner, ahead, stride, tile);
        break;
      default:
        block<BLOCK_ROWS, O>(x, weight, inner, ahead, stride, tile);
    }
    x += BLOCK_ROWS * inner;
    tile += BLOCK_ROWS * TILE_OUTPUTS;
  }
}

template <int O>
SVDECODE_FUNCTION void all_rows(const float* x, int64_t rows, const float* weight, int64_t inner, float*, float* tile) {
  all_rows<O>(x, rows, weight, inner, weight + O * inner, O * inner * 4, tile);
}

// bfloat16 weights are converted once where several blocks of rows will meet them.
template <int O>
SVDECODE_FUNCTION void all_rows(const float* x, int64_t rows, const uint16_t* weight, int64_t inner, float* buffer,
                                float* tile) {
  const uint16_t* next = weight + O * inner;
  if (rows <= BLOCK_ROWS) return all_rows<O>(x, rows, weight, inner, next, O * inner * 2, tile);
#pragma omp simd
  for (int64_t i = 0; i < O * inner; ++i) buffer[i] = from_bfloat16(weight[i]);
  all_rows<O>(x, rows, static_cast<const float*>(buffer), inner, next, O * inner * 2, tile);
}

// The outputs from `begin`, of all rows; `buffer` holds OUTPUTS rows of the weights.
template <class Weight>
inline void one_tile(const LinearArguments& g, const float* x, int64_t begin, float* buffer) {
  const int count = static_cast<int>(g.outer - begin < TILE_OUTPUTS ? g.outer - begin : TILE_OUTPUTS);
  const Weight* weight = static_cast<const Weight*>(g.weight) + begin * g.inner;
  float tile[TILE_ROWS * TILE_OUTPUTS], bias[TILE_OUTPUTS] = {};
  for (int o = 0; g.bias && o < count; ++o) bias[o] = load_one(g.bias, g.dtype, begin + o);
  for (int64_t row = 0; row < g.rows; row += TILE_ROWS) {
    const int64_t rows = g.rows - row < TILE_ROWS ? g.rows - row : TILE_ROWS;
    int o = 0;
    for (; o + OUTPUTS <= count; o += OUTPUTS) {
      all_rows<OUTPUTS>(x + row * g.inner, rows, weight + o * g.inner, g.inner, buffer, tile + o);
    }
    for (; o < count; ++o) all_rows<1>(x + row * g.inner, rows, weight + o * g.inner, g.inner, buffer, tile + o);
    for (int64_t r = 0; r < rows; ++r) {
      float* values = tile + r * TILE_OUTPUTS;
      for (int i = 0; i < count; ++i) values[i] += bias[i];
      store(g.out, g.dtype, (row + r) * g.outer + begin, count, values);
    }
  }
}

template <class Weight>
inline void all_tiles(const LinearArguments& g, const float* x, const Workers& workers) {
  const int64_t tiles = (g.outer + TILE_OUTPUTS - 1) / TILE_OUTPUTS;
  workers.run(tiles, 1 + TASK_WEIGHTS / (TILE_OUTPUTS * g.inner + 1), [&](int64_t begin, int64_t end) {
    Scratch<float> buffer(sizeof(Weight) == sizeof(float) ? 0 : OUTPUTS * g.inner);
    for (int64_t tile = begin; tile < end; ++tile) one_tile<Weight>(g, x, tile * TILE_OUTPUTS, buffer.get());
  });
}

inline void few_rows_linear(const LinearArguments& g, ParallelFor parallel_for, int threads) {
  const Workers workers(parallel_for, threads);
  if (g.dtype == Dtype::float32) return all_tiles<float>(g, static_cast<const float*>(g.x), workers);
  Scratch<float> x(g.rows * g.inner);
  for (int64_t i = 0; i < g.rows * g.inner; ++i) x[i] = from_bfloat16(static_cast<const uint16_t*>(g.x)[i]);
  all_tiles<uint16_t>(g, x.get(), workers);
}

}  // namespace SVDECODE_TARGET
}  // namespace svdecode
