// The scratch of a call: an arrival counter per row, then the statistics and the kept sums of every split.
#pragma once

#include <stdexcept>
#include <string>

#include "launch.h"
#include "row.h"

namespace svdecode {
namespace cuda {

struct Scratch {
  unsigned* arrived;
  Statistics* splits;
  KeptSums* kept;

  __device__ RowScratch row(int64_t index, int num_splits) const {
    return {splits + index * num_splits, kept + index * num_splits};
  }
};

inline size_t counter_bytes(const Rows& rows) { return (rows.count * sizeof(unsigned) + 15) / 16 * 16; }

inline Scratch lay_out(const Rows& rows, void* memory) {
  char* base = static_cast<char*>(memory);
  Scratch scratch;
  scratch.arrived = reinterpret_cast<unsigned*>(base);
  scratch.splits = reinterpret_cast<Statistics*>(base + counter_bytes(rows));
  scratch.kept = reinterpret_cast<KeptSums*>(scratch.splits + rows.count * splits(rows.vocabulary));
  return scratch;
}

inline void check(cudaError_t status) {
  if (status != cudaSuccess) throw std::runtime_error(std::string("svdecode: CUDA: ") + cudaGetErrorString(status));
}

// One block for each split of each row.
template <class Arguments>
void launch(void (*kernel)(Arguments, Scratch), const Arguments& arguments, const Scratch& scratch, cudaStream_t stream) {
  const int64_t blocks = arguments.rows.count * splits(arguments.rows.vocabulary);
  if (blocks > 0x7FFFFFFF) throw std::runtime_error("svdecode: CUDA: more than 2^31 blocks");
#ifdef SVDECODE_EMULATION
  (void)stream;
  emulation::launch(static_cast<unsigned>(blocks), THREADS, [&] { kernel(arguments, scratch); });
#else
  Arguments g = arguments;
  Scratch s = scratch;
  void* values[] = {&g, &s};
  check(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(static_cast<unsigned>(blocks)), dim3(THREADS), values, 0,
                         stream));
#endif
}

}  // namespace cuda
}  // namespace svdecode
