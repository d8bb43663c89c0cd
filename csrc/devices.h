// Which implementation computes a call: the CPU operators for the instruction set of this machine, or the CUDA kernels.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <string>

#include "arguments.h"

namespace svdecode {

using torch::stable::Tensor;

// The operators of one device, given a tensor on it; those that it lacks throw.
class Device {
 public:
  virtual ~Device() = default;
  virtual void fused_steer(const Tensor&, const SteerArguments&) const = 0;
  virtual void steer_sample(const Tensor&, const SampleArguments&) const = 0;
  virtual void steer_topk(const Tensor&, const TopkArguments&) const = 0;
  virtual void steered_nll(const Tensor&, const NllArguments&) const = 0;
  virtual void steering_vector(const Tensor&, const VectorArguments&) const = 0;
  virtual void backward(const Tensor&, const BackwardArguments&) const = 0;
  virtual void few_rows_linear(const Tensor&, const LinearArguments&) const = 0;
};

// The device that a tensor is on; throws where this binary has no code for it.
const Device& device_of(const Tensor& tensor);

// Use an instruction set ("" leaves it) and return the one in use; throws for one that this machine lacks.
std::string instruction_set(std::string wanted);

// Whether the CUDA kernels are in this binary.
bool has_cuda();

}  // namespace svdecode

// A symbol of a library that is in this process, null where either is missing. dlsym(RTLD_DEFAULT) does not see what Python
// loads, because that is loaded locally. Exported under a plain name, by which tests/test_compiled.py calls it.
extern "C" __attribute__((visibility("default"))) void* svdecode_symbol_of(const char* library, const char* name);
