// Where a row of a strided (..., V) tensor begins, in 64 bits: the twin of kernels/row_layout.py. csrc/tensors.h merges the
// levels.
#pragma once

#include "arguments.h"
#include "maths.h"

namespace svdecode {
namespace SVDECODE_TARGET {

// Index is that of the row: on a GPU, where a division of 64 bits takes a hundred instructions, 32 bits.
template <class Index>
SVDECODE_FUNCTION int64_t row_start(const Rows& rows, const int64_t* strides, Index row) {
  int64_t start = 0;
#pragma unroll
  for (int level = LEVELS - 1; level > 0; --level) {
    if (level == LEVELS - rows.levels) return start + row * strides[level];
    const Index size = static_cast<Index>(rows.sizes[level]);
    start += row % size * strides[level];
    row /= size;
  }
  return start + row * strides[0];
}

}  // namespace SVDECODE_TARGET
}  // namespace svdecode
