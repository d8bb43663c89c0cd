// The scratch of a call, its launches, and where a block works: an arrival counter for each row, what is known of the row, and
// the statistics and kept sums of every tile.
#pragma once

#include <stdexcept>
#include <string>

#include "launch.h"
#include "statistics.h"

namespace svdecode {
namespace cuda {

// A row after the first pass; one copy in the block's shared memory, which leaves the registers to the tokens.
struct Merged {
  Statistics statistics;
  Row row;
  float threshold, mu, shift, normaliser;
  Moments moments;
  int listed;  // tiles in the row's list
};

// A row's place in the scratch.
struct RowScratch {
  unsigned* arrived;
  Merged* merged;
  Piece* pieces;
  KeptPiece* kept;
  int* list;  // of tiles
};

struct Scratch {
  unsigned* arrived;
  Merged* merged;
  Piece* pieces;
  KeptPiece* kept;
  int* lists;

  __device__ RowScratch row(int64_t index, int tiles) const {
    return {arrived + index, merged + index, pieces + index * tiles, kept + index * tiles, lists + index * tiles};
  }
};

inline size_t padded(size_t bytes) { return (bytes + 15) / 16 * 16; }
inline size_t counter_bytes(const Rows& rows) { return padded(rows.count * sizeof(unsigned)); }

inline Scratch lay_out(const Rows& rows, void* memory, size_t* bytes = nullptr) {
  const size_t count = rows.count, tiles = count * count_tiles(rows.vocabulary);
  size_t end = 0;
  const auto take = [&](size_t size) {
    char* const begin = static_cast<char*>(memory) + end;
    end += padded(size);
    return static_cast<void*>(begin);
  };
  Scratch scratch;
  scratch.arrived = static_cast<unsigned*>(take(count * sizeof(unsigned)));
  scratch.merged = static_cast<Merged*>(take(count * sizeof(Merged)));
  scratch.pieces = static_cast<Piece*>(take(tiles * sizeof(Piece)));
  scratch.kept = static_cast<KeptPiece*>(take(tiles * sizeof(KeptPiece)));
  scratch.lists = static_cast<int*>(take(tiles * sizeof(int)));
  if (bytes) *bytes = end;
  return scratch;
}

inline void check(cudaError_t status) {
  if (status != cudaSuccess) throw std::runtime_error(std::string("svdecode: CUDA: ") + cudaGetErrorString(status));
}

// The row of a block, its split, and the tile of a warp.
struct Place {
  int row, splits, tile, tiles;
  bool exists;
};

__device__ inline Place place(const Rows& rows) {
  Place at;
  at.row = static_cast<int>(blockIdx.z * gridDim.y + blockIdx.y);
  at.splits = static_cast<int>(gridDim.x);
  at.tile = static_cast<int>(blockIdx.x) * WARPS + warp_index();
  at.tiles = count_tiles(rows.vocabulary);
  at.exists = at.row < rows.count;
  return at;
}

// One block for each split of each row; a grid has at most 65,535 blocks in y and in z.
template <class Arguments>
void launch(void (*kernel)(Arguments, Scratch), const Arguments& arguments, const Scratch& scratch, cudaStream_t stream) {
  constexpr int64_t MOST = 65535;
  const int64_t rows = arguments.rows.count, z = (rows + MOST - 1) / MOST, y = (rows + z - 1) / z;
  if (rows > 0x7FFFFFFF) throw std::runtime_error("svdecode: CUDA: more than 2^31 rows");
  const dim3 grid(count_splits(arguments.rows.vocabulary), static_cast<unsigned>(y), static_cast<unsigned>(z));
#ifdef SVDECODE_EMULATION
  (void)stream;
  emulation::launch(grid, THREADS, [&] { kernel(arguments, scratch); });
#else
  Arguments g = arguments;
  Scratch s = scratch;
  void* values[] = {&g, &s};
  check(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, dim3(THREADS), values, 0, stream));
#endif
}

// body(dtype) with the dtype of both inputs as a constant, ANY where they differ. Kernels take it as an int: the host code that
// nvcc makes of a kernel template does not compile where an argument is of an enumeration in a namespace.
template <class Body>
void with_dtype(const Rows& rows, const Body& body) {
  if (rows.pre.dtype != rows.ft.dtype) return body(std::integral_constant<Dtype, ANY>());
  if (rows.ft.dtype == Dtype::float32) return body(Float());
  if (rows.ft.dtype == Dtype::bfloat16) return body(BFloat16());
  body(Half());
}

}  // namespace cuda
}  // namespace svdecode
