// y = x W^T + b for a few rows x, as a decoding step has them: the weights are read once, and that is what it costs.
//
// A matrix product made for many rows packs the weights first, which is as long again as reading them. Here each weight meets all
// rows while it is in a register or in the first cache. A row's result does not depend on the other rows.
#pragma once

#include "convert.h"
#include "workers.h"

namespace svdecode {
namespace SVDECODE_TARGET {

constexpr int LANES = 8;
constexpr int WEIGHT_ROWS = 4;  // outputs that are computed together
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

// ROWS rows of x times OUTPUTS rows of the weights.
template <int ROWS, int OUTPUTS, class Weight>
SVDECODE_FUNCTION void products(const float* x, const Weight* weight, int64_t inner, float (&sums)[ROWS][OUTPUTS]) {
  Floats partial[ROWS][OUTPUTS] = {};
  int64_t k = 0;
  for (; k + LANES <= inner; k += LANES) {
    Floats rows[ROWS];
    for (int r = 0; r < ROWS; ++r) rows[r] = lanes(x + r * inner + k);
    for (int o = 0; o < OUTPUTS; ++o) {
      const Floats w = lanes(weight + o * inner + k);
      for (int r = 0; r < ROWS; ++r) partial[r][o] += rows[r] * w;
    }
  }
  for (int r = 0; r < ROWS; ++r) {
    for (int o = 0; o < OUTPUTS; ++o) {
      float sum = 0;
      for (int i = 0; i < LANES; ++i) sum += partial[r][o][i];
      for (int64_t rest = k; rest < inner; ++rest) sum += x[r * inner + rest] * number(weight[o * inner + rest]);
      sums[r][o] = sum;
    }
  }
}

template <int ROWS, int OUTPUTS, class Weight>
SVDECODE_FUNCTION void block(const LinearArguments& g, const float* x, int64_t row, int64_t output) {
  float sums[ROWS][OUTPUTS];
  products<ROWS, OUTPUTS>(x + row * g.inner, static_cast<const Weight*>(g.weight) + output * g.inner, g.inner, sums);
  for (int r = 0; r < ROWS; ++r) {
    for (int o = 0; o < OUTPUTS; ++o) {
      if (g.bias) sums[r][o] += load_one(g.bias, g.dtype, output + o);
    }
    store(g.out, g.dtype, (row + r) * g.outer + output, OUTPUTS, sums[r]);
  }
}

template <int OUTPUTS, class Weight>
SVDECODE_FUNCTION void all_rows(const LinearArguments& g, const float* x, int64_t output) {
  int64_t row = 0;
  for (; row + 2 <= g.rows; row += 2) block<2, OUTPUTS, Weight>(g, x, row, output);
  if (row < g.rows) block<1, OUTPUTS, Weight>(g, x, row, output);
}

template <class Weight>
inline void outputs(const LinearArguments& g, const float* x, const Workers& workers) {
  const int64_t groups = g.outer / WEIGHT_ROWS;
  workers.run(groups, 1 + TASK_WEIGHTS / (WEIGHT_ROWS * g.inner + 1), [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) all_rows<WEIGHT_ROWS, Weight>(g, x, group * WEIGHT_ROWS);
  });
  for (int64_t output = groups * WEIGHT_ROWS; output < g.outer; ++output) all_rows<1, Weight>(g, x, output);
}

inline void few_rows_linear(const LinearArguments& g, ParallelFor parallel_for, int threads) {
  const Workers workers(parallel_for, threads);
  if (g.dtype == Dtype::float32) return outputs<float>(g, static_cast<const float*>(g.x), workers);
  Scratch<float> x(g.rows * g.inner);
  for (int64_t i = 0; i < g.rows * g.inner; ++i) x[i] = from_bfloat16(static_cast<const uint16_t*>(g.x)[i]);
  outputs<uint16_t>(g, x.get(), workers);
}

}  // namespace SVDECODE_TARGET
}  // namespace svdecode
