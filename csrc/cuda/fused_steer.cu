// fused_steer and optimal_strength on a GPU.
//
// One launch (steer_kernel) where K is a handful of tokens: every warp reads its tile once and fills its output with -inf, and
// the last block of a row to arrive finishes the row from the tiles that hold kept tokens. Several launches (statistics,
// moments where there are labels, normaliser, output) where all tokens have an output, so that no block works alone; the last
// block of a row merges what each of them found. Both call the same functions in the same order.
#include "first_pass.h"

namespace svdecode {
namespace cuda {
namespace {

__device__ float* out_row(const SteerArguments& g, int row) {
  return static_cast<float*>(g.out.data) + row_start(g.rows, g.out.strides, row);
}

__device__ void merge_row(const SteerArguments& g, const Place& at, const RowScratch& own, Merged& m, Shared& shared) {
  const float mu = g.source == Strength::per_row ? g.mu_rows[at.row] : g.mu;
  merge_row(own, at.tiles, g.settings, mu, g.kl_out != nullptr, false, m, shared);
}

// The moments of a row with a label, and its own mu from them, when the sums of its tiles are there.
template <Dtype D>
__device__ void merge_moments(const SteerArguments& g, const Inputs<D>& in, const Place& at, const RowScratch& own, Merged& m,
                              Shared& shared) {
  const KeptSums sums = merge_kept(own, at.tiles, m, -INFINITE, shared);
  if (threadIdx.x == 0) {
    const int64_t label = g.labels[at.row];
    const bool in_range = label >= 0 && label < in.vocabulary, ignored = label == IGNORE_INDEX;
    const float z = in_range ? in.ft[label] : -INFINITE, a = in_range ? in.pre[label] : -INFINITE;
    m.moments = label_moments(sums, m.row, z, a, m.threshold, in_range, ignored ? 0.0f : NOT_A_NUMBER, g.settings.kl_direction);
    if (g.source == Strength::own) {
      m.mu = optimal_mu(m.moments, ignored, g.settings.eps);
      m.shift = shift_outside(m.mu, g.settings.penalty);
    }
  }
  __syncthreads();
}

template <Dtype D>
__device__ void find_moments(const SteerArguments& g, const Inputs<D>& in, const RowScratch& own, int tile, const Merged& m) {
  const KeptSums sums = tile_moments(in, tile, m, g.settings.kl_direction);
  if (lane_index() == 0) own.kept[tile] = {sums};
}

template <Dtype D>
__device__ void find_normaliser(const SteerArguments& g, const Inputs<D>& in, const RowScratch& own, int tile,
                                const Merged& m) {
  const KeptSums sums = tile_steered(in, tile, m, g.settings.kl_direction);
  if (lane_index() != 0) return;
  if (!g.labels) return void(own.kept[tile] = {sums});
  own.kept[tile].steered_max = sums.steered_max;  // beside its moments
  own.kept[tile].steered_total = sums.steered_total;
}

__device__ void write_scalars(const SteerArguments& g, int row, const Merged& m, float count) {
  if (threadIdx.x != 0) return;
  const bool valid = m.row.valid;
  const float nan = valid ? 0.0f : NOT_A_NUMBER;  // added to every result
  if (g.mu_out) g.mu_out[row] = m.mu + nan;
  if (g.count_out) g.count_out[row] = valid ? static_cast<int32_t>(count) : 0;
  if (g.kl_out) g.kl_out[row] = row_kl(m.statistics, m.row) + nan;
  if (g.labels) {
    g.mu_star_out[row] = optimal_mu(m.moments, g.labels[row] == IGNORE_INDEX, g.settings.eps) + nan;
    g.moments_out[int64_t{3} * row] = m.moments.n + nan;
    g.moments_out[int64_t{3} * row + 1] = m.moments.d + nan;
    g.moments_out[int64_t{3} * row + 2] = m.moments.h + nan;
  }
  if (g.saved_out) {
    float* saved = g.saved_out + int64_t{SAVED_FIELDS} * row;
    saved[SAVED_MAXIMUM] = m.row.max;
    saved[SAVED_TOTAL] = m.row.total + nan;
    saved[SAVED_PRE_TOP] = m.row.pre_top;
    saved[SAVED_CENTRE] = m.row.centre;
    saved[SAVED_NORMALISER] = m.normaliser;
    saved[SAVED_MEAN] = m.moments.mean;
  }
}

// The normaliser and the scalars of a row, when the sums of its tiles are there.
__device__ void merge_normaliser(const SteerArguments& g, const Place& at, const RowScratch& own, Merged& m, Shared& shared) {
  const KeptSums sums = merge_kept(own, at.tiles, m, m.shift, shared);
  if (threadIdx.x == 0 && g.out.data) m.normaliser = sums.steered_max + logarithm(sums.steered_total);
  __syncthreads();
  write_scalars(g, at.row, m, sums.count);
}

template <Dtype D>
__device__ void write_kept(const SteerArguments& g, const Inputs<D>& in, float* out, int tile, const Merged& m) {
  for (int chunk = 0; chunk < CHUNKS; ++chunk) {
    float zs[PER_LANE];
    chunk_zs(in, tile, chunk, m, g.settings.kl_direction, zs);
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i) zs[i] -= m.normaliser;
    store(out, tile, chunk, in.vocabulary, zs);
  }
}

// A tile without a kept token: its logits, shifted.
template <Dtype D>
__device__ void write_shifted(const Inputs<D>& in, float* out, int tile, const Merged& m) {
  const auto tokens = load<CHUNKS>(in, tile, 0);
#pragma unroll
  for (int chunk = 0; chunk < CHUNKS; ++chunk) {
    float values[PER_LANE];
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i) values[i] = tokens.z[chunk][i] - m.row.max + m.shift - m.normaliser;
    store(out, tile, chunk, in.vocabulary, values);
  }
}

template <int DTYPE>
__global__ void __launch_bounds__(THREADS, 3) steer_kernel(SteerArguments g, Scratch scratch) {
  constexpr Dtype D = static_cast<Dtype>(DTYPE);
  __shared__ Shared shared;
  __shared__ Merged m;
  __shared__ bool last;
  __shared__ Inputs<D> in;  // for the last block, which has few registers left
  __shared__ RowScratch own;
  const Place at = place(g.rows);
  if (!at.exists) return;
  const RowScratch first_own = scratch.row(at.row, at.tiles);
  const auto first_in = row_inputs<D>(g.rows, at.row);
  if (threadIdx.x == 0) {
    in = first_in;
    own = first_own;
  }
  const bool dense = g.out.data != nullptr;
  float* const out = dense ? out_row(g, at.row) : nullptr;
  first_pass(first_in, at, first_own, g.kl_out != nullptr, out);
  if (!is_last(first_own.arrived, at.splits, last)) return;

  merge_row(g, at, own, m, shared);
  if (g.labels) {
    for (int i = warp_index(); i < m.listed; i += WARPS) find_moments(g, in, own, own.list[i], m);
    __syncthreads();
    merge_moments(g, in, at, own, m, shared);
  }
  const bool counts = dense || !g.labels;  // else the moments have
  for (int i = warp_index(); counts && i < m.listed; i += WARPS) find_normaliser(g, in, own, own.list[i], m);
  __syncthreads();
  merge_normaliser(g, at, own, m, shared);
  if (!dense) return;
  for (int i = warp_index(); m.row.valid && i < m.listed; i += WARPS) write_kept(g, in, out, own.list[i], m);
  for (int tile = warp_index(); !m.row.valid && tile < at.tiles; tile += WARPS) fill(out, tile, in.vocabulary, NOT_A_NUMBER);
}

// The last block of a row, whose counter it makes ready for the next launch.
__device__ bool finishes(const RowScratch& own, const Place& at, bool& last) {
  if (!is_last(own.arrived, at.splits, last)) return false;
  if (threadIdx.x == 0) *own.arrived = 0;
  return true;
}

template <int DTYPE>
__global__ void __launch_bounds__(THREADS, 3) statistics_kernel(SteerArguments g, Scratch scratch) {
  constexpr Dtype D = static_cast<Dtype>(DTYPE);
  __shared__ Shared shared;
  __shared__ Merged m;
  __shared__ bool last;
  const Place at = place(g.rows);
  if (!at.exists) return;
  const RowScratch own = scratch.row(at.row, at.tiles);
  const auto in = row_inputs<D>(g.rows, at.row);
  first_pass(in, at, own, g.kl_out != nullptr, nullptr);
  if (!finishes(own, at, last)) return;
  merge_row(g, at, own, m, shared);
  if (threadIdx.x == 0) *own.merged = m;
}

// Of the row that a launch before has merged, a copy.
__device__ bool load_merged(const RowScratch& own, const Place& at, Merged& m) {
  if (threadIdx.x == 0) m = *own.merged;
  __syncthreads();
  return at.tile < at.tiles && own.pieces[at.tile].max >= m.threshold;
}

template <int DTYPE>
__global__ void __launch_bounds__(THREADS, 3) moments_kernel(SteerArguments g, Scratch scratch) {
  constexpr Dtype D = static_cast<Dtype>(DTYPE);
  __shared__ Shared shared;
  __shared__ Merged m;
  __shared__ bool last;
  const Place at = place(g.rows);
  if (!at.exists) return;
  const RowScratch own = scratch.row(at.row, at.tiles);
  const auto in = row_inputs<D>(g.rows, at.row);
  if (load_merged(own, at, m)) find_moments(g, in, own, at.tile, m);
  if (!finishes(own, at, last)) return;
  merge_moments(g, in, at, own, m, shared);
  if (threadIdx.x == 0) *own.merged = m;
}

template <int DTYPE>
__global__ void __launch_bounds__(THREADS, 3) normaliser_kernel(SteerArguments g, Scratch scratch) {
  constexpr Dtype D = static_cast<Dtype>(DTYPE);
  __shared__ Shared shared;
  __shared__ Merged m;
  __shared__ bool last;
  const Place at = place(g.rows);
  if (!at.exists) return;
  const RowScratch own = scratch.row(at.row, at.tiles);
  if (load_merged(own, at, m)) find_normaliser(g, row_inputs<D>(g.rows, at.row), own, at.tile, m);
  if (!finishes(own, at, last)) return;
  merge_normaliser(g, at, own, m, shared);
  if (threadIdx.x == 0) *own.merged = m;
}

template <int DTYPE>
__global__ void __launch_bounds__(THREADS, 3) output_kernel(SteerArguments g, Scratch scratch) {
  constexpr Dtype D = static_cast<Dtype>(DTYPE);
  __shared__ Merged m;
  const Place at = place(g.rows);
  if (!at.exists) return;
  const auto in = row_inputs<D>(g.rows, at.row);
  const bool kept = load_merged(scratch.row(at.row, at.tiles), at, m);
  if (at.tile >= at.tiles) return;
  float* const out = out_row(g, at.row);
  if (!m.row.valid) return fill(out, at.tile, in.vocabulary, NOT_A_NUMBER);
  if (kept) return write_kept(g, in, out, at.tile, m);
  if (g.settings.penalty == -INFINITE) return fill(out, at.tile, in.vocabulary, -INFINITE);
  write_shifted(in, out, at.tile, m);
}

}  // namespace

size_t scratch_bytes(const Rows& rows) {
  size_t bytes;
  lay_out(rows, nullptr, &bytes);
  return bytes;
}

void fused_steer(const SteerArguments& g, void* memory, void* stream_) {
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  const Scratch scratch = lay_out(g.rows, memory);
  const bool few_kept = g.settings.penalty == -INFINITE && g.settings.log_alpha > -INFINITE;
  check(cudaMemsetAsync(scratch.arrived, 0, counter_bytes(g.rows), stream));
  with_dtype(g.rows, [&](auto dtype) {
    constexpr int D = static_cast<int>(decltype(dtype)::value);
    if (few_kept || g.out.data == nullptr) return launch(steer_kernel<D>, g, scratch, stream);
    launch(statistics_kernel<D>, g, scratch, stream);
    if (g.labels) launch(moments_kernel<D>, g, scratch, stream);
    launch(normaliser_kernel<D>, g, scratch, stream);
    launch(output_kernel<D>, g, scratch, stream);
  });
}

}  // namespace cuda
}  // namespace svdecode
