// steer_topk on a GPU: one launch, the k best tokens of a row, no sort, nothing of size V.
//
// Every block reads its split once; the last block of a row finds the best token of each split that can have one. Then, k
// times, the best of them is taken and replaced by the next one of its split, which is read again: 16 KB from the cache a
// token.
#include "scratch.h"
#include "steered_row.h"

namespace svdecode {
namespace cuda {
namespace {

static_assert(sizeof(Best) <= sizeof(KeptSums), "the best token of a split is kept where its sums would be");

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
  Best* bests = reinterpret_cast<Best*>(own.kept);
  float max = -INFINITE, total = 0.0f;
  bool sound = false, goes_on = false;
  // The first steps find the best token of each split, and g.k more take the best of these. One loop, so that there is one copy
  // of the scan in it: zs of a token must come out the same each time, or a token could be taken twice.
  for (int64_t step = steered.row.valid ? 0 : at.splits; step < at.splits + g.k; ++step) {
    int split = static_cast<int>(step);
    Best last = {INFINITE, -1};  // what comes before all tokens
    if (step < at.splits) {
      if (!is_reachable(own.splits[split], steered)) {
        if (threadIdx.x == 0) bests[split] = {-INFINITE, NO_TOKEN};
        continue;
      }
    } else {
      if (step == at.splits) {
        goes_on = sound = total > 0.0f && total < INFINITE;
        __syncthreads();  // bests of splits without a kept token
      }
      last = {-INFINITE, NO_TOKEN};
      for (int i = threadIdx.x; goes_on && i < at.splits; i += THREADS) {
        if (bests[i].max > last.max) last = bests[i];  // a tie keeps the lower split
      }
      last = block_best(last, shared);
      goes_on = goes_on && last.token != NO_TOKEN;
      if (threadIdx.x == 0) {
        const int64_t out = at.row * g.k + step - at.splits;
        g.tokens_out[out] = goes_on ? last.token : -1;
        g.logprobs_out[out] = goes_on ? last.max - max - logarithm(total) : sound ? -INFINITE : NOT_A_NUMBER;
      }
      if (!goes_on || step + 1 == at.splits + g.k) continue;
      split = last.token / SPLIT;
    }
    float zs[PER_THREAD];
    steered_tokens(in, split, steered, g.settings.kl_direction, zs);
#pragma unroll
    for (int i = 0; i < PER_THREAD; ++i) {
      const bool is_left = zs[i] < last.max || (zs[i] == last.max && first_token(split) + i > last.token);
      zs[i] = is_left || !(zs[i] == zs[i]) ? zs[i] : -INFINITE;
    }
    const Best next = block_best(thread_best(zs, split), shared);
    if (step < at.splits) {
      float sum = 0.0f;
#pragma unroll
      for (int i = 0; i < PER_THREAD; ++i) sum += exponential(zs[i] - finite_or_zero(next.max));
      add_totals(max, total, next.max, block_reduce(sum, shared, Sum()));
    }
    if (threadIdx.x == 0) bests[split] = next;
    __syncthreads();
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
