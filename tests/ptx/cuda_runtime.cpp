// The CUDA runtime as far as csrc/cuda calls it, without a GPU: each launch is handed to a function of the caller, with the name
// of the kernel in its PTX. And C functions that call the operators, so that no layout of a struct is known in Python.
#include <cuda_runtime_api.h>

#include <cstring>
#include <map>
#include <string>

#include "cuda/launch.h"

namespace {

using Launch = void (*)(const char* kernel, const unsigned* grid, unsigned threads, void** arguments, size_t shared_bytes);
Launch launch_here = nullptr;

std::map<const void*, std::string>& names() {
  static std::map<const void*, std::string> found;
  return found;
}

}  // namespace

extern "C" {

// What nvcc's host code calls when the library is loaded.
void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 0; }
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* device, int, void*, void*, void*, void*, int*) {
  names()[host] = device;
}

cudaError_t cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void** arguments, size_t shared, cudaStream_t) {
  const unsigned size[] = {grid.x, grid.y, grid.z};
  launch_here(names().at(kernel).c_str(), size, block.x * block.y * block.z, arguments, shared);
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void** arguments, size_t shared, cudaStream_t s) {
  return cudaLaunchKernel(kernel, grid, block, arguments, shared, s);
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(host));
  return cudaSuccess;
}
unsigned __cudaPushCallConfiguration(dim3, dim3, size_t, void*) { return 0; }
cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) { return cudaSuccess; }
cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
  std::memset(memory, value, bytes);
  return cudaSuccess;
}
const char* cudaGetErrorString(cudaError_t) { return "none: there is no GPU"; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
}

namespace {

// Rows as a contiguous (rows, V) tensor has them, `stride` elements apart.
struct Input {
  const void *pre, *ft;
  int32_t pre_dtype, ft_dtype, vocabulary;
  int64_t rows, pre_stride, ft_stride;
  float log_alpha, penalty;
  int32_t kl_direction;
};

svdecode::Logits logits(const void* data, int32_t dtype, int64_t stride) {
  svdecode::Logits x;
  x.data = const_cast<void*>(data);
  x.dtype = static_cast<svdecode::Dtype>(dtype);
  x.strides[svdecode::LEVELS - 1] = stride;
  return x;
}

template <class Arguments>
Arguments begin(const Input& in) {
  Arguments g;
  g.rows.count = in.rows;
  g.rows.vocabulary = in.vocabulary;
  g.rows.sizes[svdecode::LEVELS - 1] = in.rows;
  g.rows.pre = logits(in.pre, in.pre_dtype, in.pre_stride);
  g.rows.ft = logits(in.ft, in.ft_dtype, in.ft_stride);
  g.settings.log_alpha = in.log_alpha;
  g.settings.penalty = in.penalty;
  g.settings.eps = 1e-12f;
  g.settings.kl_direction = in.kl_direction;
  return g;
}

}  // namespace

extern "C" {

void on_launch(Launch run) { launch_here = run; }

size_t scratch_bytes(const Input* in) { return svdecode::cuda::scratch_bytes(begin<svdecode::SteerArguments>(*in).rows); }

// With labels each row has its own strength, else `mu`; kl may be null.
void fused_steer(const Input* in, void* scratch, float mu, const int64_t* labels, float* out, float* mu_out, int32_t* count,
                 float* kl, float* mu_star, float* moments) {
  auto g = begin<svdecode::SteerArguments>(*in);
  g.out = logits(out, 0, in->vocabulary);
  g.source = labels ? svdecode::Strength::own : svdecode::Strength::number;
  g.mu = mu;
  g.labels = labels;
  g.mu_out = mu_out;
  g.count_out = count;
  g.kl_out = kl;
  g.mu_star_out = mu_star;
  g.moments_out = moments;
  svdecode::cuda::fused_steer(g, scratch, nullptr);
}

void steer_sample(const Input* in, void* scratch, float mu, const float* uniform, float temperature, int64_t top_k, float top_p,
                  int64_t* tokens, float* logprobs) {
  auto g = begin<svdecode::SampleArguments>(*in);
  g.mu = mu;
  g.uniform = uniform;
  g.temperature = temperature;
  g.top_k = top_k;
  g.top_p = top_p;
  g.tokens_out = tokens;
  g.logprobs_out = logprobs;
  svdecode::cuda::steer_sample(g, scratch, nullptr);
}

void steer_topk(const Input* in, void* scratch, float mu, int64_t k, int64_t* tokens, float* logprobs) {
  auto g = begin<svdecode::TopkArguments>(*in);
  g.mu = mu;
  g.k = k;
  g.tokens_out = tokens;
  g.logprobs_out = logprobs;
  svdecode::cuda::steer_topk(g, scratch, nullptr);
}
}
