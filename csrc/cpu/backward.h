// Gradients of all operators on a CPU; the equations are in kernels/backward.py and svdecode/ops/reference_backward.py.
//
// A token's p, c, delta and zs come again from its logits and the row's saved numbers. h = dL/dzs, u = dL/ddelta and w = dL/dp
// of a tile are made first, by whichever operator is differentiated; what follows is the same for all.
#pragma once

#include "gradient_sums.h"
#include "tile.h"

namespace svdecode {
namespace SVDECODE_TARGET {

class BackwardRow {
 public:
  BackwardRow(const BackwardArguments& arguments, int64_t row) : g_(arguments), row_(row), pair_(arguments.rows, row) {
    const float* saved = g_.saved + SAVED_FIELDS * row;
    values_ = {saved[SAVED_MAXIMUM], saved[SAVED_TOTAL], saved[SAVED_PRE_TOP], saved[SAVED_CENTRE], saved[SAVED_TOTAL] > 0.0f};
    threshold_ = values_.max + g_.settings.log_alpha;
    normaliser_ = saved[SAVED_NORMALISER];
    mean_ = saved[SAVED_MEAN];
    if (g_.labels == nullptr) return;
    const int64_t label = g_.labels[row];
    label_in_range_ = pair_.holds(label);
    label_z_ = pair_.z(label);
    label_ = steering(label_z_, pair_.a(label), values_, g_.settings.kl_direction);
  }

  void run(const Workers& workers) {
    if (!values_.valid) return write_zeros();
    if (g_.grad_nll) {
      for (int64_t m = 0; m < g_.strengths; ++m) g_.mu_grad_out[g_.strengths * row_ + m] = strength_gradient(workers, m);
    } else if (!g_.grad_delta.data) {
      coefficients(workers);
    }
    if (!g_.pre_grad_out && !g_.ft_grad_out) return;
    const DeltaSums sums = delta_sums(workers);
    write_gradients(workers, -sums.grad_c, sums.pw);
  }

 private:
  struct Upstream {
    alignas(64) float h[TILE], u[TILE], w[TILE];
  };

  bool drop() const { return g_.settings.penalty == -INFINITE; }
  bool kl_direction() const { return g_.settings.kl_direction; }

  // The sum over all tiles, in their order, of what body(tile) returns of each.
  template <class Sums, class Body>
  Sums sum_tiles(const Workers& workers, const Body& body) {
    Scratch<Sums> pieces(pair_.tiles());
    workers.tiles(pair_.tiles(), pair_.tiles(), [&](int64_t begin, int64_t end) {
      Buffers buffers;
      for (int64_t t = begin; t < end; ++t) pieces[t] = body(pair_.load(t, buffers));
    });
    Sums all;
    for (int64_t t = 0; t < pair_.tiles(); ++t) add(all, pieces[t]);
    return all;
  }
  static void add(GradientSums& x, const GradientSums& y) {
    x.g += y.g, x.g_delta += y.g_delta, x.ps_delta += y.ps_delta, x.g_outside += y.g_outside, x.ps_outside += y.ps_outside;
  }
  static void add(DeltaSums& x, const DeltaSums& y) { x.grad_c += y.grad_c, x.pw += y.pw; }

  const float* incoming(const Logits& grad) const { return out_row(g_.rows, grad, row_); }

  GradientSums gradient_sums(const Tile& tile, const float* __restrict__ grad, float mu, float shift) {
    float sum = 0, g_delta = 0, ps_delta = 0, g_outside = 0, ps_outside = 0;
#pragma omp simd reduction(+ : sum, g_delta, ps_delta, g_outside, ps_outside)
    for (int i = 0; i < tile.count; ++i) {
      const Steering s = steering(tile.z[i], tile.a[i], values_, kl_direction());
      const bool keep = tile.z[i] >= threshold_;
      const float zs = steered(s.u, s.delta, keep, mu, shift);
      const float g = zs > -INFINITE ? grad[tile.begin + i] : 0.0f;
      const float ps = exponential(zs - normaliser_);
      sum += g;
      g_delta += keep ? g * s.delta : 0.0f;
      ps_delta += keep ? ps * s.delta : 0.0f;
      g_outside += keep ? 0.0f : g;
      ps_outside += keep ? 0.0f : ps;
    }
    return {sum, g_delta, ps_delta, g_outside, ps_outside};
  }

  void coefficients(const Workers& workers) {
    float grad_mu = g_.grad_mu ? g_.grad_mu[row_] : 0.0f;
    if (const float* grad = incoming(g_.grad_logprobs)) {
      const float mu = g_.mu[row_], shift = shift_outside(mu, g_.settings.penalty);
      const GradientSums s =
          sum_tiles<GradientSums>(workers, [&](const Tile& tile) { return gradient_sums(tile, grad, mu, shift); });
      coefficients_.g = s.g;
      grad_mu += s.g_delta - s.g * s.ps_delta;
      if (!drop()) grad_mu += sign(mu) * g_.settings.penalty * (s.g_outside - s.g * s.ps_outside);
    }
    if (g_.labels && label_in_range_) {
      const float n = g_.moments[3 * row_], d = g_.moments[3 * row_ + 1] + g_.settings.eps;
      float grad_star = g_.grad_mu_star ? g_.grad_mu_star[row_] : 0.0f;
      if (g_.own_strength) grad_star += grad_mu;
      coefficients_.n = grad_star / d;
      coefficients_.d = -grad_star * n / (d * d);
      if (g_.grad_moments) {
        coefficients_.n += g_.grad_moments[3 * row_];
        coefficients_.d += g_.grad_moments[3 * row_ + 1];
        coefficients_.h += g_.grad_moments[3 * row_ + 2];
      }
    }
    if (g_.grad_kl && g_.kl[row_] < INFINITE) coefficients_.kl = g_.grad_kl[row_];
    g_.mu_grad_out[row_] = g_.own_strength ? 0.0f : grad_mu;
  }

  // (normaliser of zs at a strength, whether the label is reachable): lse(zs) = NLL + zs of the label; an NLL of +inf is a
  // constant.
  float nll_normaliser(int64_t m, float mu, float shift, bool& reachable) const {
    const float label_zs = steered(label_.u, label_.delta, label_z_ >= threshold_, mu, shift);
    reachable = label_in_range_ && label_zs > -INFINITE;
    return reachable ? g_.nll[g_.strengths * row_ + m] + label_zs : 0.0f;
  }

  float strength_gradient(const Workers& workers, int64_t m) {
    const float mu = g_.mu[m], shift = shift_outside(mu, g_.settings.penalty);
    bool reachable;
    const float normaliser = nll_normaliser(m, mu, shift, reachable);
    if (!reachable) return 0.0f;
    const GradientSums s = sum_tiles<GradientSums>(workers, [&](const Tile& tile) {
      float ps_delta = 0, kept_mass = 0;
#pragma omp simd reduction(+ : ps_delta, kept_mass)
      for (int i = 0; i < tile.count; ++i) {
        const Steering s = steering(tile.z[i], tile.a[i], values_, kl_direction());
        const float kept = tile.z[i] >= threshold_ ? exponential((s.u + mu * s.delta) - normaliser) : 0.0f;
        ps_delta += kept * s.delta;
        kept_mass += kept;
      }
      return GradientSums{kept_mass, 0, ps_delta, 0, 0};
    });
    const bool label_kept = label_z_ >= threshold_;
    float slope = s.ps_delta - (label_kept ? label_.delta : 0.0f);
    if (!drop()) slope += sign(mu) * g_.settings.penalty * (1.0f - s.g - (label_kept ? 0.0f : 1.0f));
    return g_.grad_nll[g_.strengths * row_ + m] * slope;
  }

  // h, u and w of a tile.
  void upstream(const Tile& tile, Upstream& up) {
    float* __restrict__ h = up.h, * __restrict__ u = up.u, * __restrict__ w = up.w;
    const float* __restrict__ z = tile.z;
    const float* __restrict__ a = tile.a;
    // Copies: what is written in a loop might be a member of this, as far as the compiler knows.
    const Row row = values_;
    const float threshold = threshold_, normaliser = normaliser_;
    const bool kl = kl_direction();
    const int count = tile.count;
    fill(h, tile.count, 0.0f);
    fill(w, tile.count, 0.0f);
    if (const float* grad = incoming(g_.grad_delta)) {
      memcpy(u, grad + tile.begin, tile.count * sizeof(float));
      return;
    }
    fill(u, tile.count, 0.0f);
    if (g_.grad_nll) {
      for (int64_t m = 0; m < g_.strengths; ++m) add_nll(tile, m, h, u);
      return;
    }
    if (const float* grad = incoming(g_.grad_logprobs)) {
      const float mu = g_.mu[row_], shift = shift_outside(mu, g_.settings.penalty), g = coefficients_.g;
      const float* __restrict__ dense = grad + tile.begin;
#pragma omp simd
      for (int i = 0; i < count; ++i) {
        const Steering s = steering(z[i], a[i], row, kl);
        const float zs = steered(s.u, s.delta, z[i] >= threshold, mu, shift);
        const float incoming = zs > -INFINITE ? dense[i] : 0.0f;
        h[i] = incoming - exponential(zs - normaliser) * g;
        u[i] = mu * h[i];
      }
    }
    if (g_.labels == nullptr) return;
    const float n = coefficients_.n, d = coefficients_.d, h2 = coefficients_.h, mean = mean_;
#pragma omp simd
    for (int i = 0; i < count; ++i) {
      const Steering s = steering(z[i], a[i], row, kl);
      u[i] += -n * s.p + 2.0f * d * s.delta + 2.0f * h2 * s.p * (s.delta - mean);
      w[i] += -n * s.delta + h2 * s.delta * (s.delta - 2.0f * mean);
    }
    const int64_t label = g_.labels[row_] - tile.begin;
    if (label >= 0 && label < tile.count) u[label] += n;
  }

  void add_nll(const Tile& tile, int64_t m, float* __restrict__ h, float* __restrict__ u) {
    const float mu = g_.mu[m], shift = shift_outside(mu, g_.settings.penalty);
    bool reachable;
    const float normaliser = nll_normaliser(m, mu, shift, reachable);
    if (!reachable) return;
    const float grad = g_.grad_nll[g_.strengths * row_ + m], threshold = threshold_;
    const float* __restrict__ z = tile.z;
    const float* __restrict__ a = tile.a;
    const Row row = values_;
    const bool kl = kl_direction();
    const int count = tile.count;
#pragma omp simd
    for (int i = 0; i < count; ++i) {
      const Steering s = steering(z[i], a[i], row, kl);
      const float zs = steered(s.u, s.delta, z[i] >= threshold, mu, shift);
      const float one = grad * exponential(zs - normaliser);
      h[i] += one;
      u[i] += mu * one;
    }
    const int64_t label = g_.labels[row_] - tile.begin;
    if (label < 0 || label >= count) return;
    h[label] -= grad;
    u[label] -= mu * grad;
  }

  // w + [u c] of a token, dL/dc being u p or u, as delta is p c or c; u and w count on K, and u only where delta is not a
  // constant 0. Values in, values out: a reference to a variable of a loop keeps it from being vectorised.
  static SVDECODE_FUNCTION float grad_p(float c, float u, float w, bool kl_direction) {
    return w + (kl_direction ? 1.0f : 0.0f) * u * c;
  }

  DeltaSums delta_sums(const Workers& workers) {
    return sum_tiles<DeltaSums>(workers, [&](const Tile& tile) {
      float max = -INFINITE;
#pragma omp simd reduction(max : max)
      for (int i = 0; i < tile.count; ++i) max = tile.z[i] > max ? tile.z[i] : max;
      if (!(max >= threshold_)) return DeltaSums();
      Upstream up;
      upstream(tile, up);
      const bool kl = kl_direction();
      float grad_c_sum = 0, pw = 0;
#pragma omp simd reduction(+ : grad_c_sum, pw)
      for (int i = 0; i < tile.count; ++i) {
        const Steering s = steering(tile.z[i], tile.a[i], values_, kl_direction());
        const bool has_both = (tile.a[i] > -INFINITE) & (tile.z[i] > -INFINITE), keep = tile.z[i] >= threshold_;
        const float u = keep & has_both ? up.u[i] : 0.0f, w = keep ? up.w[i] : 0.0f;
        grad_c_sum += delta_of(s.p, u, kl);
        pw += s.p * grad_p(s.c, u, w, kl);
      }
      return DeltaSums{grad_c_sum, pw};
    });
  }

  void write_gradients(const Workers& workers, float s_sum, float pq) {
    const float grad_kl = coefficients_.kl;
    const bool kl = kl_direction();
    // lse(a) - pre_top, from the KL
    const float log_pre_total = g_.grad_kl ? g_.kl[row_] - values_.centre + logarithm(values_.total) : 0.0f;
    workers.tiles(pair_.tiles(), pair_.tiles(), [&](int64_t begin, int64_t end) {
      Buffers buffers;
      Upstream up;
      alignas(64) float grad_z[TILE], grad_a[TILE];
      const Row row = values_;
      const float threshold = threshold_;
      for (int64_t t = begin; t < end; ++t) {
        const Tile tile = pair_.load(t, buffers);
        upstream(tile, up);
#pragma omp simd
        for (int i = 0; i < tile.count; ++i) {
          const float z = tile.z[i], a = tile.a[i];
          const Steering s = steering(z, a, row, kl);
          const bool has_both = (a > -INFINITE) & (z > -INFINITE), keep = z >= threshold;
          const float u = keep & has_both ? up.u[i] : 0.0f, w = keep ? up.w[i] : 0.0f;
          const float grad_d = delta_of(s.p, u, kl) + (has_both ? s_sum : 0.0f) * s.p;
          const float d = difference_from_top(s.u, a, row.max, row.pre_top) - row.centre;
          const float pre_p = exponential(smaller(a - row.pre_top - log_pre_total, 0.0f));
          grad_z[i] = up.h[i] + grad_d + s.p * (grad_p(s.c, u, w, kl) + s_sum * d - pq) + grad_kl * s.p * s.c;
          grad_a[i] = grad_kl * (pre_p - s.p) - grad_d;
        }
        if (g_.ft_grad_out) store(grad_row(g_.ft_grad_out, g_.rows.ft), g_.rows.ft.dtype, tile.begin, tile.count, grad_z);
        if (g_.pre_grad_out) store(grad_row(g_.pre_grad_out, g_.rows.pre), g_.rows.pre.dtype, tile.begin, tile.count, grad_a);
      }
    });
  }

  void* grad_row(void* grad, const Logits& like) const {
    return static_cast<char*>(grad) + row_ * g_.rows.vocabulary * element_size(like.dtype);
  }

  void write_zeros() {
    const int64_t vocabulary = g_.rows.vocabulary;
    if (g_.ft_grad_out) memset(grad_row(g_.ft_grad_out, g_.rows.ft), 0, vocabulary * element_size(g_.rows.ft.dtype));
    if (g_.pre_grad_out) memset(grad_row(g_.pre_grad_out, g_.rows.pre), 0, vocabulary * element_size(g_.rows.pre.dtype));
    const int64_t count = g_.grad_nll ? g_.strengths : 1;
    if (g_.mu_grad_out) fill(g_.mu_grad_out + count * row_, count, 0.0f);
  }

  const BackwardArguments& g_;
  const int64_t row_;
  const RowPair pair_;
  Row values_;
  Coefficients coefficients_;
  Steering label_ = {};
  float threshold_ = 0, normaliser_ = 0, mean_ = 0, label_z_ = -INFINITE;
  bool label_in_range_ = false;
};

inline void backward(const BackwardArguments& arguments, ParallelFor parallel_for, int threads) {
  Workers(parallel_for, threads).rows(arguments.rows, [&](int64_t row, const Workers& inside) {
    BackwardRow(arguments, row).run(inside);
  });
}

}  // namespace SVDECODE_TARGET
}  // namespace svdecode
