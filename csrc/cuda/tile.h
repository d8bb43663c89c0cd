// A warp's tile of both inputs: which lane holds which token, loading, converting, storing.
//
// Token `PER_LANE * lane + i` of a chunk is value i of that lane, whatever the address and dtype of the row: only the width of
// the loads follows them, and with it no sum and no order.
#pragma once

#include <type_traits>

#include "block.h"

namespace svdecode {
namespace cuda {

using Float = std::integral_constant<Dtype, Dtype::float32>;
using BFloat16 = std::integral_constant<Dtype, Dtype::bfloat16>;
using Half = std::integral_constant<Dtype, Dtype::float16>;

// Kernels are compiled for two inputs of one dtype, and once for all other pairs: what those are is then known when they run.
constexpr Dtype ANY = static_cast<Dtype>(3);

__host__ __device__ constexpr int size_of(Dtype dtype) { return dtype == Dtype::float32 || dtype == ANY ? 4 : 2; }

// PER_LANE values as they lie in memory, ANY as float32. They are converted when they are used, so that all loads are on their
// way before any value is waited for.
template <Dtype D>
struct Raw {
  static constexpr int WORDS = PER_LANE * size_of(D) / 4;
  uint32_t words[WORDS];

  __device__ float operator[](int i) const {
    if (size_of(D) == 4) return __uint_as_float(words[i % WORDS]);
    const uint32_t word = words[i / 2 % WORDS];
    if (D == Dtype::bfloat16) return __uint_as_float(i % 2 ? word & 0xFFFF0000u : word << 16);
    return __half2float(__ushort_as_half(static_cast<uint16_t>(i % 2 ? word >> 16 : word & 0xFFFF)));
  }
};

template <Dtype D>
__device__ inline float load_one(const char* row, int64_t token) {
  if (D == Dtype::float32) return reinterpret_cast<const float*>(row)[token];
  const uint16_t bits = reinterpret_cast<const uint16_t*>(row)[token];
  return D == Dtype::bfloat16 ? __bfloat162float(__ushort_as_bfloat16(bits)) : __half2float(__ushort_as_half(bits));
}

template <Dtype D>
__device__ inline Raw<D> load_wide(const char* row, int first) {
  Raw<D> raw;
  const uint4* from = reinterpret_cast<const uint4*>(row + int64_t{size_of(D)} * first);
#pragma unroll
  for (int i = 0; i < Raw<D>::WORDS / 4; ++i) {
    const uint4 four = __ldg(from + i);
    raw.words[4 * i] = four.x;
    raw.words[4 * i + 1] = four.y;
    raw.words[4 * i + 2] = four.z;
    raw.words[4 * i + 3] = four.w;
  }
  return raw;
}

// The same from any address, -inf outside the vocabulary.
template <Dtype D>
__device__ inline Raw<D> load_each(const char* row, int first, int vocabulary) {
  Raw<D> raw;
  if (D == Dtype::float32) {
    const uint32_t* from = reinterpret_cast<const uint32_t*>(row);
#pragma unroll
    for (int i = 0; i < Raw<D>::WORDS; ++i) raw.words[i] = first + i < vocabulary ? from[first + i] : 0xFF800000u;
    return raw;
  }
  const uint16_t* from = reinterpret_cast<const uint16_t*>(row);
  const uint32_t nothing = D == Dtype::bfloat16 ? 0xFF80u : 0xFC00u;
#pragma unroll
  for (int i = 0; i < PER_LANE; i += 2) {
    const uint32_t low = first + i < vocabulary ? from[first + i] : nothing;
    const uint32_t high = first + i + 1 < vocabulary ? from[first + i + 1] : nothing;
    raw.words[i / 2 % Raw<D>::WORDS] = low | high << 16;
  }
  return raw;
}

template <Dtype D>
__device__ inline Raw<ANY> converted(const Raw<D>& from) {
  Raw<ANY> raw;
#pragma unroll
  for (int i = 0; i < PER_LANE; ++i) raw.words[i] = __float_as_uint(from[i]);
  return raw;
}

// A row of an input of dtype D; `dtype` is looked at where D is ANY.
template <Dtype D>
struct RowOf {
  const char* data;
  Dtype dtype;

  __device__ float operator[](int64_t token) const {
    if (D != ANY) return load_one<D>(data, token);
    return dtype == Dtype::float32    ? load_one<Dtype::float32>(data, token)
           : dtype == Dtype::bfloat16 ? load_one<Dtype::bfloat16>(data, token)
                                      : load_one<Dtype::float16>(data, token);
  }
  __device__ Raw<D> load(int first, int vocabulary, bool wide) const {
    if constexpr (D != ANY) {
      return wide ? load_wide<D>(data, first) : load_each<D>(data, first, vocabulary);
    } else {
      const auto as = [&](auto known) {
        return converted(RowOf<decltype(known)::value>{data, dtype}.load(first, vocabulary, wide));
      };
      return dtype == Dtype::float32 ? as(Float()) : dtype == Dtype::bfloat16 ? as(BFloat16()) : as(Half());
    }
  }
};

template <Dtype D>
__device__ inline RowOf<D> row_of(const Rows& rows, const Logits& logits, int row) {
  const Dtype dtype = D == ANY ? logits.dtype : D;
  return {static_cast<const char*>(logits.data) + row_start(rows, logits.strides, row) * size_of(dtype), dtype};
}

// One row of both inputs.
template <Dtype D>
struct Inputs {
  RowOf<D> pre;
  RowOf<D> ft;
  int vocabulary;
  bool aligned;  // both rows begin at multiples of 16 bytes
};

template <Dtype D>
__device__ inline Inputs<D> row_inputs(const Rows& rows, int row) {
  const RowOf<D> pre = row_of<D>(rows, rows.pre, row);
  const RowOf<D> ft = row_of<D>(rows, rows.ft, row);
  const bool aligned = (reinterpret_cast<uintptr_t>(pre.data) | reinterpret_cast<uintptr_t>(ft.data)) % 16 == 0;
  return {pre, ft, rows.vocabulary, aligned};
}

__device__ inline int first_token(int tile, int chunk) { return tile * TILE + chunk * CHUNK + lane_index() * PER_LANE; }

__host__ __device__ inline int count_tiles(int vocabulary) { return (vocabulary + TILE - 1) / TILE; }
__host__ __device__ inline int count_splits(int vocabulary) { return (vocabulary + SPLIT - 1) / SPLIT; }

// COUNT chunks of a lane.
template <Dtype D, int COUNT>
struct Tokens {
  Raw<D> z[COUNT];
  Raw<D> a[COUNT];
};

template <int COUNT, Dtype D>
__device__ inline Tokens<D, COUNT> load(const Inputs<D>& in, int tile, int chunk) {
  Tokens<D, COUNT> tokens;
  const bool wide = in.aligned && tile * TILE + (chunk + COUNT) * CHUNK <= in.vocabulary;
  const auto load_all = [&](bool wide) {
#pragma unroll
    for (int c = 0; c < COUNT; ++c) tokens.z[c] = in.ft.load(first_token(tile, chunk + c), in.vocabulary, wide);
#pragma unroll
    for (int c = 0; c < COUNT; ++c) tokens.a[c] = in.pre.load(first_token(tile, chunk + c), in.vocabulary, wide);
  };
  wide ? load_all(true) : load_all(false);  // one branch for all of them
  return tokens;
}

__device__ inline bool is_aligned(const float* out) { return reinterpret_cast<uintptr_t>(out) % 16 == 0; }

// A chunk of results.
__device__ inline void store(float* row, int tile, int chunk, int vocabulary, const float (&values)[PER_LANE]) {
  const int first = first_token(tile, chunk);
  if (is_aligned(row) && tile * TILE + (chunk + 1) * CHUNK <= vocabulary) {
    float4* out = reinterpret_cast<float4*>(row + first);
    out[0] = make_float4(values[0], values[1], values[2], values[3]);
    out[1] = make_float4(values[4], values[5], values[6], values[7]);
    return;
  }
#pragma unroll
  for (int i = 0; i < PER_LANE; ++i) {
    if (first + i < vocabulary) row[first + i] = values[i];
  }
}

__device__ inline void fill(float* row, int tile, int vocabulary, float value) {
  const int lane = lane_index();
  if (is_aligned(row) && (tile + 1) * TILE <= vocabulary) {
    float4* out = reinterpret_cast<float4*>(row + tile * TILE) + lane;
#pragma unroll
    for (int i = 0; i < TILE / (4 * WARP); ++i) out[i * WARP] = make_float4(value, value, value, value);
    return;
  }
  for (int token = tile * TILE + lane; token < vocabulary && token < (tile + 1) * TILE; token += WARP) row[token] = value;
}

}  // namespace cuda
}  // namespace svdecode
