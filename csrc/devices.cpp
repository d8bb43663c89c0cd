#include "devices.h"

#include <stdexcept>

namespace svdecode {

namespace base {
extern const CpuOperators OPERATORS;
}
#if defined(__x86_64__)
namespace avx2 {
extern const CpuOperators OPERATORS;
}
namespace avx512 {
extern const CpuOperators OPERATORS;
}
#endif

namespace {

const CpuOperators* best_operators() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return &avx512::OPERATORS;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return &avx2::OPERATORS;
#endif
  return &base::OPERATORS;
}

const CpuOperators*& operators() {
  static const CpuOperators* chosen = best_operators();
  return chosen;
}

void parallel_for(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
  STABLE_TORCH_ERROR_CODE_CHECK(torch_parallel_for(begin, end, grain, body, context));
}

class Cpu : public Device {
 public:
  void fused_steer(const SteerArguments& g) const override { operators()->fused_steer(g, parallel_for, threads()); }
  void steer_sample(const SampleArguments& g) const override { operators()->steer_sample(g, parallel_for, threads()); }
  void steered_nll(const NllArguments& g) const override { operators()->steered_nll(g, parallel_for, threads()); }
  void steering_vector(const VectorArguments& g) const override { operators()->steering_vector(g, parallel_for, threads()); }
  void backward(const BackwardArguments& g) const override { operators()->backward(g, parallel_for, threads()); }

 private:
  static int threads() { return static_cast<int>(torch::stable::get_num_threads()); }
};

}  // namespace

const Device& device_of(const torch::stable::Tensor& tensor) {
  static const Cpu cpu;
  if (tensor.is_cpu()) return cpu;
  throw std::runtime_error("svdecode was built without CUDA kernels");
}

std::string instruction_set(std::string wanted) {
  if (wanted.empty()) return operators()->name;
  const CpuOperators* best = best_operators();
  const CpuOperators* known[] = {
      &base::OPERATORS,
#if defined(__x86_64__)
      &avx2::OPERATORS, &avx512::OPERATORS,
#endif
  };
  for (const CpuOperators* one : known) {  // in the order of what they need
    if (wanted == one->name) {
      operators() = one;
      return one->name;
    }
    if (one == best) break;
  }
  throw std::runtime_error("this machine has no instruction set '" + wanted + "'; the best is " + best->name);
}

bool has_cuda() { return false; }

}  // namespace svdecode
