// What the bindings hand to an implementation: raw pointers, sizes and numbers. No torch here or behind it.
#pragma once

#include <stdint.h>

namespace svdecode {

constexpr int LEVELS = 3;  // leading dimensions that are left when those that can be merged are
constexpr int64_t IGNORE_INDEX = -100;
constexpr int32_t NO_TOKEN = 0x7FFFFFFF;

enum class Dtype { float32, bfloat16, float16 };
enum class Strength { number, per_row, own };  // where a row's mu comes from; own: its mu_star

// Fields of `saved`: what the backward needs of a row again (kernels/fused_steer.py).
enum Saved { SAVED_MAXIMUM, SAVED_TOTAL, SAVED_PRE_TOP, SAVED_CENTRE, SAVED_NORMALISER, SAVED_MEAN, SAVED_FIELDS };

// The rows of one (..., V) tensor, last dimension contiguous; strides in elements.
struct Logits {
  void* data = nullptr;
  Dtype dtype = Dtype::float32;
  int64_t strides[LEVELS] = {};
};

struct Rows {
  int64_t count = 0;
  int32_t vocabulary = 0;
  int32_t levels = 1;  // in use, the last ones
  int64_t sizes[LEVELS] = {1, 1, 1};
  Logits pre, ft;
};

struct Settings {
  float log_alpha = 0, penalty = 0, eps = 0;
  bool kl_direction = true;
};

struct SteerArguments {
  Rows rows;
  Logits out;  // float32 log-probs; no data: not wanted
  Settings settings;
  Strength source = Strength::number;
  float mu = 0;
  const float* mu_rows = nullptr;
  const int64_t* labels = nullptr;  // may be null
  float* mu_out = nullptr;          // (rows); null where a caller wants the moments alone
  int32_t* count_out = nullptr;     // (rows), may be null
  float* kl_out = nullptr;          // (rows), may be null
  float* mu_star_out = nullptr;     // (rows), with labels
  float* moments_out = nullptr;     // (rows, 3), with labels
  float* saved_out = nullptr;       // (rows, SAVED_FIELDS), may be null
};

struct SampleArguments {
  Rows rows;
  Settings settings;
  float mu = 0;
  const float* mu_rows = nullptr;  // null: the number
  const float* uniform = nullptr;  // (rows)
  float temperature = 1;           // 0 is greedy
  int64_t top_k = 0;               // 0: all
  float top_p = 1;
  int64_t* tokens_out = nullptr;
  float* logprobs_out = nullptr;
};

struct TopkArguments {
  Rows rows;
  Settings settings;
  float mu = 0;
  const float* mu_rows = nullptr;  // null: the number
  int64_t k = 1;
  int64_t* tokens_out = nullptr;  // (rows, k)
  float* logprobs_out = nullptr;  // (rows, k)
};

struct NllArguments {
  Rows rows;
  Settings settings;
  const float* mu = nullptr;  // (strengths)
  int64_t strengths = 0;
  const int64_t* labels = nullptr;
  float* nll_out = nullptr;    // (rows, strengths)
  float* saved_out = nullptr;  // may be null
};

struct VectorArguments {
  Rows rows;
  Logits out;
  Settings settings;
  float* saved_out = nullptr;  // may be null
};

// Gradients of fused_steer and optimal_strength (grad_logprobs .. grad_moments), of steered_nll (grad_nll) or of
// steering_vector (grad_delta), whichever is not null.
struct BackwardArguments {
  Rows rows;
  Settings settings;
  const float* saved = nullptr;
  Logits grad_logprobs, grad_delta;
  const float *grad_mu = nullptr, *grad_kl = nullptr, *grad_mu_star = nullptr, *grad_moments = nullptr, *grad_nll = nullptr;
  bool own_strength = false;
  const float* mu = nullptr;  // (rows) for fused_steer, (strengths) for steered_nll
  int64_t strengths = 0;
  const int64_t* labels = nullptr;
  const float *kl = nullptr, *moments = nullptr, *nll = nullptr;
  void *pre_grad_out = nullptr, *ft_grad_out = nullptr;  // contiguous, in the dtypes of the logits; may be null
  float* mu_grad_out = nullptr;                          // (rows), or (rows, strengths) for steered_nll; may be null
};

// out (rows, outer) = x (rows, inner) weight (outer, inner)^T + bias (outer), all contiguous and of one dtype, not float16.
struct LinearArguments {
  const void *x = nullptr, *weight = nullptr, *bias = nullptr;  // bias may be null
  void* out = nullptr;
  Dtype dtype = Dtype::float32;
  int64_t rows = 0, inner = 0, outer = 0;
};

// torch's thread pool: calls body(begin, end, context) on ranges of at least `grain` that cover [begin, end).
using ParallelFor = void (*)(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context);

// One implementation for one instruction set of a CPU.
struct CpuOperators {
  const char* name;
  void (*fused_steer)(const SteerArguments&, ParallelFor, int threads);
  void (*steer_sample)(const SampleArguments&, ParallelFor, int threads);
  void (*steer_topk)(const TopkArguments&, ParallelFor, int threads);
  void (*steered_nll)(const NllArguments&, ParallelFor, int threads);
  void (*steering_vector)(const VectorArguments&, ParallelFor, int threads);
  void (*backward)(const BackwardArguments&, ParallelFor, int threads);
  void (*few_rows_linear)(const LinearArguments&, ParallelFor, int threads);
};

}  // namespace svdecode
