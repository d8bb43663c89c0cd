// steer_topk on a GPU: one launch, the k best tokens of a row, no sort, nothing of size V.
//
// Every block reads its split once; the last block of a row finds the best token of each split that can have one. Then, k times, the
// best of them is taken and replaced by the next one of its split, which is read again: 16 KB from the cache a token.
#include "scratch.h"
#include "steered_row.h"

namespace svdecode {
namespace cuda {
namespace {

static_assert(sizeof(Best) <= sizeof(KeptSums), "the best token of a split is kept where its sums would be");

// The best token of a split behind `last`, which is {+inf, -1} before the first. One function, never inlined: zs of a token must come
// out the same each time, or a token could be taken twice.
__device__ __noinline__ Best next_best(
    const RowInputs& in, int split, const SteeredRow& steered, Best last, bool kl_direction, float* total, Shared& shared) {
  float zs[PER_THREAD];
  steered_tokens(in, split, steered, kl_direction, zs);
  float behind[PER_THREAD];
#pragma unroll
  for (int i = 0; i < PER_THREAD; ++i) {
    const bool is_behind = zs[i] < last.max || (zs[i] == last.max && first_token(split) + i > last.token);
    behind[i] = is_behind ? zs[i] : -INFINITE;
  }
  const Best best = block_best(thread_best(behind, split), shared);
  if (total != nullptr) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < PER_THREAD; ++i) sum += exponential(zs[i] - finite_or_zero(best.max));
    *total = block_reduce(sum, shared, Sum());
  }
  return best;
}

// Best tokens of all splits, and the normaliser of the row.
__device__ float find_bests(
    const RowInputs& in, const Statistics* splits, int count, const SteeredRow& steered, bool kl_direction, Best* bests,
    Shared& shared) {
  float max = -INFINITE, total = 0.0f;
  for (int split = 0; split < count; ++split) {
    Best best = {-INFINITE, NO_TOKEN};
    if (is_reachable(splits[split], steered)) {
      float sum;
      best = next_best(in, split, steered, {INFINITE, -1}, kl_direction, &sum, shared);
      add_totals(max, total, best.max, sum);
    }
    if (threadIdx.x == 0) bests[split] = best;
  }
  __syncthreads();
  return total > 0.0f && total < INFINITE ? max + logarithm(total) : NOT_A_NUMBER;
}

__global__ void __launch_bounds__(THREADS, 4) topk_kernel(TopkArguments g, Scratch scratch) {
  __shared__ Shared shared;
  __shared__ SteeredRow steered;
  __shared__ bool is_last;
  const Place at = place(g.rows);
  const RowScratch own = scratch.row(at.row, at.splits);
  const RowInputs in = row_inputs(g.rows, at.row);
  const Statistics statistics = split_statistics(in, at.split, false, shared);
  if (threadIdx.x == 0) own.splits[at.split] = statistics;
  if (!is_last_of_row(scratch.arrived + at.row, at.splits, is_last)) return;

  merge_steered(own.splits, at.splits, g.settings, g.mu_rows ? g.mu_rows[at.row] : g.mu, steered, shared);
  const bool kl_direction = g.settings.kl_direction;
  Best* bests = reinterpret_cast<Best*>(own.kept);
  float normaliser = NOT_A_NUMBER;
  if (steered.row.valid) normaliser = find_bests(in, own.splits, at.splits, steered, kl_direction, bests, shared);
  const bool sound = normaliser == normaliser;
  int64_t* tokens = g.tokens_out + at.row * g.k;
  float* logprobs = g.logprobs_out + at.row * g.k;
  bool goes_on = sound;
  for (int64_t i = 0; i < g.k; ++i) {
    Best best = {-INFINITE, NO_TOKEN};
    if (goes_on) {
      for (int split = threadIdx.x; split < at.splits; split += THREADS) {
        if (bests[split].max > best.max) best = bests[split];  // a tie keeps the lower split
      }
      best = block_best(best, shared);
      goes_on = best.token != NO_TOKEN;
    }
    if (threadIdx.x == 0) {
      tokens[i] = goes_on ? best.token : -1;
      logprobs[i] = goes_on ? best.max - normaliser : sound ? -INFINITE : NOT_A_NUMBER;
    }
    if (goes_on && i + 1 < g.k) {
      const int split = best.token / SPLIT;
      const Best next = next_best(in, split, steered, best, kl_direction, nullptr, shared);
      if (threadIdx.x == 0) bests[split] = next;
      __syncthreads();
    }
  }
}

}  // namespace

void steer_topk(const TopkArguments& g, void* memory, void* stream_) {
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  const Scratch scratch = lay_out(g.rows, memory);
  check(cudaMemsetAsync(scratch.arrived, 0, counter_bytes(g.rows), stream));
  launch(topk_kernel, g, scratch, stream);
}

}  // namespace cuda
}  // namespace svdecode
