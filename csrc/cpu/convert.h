// bf16 and fp16 to fp32 and back, and filling: plain loops that the compiler vectorises.
#pragma once

#include <string.h>
#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

#include "../arguments.h"
#include "../maths.h"

namespace svdecode {
namespace SVDECODE_TARGET {

inline int element_size(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

SVDECODE_FUNCTION float from_bfloat16(uint16_t x) { return from_bits(static_cast<uint32_t>(x) << 16); }

SVDECODE_FUNCTION uint16_t to_bfloat16(float x) {
  const uint32_t bits = to_bits(x);
  const uint32_t rounded = bits + 0x7FFF + (bits >> 16 & 1);  // to nearest, ties to even
  return static_cast<uint16_t>((x != x ? 0x7FC00000u : rounded) >> 16);
}

// The exponent is moved by a multiplication, which is right for subnormal numbers too; infinities and NaN keep theirs.
SVDECODE_FUNCTION float from_float16(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x & 0x7FFF) << 13;
  const float magnitude = from_bits(bits) * 0x1p112f;
  const uint32_t special = (x & 0x7C00) == 0x7C00 ? 0x7F800000u : 0u;
  return from_bits(to_bits(magnitude) | special | static_cast<uint32_t>(x & 0x8000) << 16);
}

// To nearest, ties to even, as torch: adding a power of two with the wanted last bit lets the hardware round.
SVDECODE_FUNCTION uint16_t to_float16(float x) {
  const uint32_t sign = to_bits(x) >> 16 & 0x8000;
  const float magnitude = fabsf(x);
  const uint32_t bits = to_bits(magnitude);
  const uint32_t subnormal = to_bits(magnitude + 0.5f) - to_bits(0.5f);
  const uint32_t normal = (bits + 0xFFF + (bits >> 13 & 1) - (112u << 23)) >> 13;
  const uint32_t finite = magnitude < 0x1p-14f ? subnormal : normal;
  const uint32_t result = magnitude >= 65520.0f ? 0x7C00u : finite;
  return static_cast<uint16_t>((x != x ? 0x7E00u : result) | sign);
}

inline float load_one(const void* row, Dtype dtype, int64_t token) {
  if (dtype == Dtype::float32) return static_cast<const float*>(row)[token];
  const uint16_t half = static_cast<const uint16_t*>(row)[token];
  return dtype == Dtype::bfloat16 ? from_bfloat16(half) : from_float16(half);
}

// Tokens of a row as fp32: where they lie, or converted into the buffer.
inline const float* load(const void* row, Dtype dtype, int64_t begin, int count, float* __restrict__ buffer) {
  if (dtype == Dtype::float32) return static_cast<const float*>(row) + begin;
  const uint16_t* __restrict__ half = static_cast<const uint16_t*>(row) + begin;
  if (dtype == Dtype::bfloat16) {
#pragma omp simd
    for (int i = 0; i < count; ++i) buffer[i] = from_bfloat16(half[i]);
  } else {
#pragma omp simd
    for (int i = 0; i < count; ++i) buffer[i] = from_float16(half[i]);
  }
  return buffer;
}

inline void store(void* row, Dtype dtype, int64_t begin, int count, const float* __restrict__ values) {
  if (dtype == Dtype::float32) {
    memcpy(static_cast<float*>(row) + begin, values, count * sizeof(float));
    return;
  }
  uint16_t* __restrict__ half = static_cast<uint16_t*>(row) + begin;
  if (dtype == Dtype::bfloat16) {
#pragma omp simd
    for (int i = 0; i < count; ++i) half[i] = to_bfloat16(values[i]);
  } else {
#pragma omp simd
    for (int i = 0; i < count; ++i) half[i] = to_float16(values[i]);
  }
}

inline void fill(float* __restrict__ out, int64_t count, float value) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) out[i] = value;
}

// The same around the caches: a line that is written whole need not be read first, and what is in the caches stays there.
inline void stream(float* out, int64_t count, float value) {
#if defined(__SSE2__)
  int64_t i = 0;
  for (; i < count && reinterpret_cast<uintptr_t>(out + i) % 16 != 0; ++i) out[i] = value;
  const __m128 four = _mm_set1_ps(value);
  for (; i + 4 <= count; i += 4) _mm_stream_ps(out + i, four);
  for (; i < count; ++i) out[i] = value;
#else
  fill(out, count, value);
#endif
}

// Before other threads may read what `stream` wrote.
inline void finish_stream() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

}  // namespace SVDECODE_TARGET
}  // namespace svdecode
