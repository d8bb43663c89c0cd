// The arithmetic of one vocabulary row, shared by the CPU operators, the CUDA kernels and their emulation; the names are those
// of kernels/row_algebra.py and kernels/kept_sums.py, and what is said there about accuracy and infinities holds here.
#pragma once

#include "maths.h"

namespace svdecode {
namespace SVDECODE_TARGET {

SVDECODE_FUNCTION float larger(float x, float y) { return x > y ? x : y; }  // y where x is NaN
SVDECODE_FUNCTION float smaller(float x, float y) { return x < y ? x : y; }
SVDECODE_FUNCTION float finite_or_zero(float x) { return x == -INFINITE ? 0.0f : x; }
SVDECODE_FUNCTION bool is_finite(float x) { return x - x == 0.0f; }

// Statistics of a piece of a row; the top token is the first of those with the largest z.
struct Statistics {
  float max = -INFINITE;      // max z
  float total = 0.0f;         // sum e^(z - max)
  float pre_top = 0.0f;       // a of the top token
  float weighted = 0.0f;      // sum e^(z - max) (d - d_top)
  float pre_max = -INFINITE;  // max a, or another finite a that serves as well
  float pre_total = 0.0f;     // sum e^(a - pre_max), only where the KL is asked for
  float lost = 0.0f;          // 1 where a token has a = -inf < z: the KL is infinite
};

// a of the top token; where the pre-trained model excludes it, what makes its d 0.
SVDECODE_FUNCTION float top_base(const Statistics& s) { return s.pre_top == -INFINITE ? finite_or_zero(s.max) : s.pre_top; }

// d - d_top of a token with u = z - max; d is 0 for tokens that the pre-trained model excludes. Where e^u is 0 any finite
// number serves, but NaN or +inf in a still shows.
SVDECODE_FUNCTION float difference_from_top(float u, float a, float maximum, float pre_top) {
  const float d = (u < LEAST ? 0.0f : u) - (a - pre_top);
  return a == -INFINITE ? pre_top - maximum : d;
}

// e^(maximum - common), 0 for an empty piece.
SVDECODE_FUNCTION float scale_to(float maximum, float common) {
  return maximum == -INFINITE ? 0.0f : exponential(maximum - finite_or_zero(common));
}

// The running (max, total) of a normaliser after another piece.
SVDECODE_FUNCTION void add_totals(float& max, float& total, float other_max, float other_total) {
  const float common = larger(max, other_max);
  total = total * scale_to(max, common) + other_total * scale_to(other_max, common);
  max = common;
}

// Add a piece's sums to those of the row, whose max, pre_top and pre_max are known.
SVDECODE_FUNCTION void add_piece(Statistics& row, const Statistics& piece) {
  const float scale = scale_to(piece.max, row.max);
  const float offset = finite_or_zero(piece.max - finite_or_zero(row.max)) - (top_base(piece) - top_base(row));
  row.total += piece.total * scale;
  row.weighted += (piece.weighted + piece.total * offset) * scale;
}

SVDECODE_FUNCTION void add_pre_piece(Statistics& row, const Statistics& piece) {
  row.pre_total += piece.pre_total * scale_to(piece.pre_max, row.pre_max);
  row.lost = larger(piece.lost, row.lost);
}

// Statistics of a row from those of its pieces, in their order; the KL alone needs those of the pre-trained model.
SVDECODE_FUNCTION Statistics merge(const Statistics* pieces, int64_t count, bool with_kl) {
  Statistics row;
  for (int64_t i = 0; i < count; ++i) {
    if (i == 0 || pieces[i].max > row.max) {
      row.max = pieces[i].max;
      row.pre_top = pieces[i].pre_top;
    }
    row.pre_max = larger(pieces[i].pre_max, row.pre_max);
  }
  for (int64_t i = 0; i < count; ++i) add_piece(row, pieces[i]);
  for (int64_t i = 0; with_kl && i < count; ++i) add_pre_piece(row, pieces[i]);
  return row;
}

// What every formula needs of a whole row.
struct Row {
  float max;                  // max z
  float total;                // sum e^(z - max)
  float pre_top;              // a of the top token, or what makes its d 0
  float centre;               // <p, d> - d_top
  bool valid;                 // no NaN, no +inf, and a finite entry in both models
  bool top_excluded = false;  // the pre-trained model excludes the top token, whose delta is then 0
};

SVDECODE_FUNCTION Row finalise(const Statistics& s) {
  Row row;
  row.max = s.max;
  row.total = s.total;
  row.pre_top = top_base(s);
  row.top_excluded = s.pre_top == -INFINITE;
  row.centre = s.weighted / s.total;
  row.valid = s.total > 0.0f && s.total < INFINITE && is_finite(row.centre) && s.pre_max > -INFINITE;
  return row;
}

// KL = <p, d> - lse(z) + lse(a) of a valid row, never negative.
SVDECODE_FUNCTION float row_kl(const Statistics& s, const Row& row) {
  const float kl = row.centre + (s.pre_max - row.pre_top) + logarithm(s.pre_total) - logarithm(row.total);
  return s.lost > 0.0f ? INFINITE : larger(kl, 0.0f);
}

// u = z - max, p = e^u / total, c = (d - d_top) - centre, 0 for tokens that either model excludes; delta = p c or c.
struct Steering {
  float u, p, c, delta;
};

// p c, or c. On a host with factors that do not change in a loop: a choice would keep it from being vectorised. On a device,
// which would hold the factors in registers, by choice.
SVDECODE_FUNCTION float delta_of(float p, float c, bool kl_direction) {
#ifdef __CUDA_ARCH__
  return kl_direction ? p * c : c;
#else
  const float kl = kl_direction ? 1.0f : 0.0f;
  return (p * kl + (1.0f - kl)) * c;
#endif
}

SVDECODE_FUNCTION Steering steering(float z, float a, const Row& row, bool kl_direction) {
  Steering s;
  s.u = z - row.max;
  s.p = exponential(s.u) / row.total;
  const float c = s.u - (a - row.pre_top) - row.centre;
  s.c = (z == -INFINITE) | (a == -INFINITE) ? 0.0f : c;
  s.delta = delta_of(s.p, s.c, kl_direction);
  return s;
}

// delta of the top token, where p = 1 / total and c = -centre, in the operations of `steering`: its delta - r is then 0.
SVDECODE_FUNCTION float top_delta(const Row& row, bool kl_direction) {
  return delta_of(1.0f / row.total, row.top_excluded ? 0.0f : -row.centre, kl_direction);
}

// |mu| * penalty, and -inf where the penalty is -inf, whatever mu is.
SVDECODE_FUNCTION float shift_outside(float mu, float penalty) {
  return penalty == -INFINITE ? mu * 0.0f - INFINITE : fabsf(mu) * penalty;
}

// zs relative to the row's maximum: u + mu delta on K, u + shift elsewhere.
SVDECODE_FUNCTION float steered(float u, float delta, bool keep, float mu, float shift) {
  return keep ? u + mu * delta : u + shift;
}

// Sums over the kept tokens of a piece, with x = delta - r and r the top token's delta (see kernels/kept_sums.py).
struct KeptSums {
  float count = 0.0f;             // tokens in K
  float outside = 0.0f;           // mass outside K
  float mean = 0.0f;              // sum p x
  float squares = 0.0f;           // sum delta^2
  float weighted_squares = 0.0f;  // sum p x^2
  float steered_max = -INFINITE;  // (max, total) of the steered normaliser, relative to the row's maximum
  float steered_total = 0.0f;
};

SVDECODE_FUNCTION void add(KeptSums& sums, const KeptSums& other) {
  sums.count += other.count;
  sums.outside += other.outside;
  sums.mean += other.mean;
  sums.squares += other.squares;
  sums.weighted_squares += other.weighted_squares;
  add_totals(sums.steered_max, sums.steered_total, other.steered_max, other.steered_total);
}

// N, D, H of the method's section 2, and sum_K p delta.
struct Moments {
  float n, d, h, mean;
};

// The label's own logits are z and a; `outside` is what labels that are not in the vocabulary give: 0 if ignored, else NaN.
SVDECODE_FUNCTION Moments label_moments(const KeptSums& sums, const Row& row, float z, float a, float threshold, bool in_range,
                                        float outside, bool kl_direction) {
  const float r = top_delta(row, kl_direction), q = sums.outside;
  const float delta = steering(z, a, row, kl_direction).delta;
  const float variance = sums.weighted_squares - sums.mean * sums.mean + 2.0f * r * sums.mean * q + r * r * q * (1.0f - q);
  Moments m;
  m.n = in_range ? (z >= threshold ? delta : 0.0f) - r - sums.mean + r * q : outside;
  m.d = in_range ? sums.squares : outside;
  m.h = in_range ? larger(variance, 0.0f) : outside;
  m.mean = sums.mean + r * (1.0f - q);
  return m;
}

// mu* = N / (D + eps), 0 for an ignored label whatever eps is.
SVDECODE_FUNCTION float optimal_mu(const Moments& m, bool ignored, float eps) { return ignored ? 0.0f : m.n / (m.d + eps); }

}  // namespace SVDECODE_TARGET
}  // namespace svdecode
