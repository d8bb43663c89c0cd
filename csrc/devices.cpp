#include "devices.h"

#include <dlfcn.h>

#include <stdexcept>

#include "tensors.h"
#ifdef SVDECODE_CUDA
#include "cuda/launch.h"
#endif

namespace svdecode {

#ifndef SVDECODE_EMULATION

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
  void fused_steer(const Tensor&, const SteerArguments& g) const override {
    operators()->fused_steer(g, parallel_for, threads());
  }
  void steer_sample(const Tensor&, const SampleArguments& g) const override {
    operators()->steer_sample(g, parallel_for, threads());
  }
  void steer_topk(const Tensor&, const TopkArguments& g) const override { operators()->steer_topk(g, parallel_for, threads()); }
  void steered_nll(const Tensor&, const NllArguments& g) const override {
    operators()->steered_nll(g, parallel_for, threads());
  }
  void steering_vector(const Tensor&, const VectorArguments& g) const override {
    operators()->steering_vector(g, parallel_for, threads());
  }
  void backward(const Tensor&, const BackwardArguments& g) const override { operators()->backward(g, parallel_for, threads()); }
  void few_rows_linear(const Tensor&, const LinearArguments& g) const override {
    operators()->few_rows_linear(g, parallel_for, threads());
  }

 private:
  static int threads() { return static_cast<int>(torch::stable::get_num_threads()); }
};

}  // namespace

#endif

namespace {

#ifdef SVDECODE_CUDA

// The stream that torch is on, found at run time: the same binary loads into a torch without CUDA.
void* current_stream(int32_t device) {
#ifdef SVDECODE_EMULATION
  (void)device;
  return nullptr;
#else
  using Current = AOTITorchError (*)(int32_t, void**);
  static const Current current =
      reinterpret_cast<Current>(svdecode_symbol_of("libtorch_cuda.so", "aoti_torch_get_current_cuda_stream"));
  if (current == nullptr) throw std::runtime_error("this torch has no CUDA");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(current(device, &stream));
  return stream;
#endif
}

class Cuda : public Device {
 public:
  void fused_steer(const Tensor& like, const SteerArguments& g) const override { run(cuda::fused_steer, like, g); }
  void steer_sample(const Tensor& like, const SampleArguments& g) const override { run(cuda::steer_sample, like, g); }
  void steer_topk(const Tensor& like, const TopkArguments& g) const override { run(cuda::steer_topk, like, g); }
  void steered_nll(const Tensor&, const NllArguments&) const override { missing(); }
  void steering_vector(const Tensor&, const VectorArguments&) const override { missing(); }
  void backward(const Tensor&, const BackwardArguments&) const override { missing(); }
  void few_rows_linear(const Tensor&, const LinearArguments&) const override { missing(); }

 private:
  template <class Arguments>
  static void run(void (*launch)(const Arguments&, void*, void*), const Tensor& like, const Arguments& g) {
    int32_t device;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device));
    const Tensor scratch = new_bytes(like, cuda::scratch_bytes(g.rows));
#ifndef SVDECODE_EMULATION
    const torch::stable::accelerator::DeviceGuard guard(device);
#endif
    launch(g, scratch.data_ptr(), current_stream(device));
  }
  [[noreturn]] static void missing() { throw std::runtime_error("svdecode has no CUDA kernel for this operator"); }
};

#endif

}  // namespace

const Device& device_of(const Tensor& tensor) {
#ifdef SVDECODE_CUDA
  static const Cuda cuda;
#endif
#ifdef SVDECODE_EMULATION
  (void)tensor;
  return cuda;
#else
  static const Cpu cpu;
  if (tensor.is_cpu()) return cpu;
#ifdef SVDECODE_CUDA
  if (tensor.is_cuda()) return cuda;
#endif
  throw std::runtime_error("svdecode was built without kernels for this device");
#endif
}

#ifdef SVDECODE_EMULATION

std::string instruction_set(std::string) { return "emulated"; }

#else

std::string instruction_set(std::string wanted) {
  if (wanted.empty()) return operators()->name;
  const CpuOperators* best = best_operators();
  const CpuOperators* known[] = {
      &base::OPERATORS,
#if defined(__x86_64__)
      &avx2::OPERATORS,
      &avx512::OPERATORS,
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

#endif

bool has_cuda() {
#ifdef SVDECODE_CUDA
  return true;
#else
  return false;
#endif
}

}  // namespace svdecode

void* svdecode_symbol_of(const char* library, const char* name) {
  void* const handle = dlopen(library, RTLD_LAZY | RTLD_NOLOAD);
  if (handle == nullptr) return nullptr;
  void* const symbol = dlsym(handle, name);
  dlclose(handle);  // gives back the reference that dlopen took
  return symbol;
}
