// steer_topk on a GPU: one launch, the k best tokens of a row, no sort, nothing of size V.
//
// Every warp reads its tile once; the last block of a row finds the best token of each tile that can have one. Then, k times,
// the best of them is taken and replaced by the next one of its tile, which is read again: 2 KB from the cache a token.
#include "first_pass.h"

namespace svdecode {
namespace cuda {
namespace {

static_assert(sizeof(Best) <= sizeof(KeptPiece), "the best token of a tile is kept where its sums would be");

// The best of a tile's tokens that come after `last`, by one warp; their normaliser is added too.
template <Dtype D>
__device__ Best best_after(const Best& last, const TopkArguments& g, const Inputs<D>& in, int tile, const Merged& m,
                           Normaliser& normaliser) {
  Best best;
  for (int chunk = 0; chunk < CHUNKS; ++chunk) {
    float zs[PER_LANE];
    chunk_zs(in, tile, chunk, m, g.settings.kl_direction, zs);
    const int first = first_token(tile, chunk);
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i) {
      const bool is_gone = zs[i] > last.max || (zs[i] == last.max && first + i <= last.token);
      zs[i] = is_gone ? -INFINITE : zs[i];
    }
    add_chunk(normaliser, best, zs, first);
  }
  return best;
}

template <int DTYPE>
__global__ void __launch_bounds__(THREADS, 3) topk_kernel(TopkArguments g, Scratch scratch) {
  constexpr Dtype D = static_cast<Dtype>(DTYPE);
  __shared__ Shared shared;
  __shared__ Merged m;
  __shared__ bool is_last_block;
  const Place at = place(g.rows);
  if (!at.exists) return;
  const RowScratch own = scratch.row(at.row, at.tiles);
  const auto in = row_inputs<D>(g.rows, at.row);
  first_pass(in, at, own, false, nullptr);
  if (!is_last(own.arrived, at.splits, is_last_block)) return;

  merge_steered(g, at, own, m, shared);
  Best* const bests = reinterpret_cast<Best*>(own.kept);  // in the order of the list
  const int listed = m.row.valid ? m.listed : 0;
  Normaliser normaliser;
  for (int i = warp_index(); i < listed; i += WARPS) {
    Best none;
    none.max = INFINITE;
    none.token = -1;
    const Best best = best_after(none, g, in, own.list[i], m, normaliser);
    if (lane_index() == 0) bests[i] = best;
  }
  __syncthreads();
  normaliser = merge_normalisers(normaliser, shared);
  const bool sound = normaliser.total > 0.0f && normaliser.total < INFINITE;
  bool goes_on = sound;
  for (int64_t k = 0; k < g.k; ++k) {
    Best best;
    int place = 0;  // in the list
    for (int i = threadIdx.x; goes_on && i < listed; i += THREADS) keep_better(best, bests[i].max, bests[i].token);
    best = block_best(best, shared);
    goes_on = goes_on && best.token != NO_TOKEN;
    if (threadIdx.x == 0) {
      const int64_t out = at.row * g.k + k;
      g.tokens_out[out] = goes_on ? best.token : -1;
      g.logprobs_out[out] = goes_on ? best.max - log_total(normaliser) : sound ? -INFINITE : NOT_A_NUMBER;
    }
    if (!goes_on) continue;
    // The warp whose thread has the tile in its share replaces it.
    const int tile = best.token / TILE;
    for (int begin = 0; begin < listed; begin += THREADS) {
      place = begin + static_cast<int>(threadIdx.x);
      const unsigned found = __ballot_sync(ALL_LANES, place < listed && own.list[place] == tile);
      if (found == 0) continue;
      Normaliser unused;
      const Best next = best_after(best, g, in, tile, m, unused);
      if (lane_index() == 0) bests[begin + warp_index() * WARP + __ffs(static_cast<int>(found)) - 1] = next;
    }
    __syncthreads();
  }
}

}  // namespace

void steer_topk(const TopkArguments& g, void* memory, void* stream_) {
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  const Scratch scratch = lay_out(g.rows, memory);
  check(cudaMemsetAsync(scratch.arrived, 0, counter_bytes(g.rows), stream));
  with_dtype(g.rows, [&](auto dtype) { launch(topk_kernel<static_cast<int>(decltype(dtype)::value)>, g, scratch, stream); });
}

}  // namespace cuda
}  // namespace svdecode
