// exp and log of the row algebra, for the device and for loops that the host compiler vectorises.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef __CUDACC__
#define SVDECODE_FUNCTION __host__ __device__ __forceinline__
#else
#define SVDECODE_FUNCTION inline __attribute__((always_inline))
#endif

// Each translation unit names its target (cuda, avx512, avx2, base): code compiled for one must never be linked in for another.
#ifndef SVDECODE_TARGET
#define SVDECODE_TARGET base
#endif

namespace svdecode {
namespace SVDECODE_TARGET {

constexpr float INFINITE = __builtin_inff();
constexpr float NOT_A_NUMBER = __builtin_nanf("");
constexpr float LOG2_E = 1.44269504088896340736f;
constexpr float LN_2 = 0.69314718055994530942f;
constexpr float LEAST = -126.0f * LN_2;  // below this e^x is taken for 0: it is no normal number

#ifdef __CUDA_ARCH__

// e^x, 0 where that is no normal number: exp2f spends five more instructions on those.
SVDECODE_FUNCTION float exponential(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x * LOG2_E));
  return power;
}
SVDECODE_FUNCTION float logarithm(float x) { return log2f(x) * LN_2; }

#else

SVDECODE_FUNCTION float from_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

SVDECODE_FUNCTION uint32_t to_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

// e^x for LEAST <= x <= 88, NaN for NaN; relative error 1e-7 for |x| < 1, and the rounding of x * log2(e) beyond.
//
// No branch and no call, so that a loop over it vectorises: adding 1.5 * 2^23 + 127 rounds to the nearest integer and leaves
// it, biased, in the low bits, from where a shift by 23 makes it an exponent. The polynomial is the minimax fit of 2^f on
// [-1/2, 1/2] with value 1 at 0. A loop over it waits for results more than for arithmetic units, hence the products that do
// not depend on one another (Estrin's scheme) and x * log2(e) written twice, for the compiler to fuse with the sums.
SVDECODE_FUNCTION float normal_exponential(float x) {
  constexpr float ROUND = 12582912.0f + 127.0f;
  const float shifted = x * LOG2_E + ROUND;
  const float f = x * LOG2_E - (shifted - ROUND);
  const float scale = from_bits(to_bits(shifted) << 23);
  const float f2 = f * f;
  const float low = 6.931469775985023e-1f * f + 1.0f;
  const float middle = 5.550733743741454e-2f * f + 2.4022242084293718e-1f;
  const float high = 1.326472726232767e-3f * f + 9.671512710405675e-3f;
  return ((high * f2 + middle) * f2 + low) * scale;
}

// e^x for any x <= 88.
SVDECODE_FUNCTION float exponential(float x) { return x < LEAST ? 0.0f : normal_exponential(x); }

SVDECODE_FUNCTION float logarithm(float x) { return logf(x); }

#endif

}  // namespace SVDECODE_TARGET
}  // namespace svdecode
