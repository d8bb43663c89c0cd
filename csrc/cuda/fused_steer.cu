// fused_steer and optimal_strength on a GPU.
//
// One launch (steer_kernel) where K is a handful of tokens: every block reads its split once, fills its output with -inf, and
// the last block of a row to arrive finishes the row from the splits that hold kept tokens. Several launches (statistics,
// moments where there are labels, normaliser, output) where all tokens have an output, so that no block works alone. Both call
// the same functions of row.h in the same order.
#include "scratch.h"

namespace svdecode {
namespace cuda {
namespace {

__device__ bool drops(const SteerArguments& g) { return g.settings.penalty == -INFINITE; }

__device__ float* out_row(const SteerArguments& g, int64_t row) {
  return static_cast<float*>(g.out.data) + row_start(g.rows, g.out.strides, row);
}

__device__ void fill_split(const SteerArguments& g, int row, int split, float value) {
  const float values[PER_THREAD] = {value, value, value, value, value, value, value, value};
  store(out_row(g, row), first_token(split), g.rows.vocabulary, values);
}

// A row after the first pass; one copy in the block's shared memory, which leaves the registers to the tokens.
struct Merged {
  Statistics statistics;
  Row row;
  float threshold, mu;
  Moments moments;
};

__device__ void merge_row(const SteerArguments& g, int row, const RowScratch& scratch, int count, Shared& shared, Merged& m) {
  const Statistics statistics = merge_splits(scratch.splits, count, g.kl_out != nullptr, shared);
  if (threadIdx.x == 0) {
    m.statistics = statistics;
    m.row = finalise(statistics);
    m.threshold = m.row.max + g.settings.log_alpha;
    m.mu = g.source == Strength::per_row ? g.mu_rows[row] : g.mu;
    m.moments = {0.0f, 0.0f, 0.0f, 0.0f};
  }
  __syncthreads();
}

// The moments of a row with a label, and its own mu from them; the kept sums are there.
__device__ void add_moments(const SteerArguments& g, int row, const RowScratch& scratch, int count, const RowInputs& in,
                            Merged& m, Shared& shared) {
  const KeptSums sums = merge_kept(scratch, count, m.row, m.threshold, -INFINITE, shared);
  if (threadIdx.x == 0) {
    const int64_t label = g.labels[row];
    const bool in_range = label >= 0 && label < g.rows.vocabulary, ignored = label == IGNORE_INDEX;
    const float z = in_range ? load_one(in.ft, label) : -INFINITE, a = in_range ? load_one(in.pre, label) : -INFINITE;
    m.moments = label_moments(sums, m.row, z, a, m.threshold, in_range, ignored ? 0.0f : NOT_A_NUMBER, g.settings.kl_direction);
    if (g.source == Strength::own) m.mu = optimal_mu(m.moments, ignored, g.settings.eps);
  }
  __syncthreads();
}

__device__ void moments_of(const SteerArguments& g, const RowInputs& in, const RowScratch& scratch, int split, const Merged& m,
                           Shared& shared) {
  const KeptSums sums = split_moments(in, split, m.row, m.threshold, g.settings.kl_direction, shared);
  if (threadIdx.x == 0) scratch.kept[split] = sums;
}

__device__ void normaliser_of(const SteerArguments& g, const RowInputs& in, const RowScratch& scratch, int split,
                              const Merged& m, Shared& shared) {
  const float shift = shift_outside(m.mu, g.settings.penalty);
  const KeptSums sums = split_steered(in, split, m.row, m.threshold, m.mu, shift, g.settings.kl_direction, shared);
  if (threadIdx.x != 0) return;
  KeptSums& kept = scratch.kept[split];  // other blocks may be reading its moments
  if (!g.labels) kept.count = sums.count;
  kept.steered_max = sums.steered_max;
  kept.steered_total = sums.steered_total;
}

__device__ void write_split(const SteerArguments& g, int row, const RowInputs& in, int split, bool kept, const Merged& m,
                            float normaliser) {
  const float shift = shift_outside(m.mu, g.settings.penalty);
  if (!kept && drops(g)) return fill_split(g, row, split, -INFINITE);
  float z[PER_THREAD];
  load(in.ft, first_token(split), in.vocabulary, z);
  if (kept) {
    float a[PER_THREAD];
    load(in.pre, first_token(split), in.vocabulary, a);
#pragma unroll
    for (int i = 0; i < PER_THREAD; ++i) {
      const Steering s = steering(z[i], a[i], m.row, g.settings.kl_direction);
      z[i] = steered(s.u, s.delta, z[i] >= m.threshold, m.mu, shift) - normaliser;
    }
  } else {
#pragma unroll
    for (int i = 0; i < PER_THREAD; ++i) z[i] = z[i] - m.row.max + shift - normaliser;
  }
  store(out_row(g, row), first_token(split), in.vocabulary, z);
}

__device__ void write_scalars(const SteerArguments& g, int row, const Merged& m, const KeptSums& sums, float normaliser) {
  if (threadIdx.x != 0) return;
  const bool valid = m.row.valid;
  const float nan = valid ? 0.0f : NOT_A_NUMBER;  // added to every result
  if (g.mu_out) g.mu_out[row] = m.mu + nan;
  if (g.count_out) g.count_out[row] = valid ? static_cast<int32_t>(sums.count) : 0;
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
    saved[SAVED_NORMALISER] = normaliser;
    saved[SAVED_MEAN] = m.moments.mean;
  }
}

__device__ float log_total(const KeptSums& sums) { return sums.steered_max + logarithm(sums.steered_total); }

__global__ void __launch_bounds__(THREADS, 4) steer_kernel(SteerArguments g, Scratch scratch) {
  __shared__ Shared shared;
  __shared__ Merged m;
  __shared__ bool last;
  __shared__ RowInputs in;  // one copy, which leaves the registers to the tokens
  const Place at = place(g.rows);
  const RowScratch own = scratch.row(at.row, at.splits);
  if (threadIdx.x == 0) in = row_inputs(g.rows, at.row);
  __syncthreads();
  const Statistics statistics = split_statistics(in, at.split, g.kl_out != nullptr, shared);
  if (threadIdx.x == 0) own.splits[at.split] = statistics;
  if (g.out.data) fill_split(g, at.row, at.split, -INFINITE);
  if (!is_last_of_row(scratch.arrived + at.row, at.splits, last)) return;

  merge_row(g, at.row, own, at.splits, shared, m);
  const bool dense = g.out.data != nullptr;
  for (int split = 0; g.labels && split < at.splits; ++split) {
    if (own.splits[split].max >= m.threshold) moments_of(g, in, own, split, m, shared);
  }
  __syncthreads();
  if (g.labels) add_moments(g, at.row, own, at.splits, in, m, shared);
  for (int split = 0; dense && split < at.splits; ++split) {
    if (own.splits[split].max >= m.threshold) normaliser_of(g, in, own, split, m, shared);
  }
  __syncthreads();
  const KeptSums sums = merge_kept(own, at.splits, m.row, m.threshold, shift_outside(m.mu, g.settings.penalty), shared);
  const float normaliser = dense ? log_total(sums) : 0.0f;
  for (int split = 0; dense && split < at.splits; ++split) {
    if (!m.row.valid) {
      fill_split(g, at.row, split, NOT_A_NUMBER);
    } else if (own.splits[split].max >= m.threshold) {
      write_split(g, at.row, in, split, true, m, normaliser);
    }
  }
  write_scalars(g, at.row, m, sums, normaliser);
}

__global__ void __launch_bounds__(THREADS, 4) statistics_kernel(SteerArguments g, Scratch scratch) {
  __shared__ Shared shared;
  const Place at = place(g.rows);
  const Statistics s = split_statistics(row_inputs(g.rows, at.row), at.split, g.kl_out != nullptr, shared);
  if (threadIdx.x == 0) scratch.row(at.row, at.splits).splits[at.split] = s;
}

__global__ void __launch_bounds__(THREADS, 4) moments_kernel(SteerArguments g, Scratch scratch) {
  __shared__ Shared shared;
  __shared__ Merged m;
  const Place at = place(g.rows);
  const RowScratch own = scratch.row(at.row, at.splits);
  merge_row(g, at.row, own, at.splits, shared, m);
  if (own.splits[at.split].max >= m.threshold) moments_of(g, row_inputs(g.rows, at.row), own, at.split, m, shared);
}

__global__ void __launch_bounds__(THREADS, 4) normaliser_kernel(SteerArguments g, Scratch scratch) {
  __shared__ Shared shared;
  __shared__ Merged m;
  const Place at = place(g.rows);
  const RowScratch own = scratch.row(at.row, at.splits);
  merge_row(g, at.row, own, at.splits, shared, m);
  if (!(own.splits[at.split].max >= m.threshold)) return;
  const RowInputs in = row_inputs(g.rows, at.row);
  if (g.source == Strength::own) add_moments(g, at.row, own, at.splits, in, m, shared);
  normaliser_of(g, in, own, at.split, m, shared);
}

__global__ void __launch_bounds__(THREADS, 4) output_kernel(SteerArguments g, Scratch scratch) {
  __shared__ Shared shared;
  __shared__ Merged m;
  const Place at = place(g.rows);
  const RowScratch own = scratch.row(at.row, at.splits);
  const RowInputs in = row_inputs(g.rows, at.row);
  merge_row(g, at.row, own, at.splits, shared, m);
  if (g.labels) add_moments(g, at.row, own, at.splits, in, m, shared);
  const KeptSums sums = merge_kept(own, at.splits, m.row, m.threshold, shift_outside(m.mu, g.settings.penalty), shared);
  const float normaliser = log_total(sums);
  if (m.row.valid) {
    write_split(g, at.row, in, at.split, own.splits[at.split].max >= m.threshold, m, normaliser);
  } else {
    fill_split(g, at.row, at.split, NOT_A_NUMBER);
  }
  if (at.split == 0) write_scalars(g, at.row, m, sums, normaliser);
}

}  // namespace

size_t scratch_bytes(const Rows& rows) {
  return counter_bytes(rows) + rows.count * splits(rows.vocabulary) * (sizeof(Statistics) + sizeof(KeptSums));
}

void fused_steer(const SteerArguments& g, void* memory, void* stream_) {
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  const Scratch scratch = lay_out(g.rows, memory);
  const bool few_kept = g.settings.penalty == -INFINITE && g.settings.log_alpha > -INFINITE;
  if (few_kept || g.out.data == nullptr) {
    check(cudaMemsetAsync(scratch.arrived, 0, counter_bytes(g.rows), stream));
    return launch(steer_kernel, g, scratch, stream);
  }
  launch(statistics_kernel, g, scratch, stream);
  if (g.labels) launch(moments_kernel, g, scratch, stream);
  launch(normaliser_kernel, g, scratch, stream);
  launch(output_kernel, g, scratch, stream);
}

}  // namespace cuda
}  // namespace svdecode
