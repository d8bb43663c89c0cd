// From torch's tensors to the pointers and strides of arguments.h.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <optional>
#include <type_traits>

#include "arguments.h"
#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace svdecode {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int MAX_DIMENSIONS = 16;
constexpr int64_t HUGE_PAGES_FROM = int64_t{1} << 20;  // elements of a tensor: 4 MiB of float32, where numpy begins too

inline Tensor new_tensor(const Tensor& like, ScalarType dtype, int dims, const int64_t* sizes, const int64_t* strides) {
  int32_t type, device;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      dims, sizes, strides, torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), type, device, &handle));
  return Tensor(handle);
}

inline bool same_device(const Tensor& x, const Tensor& y) {
  int32_t types[2], devices[2];
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &types[0]));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(y.get(), &types[1]));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(x.get(), &devices[0]));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(y.get(), &devices[1]));
  return types[0] == types[1] && devices[0] == devices[1];
}

inline bool holds_logits(const Tensor& tensor) {
  const ScalarType dtype = tensor.scalar_type();
  return dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
}

// The pointer to `count` contiguous numbers of type T, on the device of `like` where there is one; throws for anything else.
template <class T>
T* pointer(const Tensor& tensor, const char* name, int64_t count, const Tensor* like) {
  constexpr ScalarType dtype = std::is_same_v<std::remove_const_t<T>, float>    ? ScalarType::Float
                               : std::is_same_v<std::remove_const_t<T>, double> ? ScalarType::Double
                                                                                : ScalarType::Long;
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, " must be ", torch::headeronly::toString(dtype), ", got ",
                  torch::headeronly::toString(tensor.scalar_type()));
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous");
  STD_TORCH_CHECK(tensor.numel() >= count, name, " must have ", count, " numbers, got ", tensor.numel());
  STD_TORCH_CHECK(like ? same_device(tensor, *like) : tensor.is_cpu(), name, " is on the wrong device");
  return static_cast<T*>(tensor.data_ptr());
}

// Uninitialised memory on the device of a tensor, from torch's allocator and in the order of its stream.
inline Tensor new_bytes(const Tensor& like, int64_t bytes) {
  const int64_t stride = 1;
  return new_tensor(like, ScalarType::Byte, 1, &bytes, &stride);
}

// Fresh memory of the CPU is mapped page by page while a kernel writes into it, which takes longer than the kernel where a
// tensor is too large for the heap (glibc: from 32 MiB). Huge pages need 512 times fewer faults. This is a hint: a system that
// has none to give, or that refuses, maps small pages as before.
inline void prefer_huge_pages(const Tensor& tensor) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (!tensor.is_cpu()) return;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(tensor.data_ptr());
  const uintptr_t end = begin + static_cast<uintptr_t>(tensor.numel()) * tensor.element_size();
  const uintptr_t page = static_cast<uintptr_t>(getpagesize()), first = (begin + page - 1) / page * page,
                  last = end / page * page;
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

// An uninitialised contiguous tensor (leading dimensions of `logits`, trailing) on its device.
inline Tensor new_rows(const Tensor& logits, ScalarType dtype, std::initializer_list<int64_t> trailing = {}) {
  int64_t sizes[MAX_DIMENSIONS + 1], strides[MAX_DIMENSIONS + 1];
  const auto shape = logits.sizes();
  int dims = 0;
  for (; dims + 1 < static_cast<int>(shape.size()); ++dims) sizes[dims] = shape[dims];
  for (const int64_t size : trailing) sizes[dims++] = size;
  int64_t stride = 1;
  for (int i = dims - 1; i >= 0; --i) {
    strides[i] = stride;
    stride *= sizes[i] > 0 ? sizes[i] : 1;
  }
  Tensor tensor = new_tensor(logits, dtype, dims, sizes, strides);
  if (stride >= HUGE_PAGES_FROM) prefer_huge_pages(tensor);  // stride is by now the number of elements
  return tensor;
}

// Where the rows of two or three tensors of one (..., V) shape begin: any strides, no copy, 64-bit offsets. Leading dimensions
// are merged as far as all tensors allow; a copy is made only where a last dimension is not contiguous or more than LEVELS are
// left. The third is float32.
class RowLayout {
 public:
  RowLayout(Tensor pre, Tensor ft, std::optional<Tensor> third = std::nullopt) : count_(third ? 3 : 2) {
    tensors_[0] = std::move(pre);
    tensors_[1] = std::move(ft);
    if (third) tensors_[2] = std::move(*third);
    check();
    const int64_t vocabulary = tensors_[1]->size(-1);
    // Counts of tokens are kept in fp32 among the other sums.
    STD_TORCH_CHECK(vocabulary < int64_t{1} << 24, "a vocabulary of 2^24 or more");
    for (int t = 0; t < count_; ++t) {
      if (vocabulary > 1 && tensors_[t]->stride(-1) != 1) copy(t);
    }
    if (!merge()) {
      for (int t = 0; t < count_; ++t) copy(t);
      merge();
    }
    rows_.vocabulary = static_cast<int32_t>(vocabulary);
    rows_.pre = logits(0);
    rows_.ft = logits(1);
  }

  const Rows& rows() const { return rows_; }
  Logits third() const { return logits(2); }

  // The rows of a contiguous float32 tensor that was made for this call.
  Logits contiguous(const Tensor& tensor) const {
    Logits result;
    result.data = tensor.data_ptr();
    int64_t stride = rows_.vocabulary;
    for (int level = LEVELS - 1; level >= 0; --level) {
      result.strides[level] = stride;
      stride *= rows_.sizes[level];
    }
    return result;
  }

  // Results that were written into a copy of `out`, because of its layout.
  void copy_back(Tensor& out) const {
    if (copied_[2]) torch::stable::copy_(out, *tensors_[2]);
  }

 private:
  void check() const {
    const auto shape = tensors_[1]->sizes();
    STD_TORCH_CHECK(shape.size() >= 1 && shape.size() <= MAX_DIMENSIONS, "logits must have 1 to ", MAX_DIMENSIONS,
                    " dimensions, got ", shape.size());
    for (int t = 0; t < count_; ++t) {
      const Tensor& tensor = *tensors_[t];
      const char* name = t == 0 ? "logits_pre" : t == 1 ? "logits_ft" : "the tensor of log-probs";
      STD_TORCH_CHECK(t < 2 ? holds_logits(tensor) : tensor.scalar_type() == ScalarType::Float, name, " must be ",
                      t < 2 ? "float32, bfloat16 or float16" : "float32", ", got ",
                      torch::headeronly::toString(tensor.scalar_type()));
      bool same = tensor.dim() == static_cast<int64_t>(shape.size()) && same_device(tensor, *tensors_[1]);
      for (int64_t d = 0; same && d < tensor.dim(); ++d) same = tensor.size(d) == shape[d];
      STD_TORCH_CHECK(same, name, " differs from logits_ft in shape or device");
    }
  }

  void copy(int t) {
    tensors_[t] = torch::stable::clone(torch::stable::contiguous(*tensors_[t]));
    copied_[t] = true;
  }

  bool merge() {
    int64_t sizes[LEVELS], strides[3][LEVELS];
    int levels = 0;
    rows_.count = 1;
    const auto shape = tensors_[1]->sizes();
    for (int d = 0; d + 1 < static_cast<int>(shape.size()); ++d) {
      rows_.count *= shape[d];
      if (shape[d] == 1) continue;
      bool merges = levels > 0;
      for (int t = 0; t < count_; ++t) merges = merges && strides[t][levels - 1] == shape[d] * tensors_[t]->stride(d);
      if (!merges && levels == LEVELS) return false;
      if (!merges) sizes[levels++] = 1;
      sizes[levels - 1] *= shape[d];
      for (int t = 0; t < count_; ++t) strides[t][levels - 1] = tensors_[t]->stride(d);
    }
    rows_.levels = levels > 0 ? levels : 1;
    for (int level = 0; level < LEVELS; ++level) {
      const int from = level - (LEVELS - levels);
      rows_.sizes[level] = from < 0 ? 1 : sizes[from];
      for (int t = 0; t < count_; ++t) strides_[t][level] = from < 0 ? 0 : strides[t][from];
    }
    return true;
  }

  Logits logits(int t) const {
    Logits result;
    result.data = tensors_[t]->data_ptr();
    const ScalarType dtype = tensors_[t]->scalar_type();
    result.dtype = dtype == ScalarType::Float      ? Dtype::float32
                   : dtype == ScalarType::BFloat16 ? Dtype::bfloat16
                                                   : Dtype::float16;
    for (int level = 0; level < LEVELS; ++level) result.strides[level] = strides_[t][level];
    return result;
  }

  int count_;
  std::optional<Tensor> tensors_[3];  // a default Tensor would allocate a handle
  bool copied_[3] = {};
  int64_t strides_[3][LEVELS] = {};
  Rows rows_;
};

}  // namespace svdecode
