// torch.ops.svdecode_compiled: what svdecode/ops/compiled.py calls for the backends "cpu" and "cuda".
//
// Written against torch's stable ABI (2.11 and later), so that one binary serves CPU and CUDA builds of several torch versions.
// Arguments have been checked by svdecode/ops/validation.py. A result that is not asked for comes back as None.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>

#include "devices.h"
#include "tensors.h"

namespace svdecode {
namespace {

using MaybeTensor = std::optional<Tensor>;

float* floats(const MaybeTensor& result) { return result ? static_cast<float*>(result->data_ptr()) : nullptr; }

// The pointer to an argument, checked, or null.
template <class T>
const T* maybe_pointer(const MaybeTensor& tensor, const char* name, int64_t count, const Tensor& like) {
  return tensor ? pointer<const T>(*tensor, name, count, &like) : nullptr;
}

MaybeTensor maybe(bool wanted, const Tensor& like, std::initializer_list<int64_t> trailing = {}) {
  return wanted ? MaybeTensor(new_rows(like, ScalarType::Float, trailing)) : std::nullopt;
}

// Every argument of a call costs 0.3 us, so its numbers come as one float64 tensor, which svdecode/ops/compiled.py keeps for
// next time.
enum Number { ALPHA, PENALTY, EPS, KL_DIRECTION, MU, FLAGS, TEMPERATURE, TOP_K, TOP_P, NUMBERS };
enum Flags { OWN_STRENGTH = 1, RETURN_KL = 2, DENSE = 4, SAVE = 8, NEED_PRE = 16, NEED_FT = 32, VECTOR = 64 };

// The numbers up to `count`, those of sampling last.
const double* unpack(const Tensor& numbers, Settings& settings, int64_t count = TEMPERATURE) {
  const double* n = pointer<const double>(numbers, "numbers", count, nullptr);
  settings.log_alpha = n[ALPHA] > 0 ? static_cast<float>(std::log(n[ALPHA])) : -std::numeric_limits<float>::infinity();
  settings.penalty = static_cast<float>(n[PENALTY]);
  settings.eps = static_cast<float>(n[EPS]);
  settings.kl_direction = n[KL_DIRECTION] != 0;
  return n;
}

using Steered = std::tuple<MaybeTensor, Tensor, Tensor, MaybeTensor, MaybeTensor, MaybeTensor, MaybeTensor>;

// mu (rows) float32; without it the number, or with OWN_STRENGTH each row's mu_star. labels (rows) int64.
Steered fused_steer(Tensor pre, Tensor ft, Tensor numbers, MaybeTensor mu, MaybeTensor labels, MaybeTensor out) {
  SteerArguments g;
  const double* n = unpack(numbers, g.settings);
  const int flags = static_cast<int>(n[FLAGS]);
  const RowLayout layout(pre, ft, out);
  MaybeTensor logprobs = out;
  if ((flags & DENSE) && !out) logprobs = new_rows(ft, ScalarType::Float, {ft.size(-1)});
  Tensor strength = new_rows(ft, ScalarType::Float), count = new_rows(ft, ScalarType::Int);
  MaybeTensor kl = maybe(flags & RETURN_KL, ft), mu_star = maybe(labels.has_value(), ft);
  MaybeTensor moments = maybe(labels.has_value(), ft, {3}), saved = maybe(flags & SAVE, ft, {SAVED_FIELDS});

  g.rows = layout.rows();
  if (logprobs) g.out = out ? layout.third() : layout.contiguous(*logprobs);
  g.source = flags & OWN_STRENGTH ? Strength::own : mu ? Strength::per_row : Strength::number;
  g.mu = static_cast<float>(n[MU]);
  g.mu_rows = maybe_pointer<float>(mu, "mu", g.rows.count, ft);
  g.labels = maybe_pointer<int64_t>(labels, "labels", g.rows.count, ft);
  g.mu_out = static_cast<float*>(strength.data_ptr());
  g.count_out = static_cast<int32_t*>(count.data_ptr());
  g.kl_out = floats(kl);
  g.mu_star_out = floats(mu_star);
  g.moments_out = floats(moments);
  g.saved_out = floats(saved);
  if (g.rows.count > 0) device_of(ft).fused_steer(ft, g);
  if (out) layout.copy_back(*out);
  return {out ? std::nullopt : logprobs, strength, count, kl, mu_star, moments, saved};
}

std::tuple<Tensor, Tensor> steer_sample(Tensor pre, Tensor ft, Tensor numbers, Tensor uniform, MaybeTensor mu) {
  SampleArguments g;
  const double* n = unpack(numbers, g.settings, NUMBERS);
  const RowLayout layout(pre, ft);
  Tensor tokens = new_rows(ft, ScalarType::Long), logprobs = new_rows(ft, ScalarType::Float);
  g.rows = layout.rows();
  g.mu = static_cast<float>(n[MU]);
  g.mu_rows = maybe_pointer<float>(mu, "mu", g.rows.count, ft);
  g.temperature = static_cast<float>(n[TEMPERATURE]);
  g.uniform = pointer<const float>(uniform, "uniform", g.temperature > 0 ? g.rows.count : 0, &ft);
  g.top_k = static_cast<int64_t>(n[TOP_K]);
  g.top_p = static_cast<float>(n[TOP_P]);
  g.tokens_out = static_cast<int64_t*>(tokens.data_ptr());
  g.logprobs_out = static_cast<float*>(logprobs.data_ptr());
  if (g.rows.count > 0) device_of(ft).steer_sample(ft, g);
  return {tokens, logprobs};
}

// k comes in the place of TOP_K.
std::tuple<Tensor, Tensor> steer_topk(Tensor pre, Tensor ft, Tensor numbers, MaybeTensor mu) {
  TopkArguments g;
  const double* n = unpack(numbers, g.settings, TOP_P);
  g.k = static_cast<int64_t>(n[TOP_K]);
  const RowLayout layout(pre, ft);
  Tensor tokens = new_rows(ft, ScalarType::Long, {g.k}), logprobs = new_rows(ft, ScalarType::Float, {g.k});
  g.rows = layout.rows();
  g.mu = static_cast<float>(n[MU]);
  g.mu_rows = maybe_pointer<float>(mu, "mu", g.rows.count, ft);
  g.tokens_out = static_cast<int64_t*>(tokens.data_ptr());
  g.logprobs_out = static_cast<float*>(logprobs.data_ptr());
  if (g.rows.count > 0) device_of(ft).steer_topk(ft, g);
  return {tokens, logprobs};
}

std::tuple<Tensor, Tensor> steered_nll(Tensor pre, Tensor ft, Tensor labels, Tensor mu, Tensor numbers) {
  const RowLayout layout(pre, ft);
  NllArguments g;
  g.strengths = mu.size(0);
  Tensor nll = new_rows(ft, ScalarType::Float, {g.strengths}), saved = new_rows(ft, ScalarType::Float, {SAVED_FIELDS});
  g.rows = layout.rows();
  unpack(numbers, g.settings);
  g.mu = pointer<const float>(mu, "mu", g.strengths, &ft);
  g.labels = pointer<const int64_t>(labels, "labels", g.rows.count, &ft);
  g.nll_out = static_cast<float*>(nll.data_ptr());
  g.saved_out = static_cast<float*>(saved.data_ptr());
  if (g.rows.count > 0) device_of(ft).steered_nll(ft, g);
  return {nll, saved};
}

std::tuple<Tensor, Tensor> steering_vector(Tensor pre, Tensor ft, Tensor numbers) {
  const RowLayout layout(pre, ft);
  Tensor delta = new_rows(ft, ScalarType::Float, {ft.size(-1)}), saved = new_rows(ft, ScalarType::Float, {SAVED_FIELDS});
  VectorArguments g;
  g.rows = layout.rows();
  g.out = layout.contiguous(delta);
  unpack(numbers, g.settings);
  g.saved_out = static_cast<float*>(saved.data_ptr());
  if (g.rows.count > 0) device_of(ft).steering_vector(ft, g);
  return {delta, saved};
}

// The gradients of one operator, told apart by which incoming gradients there are: grad_dense (..., V) is that of the
// log-probs, or with VECTOR that of delta; grad_nll (rows, M) comes with the NLL, mu (M) and labels.
std::tuple<MaybeTensor, MaybeTensor, MaybeTensor> backward(Tensor pre, Tensor ft, Tensor saved, MaybeTensor grad_dense,
                                                           MaybeTensor grad_mu, MaybeTensor grad_kl, MaybeTensor grad_mu_star,
                                                           MaybeTensor grad_moments, MaybeTensor grad_nll, MaybeTensor mu,
                                                           MaybeTensor labels, MaybeTensor kl, MaybeTensor moments,
                                                           MaybeTensor nll, Tensor numbers) {
  BackwardArguments g;
  const int flags = static_cast<int>(unpack(numbers, g.settings)[FLAGS]);
  const bool vector = flags & VECTOR;
  const RowLayout layout(pre, ft, grad_dense);
  g.rows = layout.rows();
  const int64_t rows = g.rows.count;
  g.strengths = grad_nll && mu ? mu->size(0) : 0;
  g.saved = pointer<const float>(saved, "saved", SAVED_FIELDS * rows, &ft);
  if (grad_dense) (vector ? g.grad_delta : g.grad_logprobs) = layout.third();
  g.grad_mu = maybe_pointer<float>(grad_mu, "grad_mu", rows, ft);
  g.grad_kl = maybe_pointer<float>(grad_kl, "grad_kl", rows, ft);
  g.grad_mu_star = maybe_pointer<float>(grad_mu_star, "grad_mu_star", rows, ft);
  g.grad_moments = maybe_pointer<float>(grad_moments, "grad_moments", 3 * rows, ft);
  g.grad_nll = maybe_pointer<float>(grad_nll, "grad_nll", g.strengths * rows, ft);
  g.own_strength = flags & OWN_STRENGTH;
  g.mu = maybe_pointer<float>(mu, "mu", grad_nll ? g.strengths : rows, ft);
  g.labels = maybe_pointer<int64_t>(labels, "labels", rows, ft);
  g.kl = maybe_pointer<float>(kl, "kl", rows, ft);
  g.moments = maybe_pointer<float>(moments, "moments", 3 * rows, ft);
  g.nll = maybe_pointer<float>(nll, "nll", g.strengths * rows, ft);
  MaybeTensor pre_grad, ft_grad, mu_grad;
  if (flags & NEED_PRE) pre_grad = new_rows(pre, pre.scalar_type(), {pre.size(-1)});
  if (flags & NEED_FT) ft_grad = new_rows(ft, ft.scalar_type(), {ft.size(-1)});
  if (grad_nll) {
    mu_grad = new_rows(ft, ScalarType::Float, {g.strengths});
  } else if (!vector) {
    mu_grad = new_rows(ft, ScalarType::Float);
  }
  g.pre_grad_out = pre_grad ? pre_grad->data_ptr() : nullptr;
  g.ft_grad_out = ft_grad ? ft_grad->data_ptr() : nullptr;
  g.mu_grad_out = floats(mu_grad);
  if (g.rows.count > 0) device_of(ft).backward(ft, g);
  return {pre_grad, ft_grad, mu_grad};
}

// x (..., inner), weight (outer, inner), bias (outer): contiguous, on the CPU, float32 or bfloat16.
Tensor few_rows_linear(Tensor x, Tensor weight, MaybeTensor bias) {
  LinearArguments g;
  g.inner = weight.size(1);
  g.outer = weight.size(0);
  g.rows = x.numel() / (g.inner ? g.inner : 1);
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, "x must be float32 or bfloat16");
  STD_TORCH_CHECK(weight.scalar_type() == dtype && (!bias || bias->scalar_type() == dtype), "x and weight differ in dtype");
  STD_TORCH_CHECK(x.size(-1) == g.inner, "x has ", x.size(-1), " features and the weight ", g.inner);
  STD_TORCH_CHECK(same_device(x, weight) && (!bias || same_device(x, *bias)), "x and weight are on different devices");
  STD_TORCH_CHECK(!bias || bias->numel() == g.outer, "bias must have ", g.outer, " numbers");
  STD_TORCH_CHECK(x.is_contiguous() && weight.is_contiguous() && (!bias || bias->is_contiguous()), "not contiguous");
  Tensor out = new_rows(x, dtype, {g.outer});
  g.x = x.data_ptr();
  g.weight = weight.data_ptr();
  g.bias = bias ? bias->data_ptr() : nullptr;
  g.out = out.data_ptr();
  g.dtype = dtype == ScalarType::Float ? Dtype::float32 : Dtype::bfloat16;
  if (g.rows > 0 && g.outer > 0) device_of(x).few_rows_linear(x, g);
  return out;
}

// A digest of the sources that this binary was built from (setup.py).
std::string sources() { return SVDECODE_SOURCES; }

}  // namespace
}  // namespace svdecode

STABLE_TORCH_LIBRARY(SVDECODE_NAMESPACE, m) {
  m.def(
      "fused_steer(Tensor pre, Tensor ft, Tensor numbers, Tensor? mu=None, Tensor? labels=None, Tensor(a!)? out=None) -> "
      "(Tensor?, Tensor, Tensor, Tensor?, Tensor?, Tensor?, Tensor?)");
  m.def("steer_sample(Tensor pre, Tensor ft, Tensor numbers, Tensor uniform, Tensor? mu=None) -> (Tensor, Tensor)");
  m.def("steer_topk(Tensor pre, Tensor ft, Tensor numbers, Tensor? mu=None) -> (Tensor, Tensor)");
  m.def("steered_nll(Tensor pre, Tensor ft, Tensor labels, Tensor mu, Tensor numbers) -> (Tensor, Tensor)");
  m.def("steering_vector(Tensor pre, Tensor ft, Tensor numbers) -> (Tensor, Tensor)");
  m.def(
      "backward(Tensor pre, Tensor ft, Tensor saved, Tensor? grad_dense, Tensor? grad_mu, Tensor? grad_kl, "
      "Tensor? grad_mu_star, Tensor? grad_moments, Tensor? grad_nll, Tensor? mu, Tensor? labels, Tensor? kl, "
      "Tensor? moments, Tensor? nll, Tensor numbers) -> (Tensor?, Tensor?, Tensor?)");
  m.def("few_rows_linear(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor");
  m.def("instruction_set(str wanted) -> str");
  m.def("has_cuda() -> bool");
  m.def("sources() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(SVDECODE_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("fused_steer", TORCH_BOX(&svdecode::fused_steer));
  m.impl("steer_sample", TORCH_BOX(&svdecode::steer_sample));
  m.impl("steer_topk", TORCH_BOX(&svdecode::steer_topk));
  m.impl("steered_nll", TORCH_BOX(&svdecode::steered_nll));
  m.impl("steering_vector", TORCH_BOX(&svdecode::steering_vector));
  m.impl("backward", TORCH_BOX(&svdecode::backward));
  m.impl("few_rows_linear", TORCH_BOX(&svdecode::few_rows_linear));
  m.impl("instruction_set", TORCH_BOX(&svdecode::instruction_set));
  m.impl("has_cuda", TORCH_BOX(&svdecode::has_cuda));
  m.impl("sources", TORCH_BOX(&svdecode::sources));
}
