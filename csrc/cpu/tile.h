// Rows, tiles and threads of the CPU operators.
//
// A row is cut into tiles of TILE tokens. All sums are kept per tile and merged in the order of the tiles, so a row's result
// does not depend on how tiles and rows are shared out among threads. A tile of both inputs is 16 KB in fp32 and stays in the
// L1 cache while its loops run over it; bf16 and fp16 are converted into a buffer once. Loops are plain and marked `omp simd`.
#pragma once

#include "../arguments.h"
#include "../row_algebra.h"
#include "../row_layout.h"
#include "convert.h"
#include "workers.h"

namespace svdecode {
namespace SVDECODE_TARGET {

constexpr int BLOCK = 64;                       // unit inside a tile that is skipped where it holds no kept token
constexpr int CHUNK = 256;                      // unit of prefetching
constexpr int64_t STREAMED = int64_t{1} << 20;  // output of more tokens than this goes around the caches

struct Buffers {
  alignas(64) float z[TILE];
  alignas(64) float a[TILE];
};

struct Tile {
  const float* z;
  const float* a;
  int64_t begin;
  int count;
};

// One row of both inputs.
class RowPair {
 public:
  RowPair(const Rows& rows, int64_t row) : rows_(rows) {
    pre_ = start(rows.pre, row);
    ft_ = start(rows.ft, row);
  }
  int64_t tiles() const { return (rows_.vocabulary + TILE - 1) / TILE; }
  int64_t begin(int64_t tile) const { return tile * TILE; }
  int count(int64_t tile) const {
    const int64_t left = rows_.vocabulary - begin(tile);
    return left < TILE ? static_cast<int>(left) : TILE;
  }
  Tile load(int64_t tile, Buffers& buffers) const {
    const int64_t first = begin(tile);
    const int n = count(tile);
    return {svdecode::SVDECODE_TARGET::load(ft_, rows_.ft.dtype, first, n, buffers.z),
            svdecode::SVDECODE_TARGET::load(pre_, rows_.pre.dtype, first, n, buffers.a), first, n};
  }
  const float* load_ft(int64_t tile, Buffers& buffers) const {
    return svdecode::SVDECODE_TARGET::load(ft_, rows_.ft.dtype, begin(tile), count(tile), buffers.z);
  }
  bool holds(int64_t token) const { return token >= 0 && token < rows_.vocabulary; }
  // -inf for a token outside the vocabulary, which is not read.
  float z(int64_t token) const { return holds(token) ? load_one(ft_, rows_.ft.dtype, token) : -INFINITE; }
  float a(int64_t token) const { return holds(token) ? load_one(pre_, rows_.pre.dtype, token) : -INFINITE; }

  // Ask for CHUNK tokens ahead of time, a line of one row after a line of the other. Always inlined: as a function of its own
  // it has no effect that GCC knows of, and its calls were deleted.
  SVDECODE_FUNCTION void prefetch(int64_t token) const {
    if (token + CHUNK > rows_.vocabulary) return;
    const int pre_size = element_size(rows_.pre.dtype), ft_size = element_size(rows_.ft.dtype);
    const int line = 64 / (pre_size > ft_size ? pre_size : ft_size);
    const char* ft = static_cast<const char*>(ft_) + token * ft_size;
    const char* pre = static_cast<const char*>(pre_) + token * pre_size;
    for (int i = 0; i < CHUNK; i += line) {
      __builtin_prefetch(ft + i * ft_size);
      __builtin_prefetch(pre + i * pre_size);
    }
  }

 private:
  const void* start(const Logits& logits, int64_t row) const {
    return static_cast<const char*>(logits.data) + row_start(rows_, logits.strides, row) * element_size(logits.dtype);
  }
  const Rows& rows_;
  const void* pre_;
  const void* ft_;
};

// The first token at the maximum, or the tile's length where nothing compares equal (NaN).
inline int first_at(const Tile& tile, float maximum) {
  int begin = 0;
  for (; begin + BLOCK <= tile.count; begin += BLOCK) {
    int found = 0;
#pragma omp simd reduction(| : found)
    for (int i = 0; i < BLOCK; ++i) found |= tile.z[begin + i] == maximum;
    if (found) break;
  }
  while (begin < tile.count && !(tile.z[begin] == maximum)) ++begin;
  return begin;
}

// PLAIN: no token of the tile is excluded or has a vanishing e^u, so that nothing needs to be compared; nearly all tiles are.
template <bool WITH_KL, bool PLAIN>
inline void add_sums(const Tile& tile, int begin, int count, Statistics& s) {
  const float* __restrict__ z = tile.z + begin;
  const float* __restrict__ a = tile.a + begin;
  const float top = finite_or_zero(s.max), pre_top = top_base(s), pre_max = finite_or_zero(s.pre_max);
  float total = 0, weighted = 0, pre_total = 0;
  int lost = 0;
#pragma omp simd reduction(+ : total, weighted, pre_total) reduction(| : lost)
  for (int i = 0; i < count; ++i) {
    const float u = z[i] - top;
    const float e = PLAIN ? normal_exponential(u) : exponential(u);
    const float d = PLAIN ? u - (a[i] - pre_top) : difference_from_top(u, a[i], top, pre_top);
    total += e;
    weighted += e * d;
    if (WITH_KL) pre_total += PLAIN ? normal_exponential(a[i] - pre_max) : exponential(a[i] - pre_max);
    if (WITH_KL && !PLAIN) lost |= (a[i] == -INFINITE) & (z[i] > -INFINITE);
  }
  s.total += total;
  s.weighted += weighted;
  s.pre_total += pre_total;
  s.lost = larger(s.lost, lost ? 1.0f : 0.0f);
}

// Statistics of a tile of `pair`, whose next tile is asked for meanwhile.
template <bool WITH_KL>
inline Statistics tile_statistics(const RowPair& pair, const Tile& tile) {
  const float* __restrict__ z = tile.z;
  const float* __restrict__ a = tile.a;
  float max = -INFINITE, min = INFINITE, pre_max = -INFINITE, pre_min = INFINITE;
#pragma omp simd reduction(max : max, pre_max) reduction(min : min, pre_min)
  for (int i = 0; i < tile.count; ++i) {
    max = z[i] > max ? z[i] : max;
    min = z[i] < min ? z[i] : min;
    if (WITH_KL) pre_max = a[i] > pre_max ? a[i] : pre_max;
    pre_min = a[i] < pre_min ? a[i] : pre_min;
  }
  if (!WITH_KL) {  // all that matters is whether there is any a > -inf
    pre_max = pre_min;
    for (int i = 0; pre_max == -INFINITE && i < tile.count; ++i) pre_max = larger(a[i], pre_max);
  }
  const int top = first_at(tile, max);
  Statistics s;
  s.max = max;
  s.pre_max = pre_max;
  s.pre_top = top < tile.count ? a[top] : 0.0f;
  const bool plain = min - max >= LEAST && (WITH_KL ? pre_min - pre_max >= LEAST : pre_min > -INFINITE);
  for (int begin = 0; begin < tile.count; begin += CHUNK) {
    const int count = begin + CHUNK < tile.count ? CHUNK : tile.count - begin;
    pair.prefetch(tile.begin + TILE + begin);
    plain ? add_sums<WITH_KL, true>(tile, begin, count, s) : add_sums<WITH_KL, false>(tile, begin, count, s);
  }
  return s;
}

// First pass of every operator: statistics of each tile into `pieces`, merged in their order.
template <bool WITH_KL>
inline Statistics row_statistics(const RowPair& pair, Statistics* pieces, const Workers& workers) {
  workers.tiles(pair.tiles(), pair.tiles(), [&](int64_t begin, int64_t end) {
    Buffers buffers;
    for (int64_t t = begin; t < end; ++t) {
      const Tile tile = pair.load(t, buffers);
      pieces[t] = tile_statistics<WITH_KL>(pair, tile);
    }
  });
  return merge(pieces, pair.tiles(), WITH_KL);
}

inline void save_row(float* saved, const Row& row, float normaliser, float mean) {
  if (saved == nullptr) return;
  saved[SAVED_MAXIMUM] = row.max;
  saved[SAVED_TOTAL] = row.valid ? row.total : NOT_A_NUMBER;
  saved[SAVED_PRE_TOP] = row.pre_top;
  saved[SAVED_CENTRE] = row.centre;
  saved[SAVED_NORMALISER] = normaliser;
  saved[SAVED_MEAN] = mean;
}

inline float* out_row(const Rows& rows, const Logits& out, int64_t row) {
  return out.data == nullptr ? nullptr : static_cast<float*>(out.data) + row_start(rows, out.strides, row);
}

}  // namespace SVDECODE_TARGET
}  // namespace svdecode
