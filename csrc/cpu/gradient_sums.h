// What the gradients sum over a row: the twin of kernels/gradient_sums.py.
#pragma once

namespace svdecode {
namespace SVDECODE_TARGET {

constexpr float sign(float x) { return (x > 0.0f ? 1.0f : 0.0f) - (x < 0.0f ? 1.0f : 0.0f); }

// Sums of the incoming gradient g of the log-probs over a piece of a row.
struct GradientSums {
  float g = 0, g_delta = 0, ps_delta = 0, g_outside = 0, ps_outside = 0;
};

// What a row's tokens share: the sum of g, and dL/dN, dL/dD, dL/dH, dL/dKL.
struct Coefficients {
  float g = 0, n = 0, d = 0, h = 0, kl = 0;
};

// Sums over K of dL/dc and of p (w + [u c]).
struct DeltaSums {
  float grad_c = 0, pw = 0;
};

}  // namespace SVDECODE_TARGET
}  // namespace svdecode
