// Where a row of a strided (..., V) tensor begins, in 64 bits: the twin of kernels/row_layout.py. csrc/tensors.h merges the
// levels.
#pragma once

#include "arguments.h"
#include "maths.h"

namespace svdecode {
namespace SVDECODE_TARGET {

SVDECODE_FUNCTION int64_t row_start(const Rows& rows, const int64_t* strides, int64_t row) {
  int64_t start = 0;
  for (int level = LEVELS - 1; level > 0; --level) {
    start += row % rows.sizes[level] * strides[level];
    row /= rows.sizes[level];
  }
  return start + row * strides[0];
}

}  // namespace SVDECODE_TARGET
}  // namespace svdecode
