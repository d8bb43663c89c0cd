// Which implementation computes a call: the CPU operators for the instruction set of this machine, or the CUDA kernels.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <string>

#include "arguments.h"

namespace svdecode {

// The operators of one device; those that it lacks throw.
class Device {
 public:
  virtual ~Device() = default;
  virtual void fused_steer(const SteerArguments&) const = 0;
  virtual void steer_sample(const SampleArguments&) const = 0;
  virtual void steered_nll(const NllArguments&) const = 0;
  virtual void steering_vector(const VectorArguments&) const = 0;
  virtual void backward(const BackwardArguments&) const = 0;
};

// The device that a tensor is on; throws where this binary has no code for it.
const Device& device_of(const torch::stable::Tensor& tensor);

// Use an instruction set ("" leaves it) and return the one in use; throws for one that this machine lacks.
std::string instruction_set(std::string wanted);

// Whether the CUDA kernels are in this binary.
bool has_cuda();

}  // namespace svdecode
