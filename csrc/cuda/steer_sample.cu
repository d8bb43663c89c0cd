// steer_sample on a GPU: one launch, one token per row, no sort, nothing of size V.
//
// Every warp reads its tile once; the last block of a row draws. The tokens that can be drawn are gathered in shared memory, in
// their order, and then sit in registers while top_k and top_p, limits on the cost max(zs) - zs of a token, are found by
// bisection on the bits of a float. If there are more than GATHERED of them, each step walks over the tiles again.
#include "first_pass.h"

namespace svdecode {
namespace cuda {
namespace {

constexpr int GATHERED = THREADS * PER_LANE;

struct Candidates {
  float cost[PER_LANE];  // +inf where there is none
  int token[PER_LANE];
};

struct Draw {
  Merged row;
  Normaliser normaliser;  // of the steered row
  int best;               // the lowest token at the maximum
  int gathered;           // tokens in the lists below, or more than GATHERED
  float costs[GATHERED];
  int tokens[GATHERED];
};

// The chunks of the row's list, a chunk for each warp in each step: their tokens come in the order of the threads.
struct Chunks {
  const int* list;
  int count;

  __device__ int steps() const { return (count + WARPS - 1) / WARPS; }
  __device__ int own(int step) const { return step * WARPS + warp_index(); }
  __device__ bool holds(int index) const { return index < count; }
  __device__ int tile(int index) const { return list[index / CHUNKS]; }
  __device__ int chunk(int index) const { return index % CHUNKS; }
};

// Maximum, normaliser and best token of the row, and the tokens that can be drawn while there is room for them.
template <Dtype D>
__device__ void gather(const SampleArguments& g, const Inputs<D>& in, const Chunks& chunks, Draw& d, Shared& shared) {
  Normaliser own;
  Best best;
  int gathered = 0;
  for (int step = 0; step < chunks.steps(); ++step) {
    const int index = chunks.own(step);
    float zs[PER_LANE];
    int first = 0, finite = 0;
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i) zs[i] = -INFINITE;
    if (chunks.holds(index)) {
      first = first_token(chunks.tile(index), chunks.chunk(index));
      chunk_zs(in, chunks.tile(index), chunks.chunk(index), d.row, g.settings.kl_direction, zs);
      add_chunk(own, best, zs, first);
    }
    if (!(g.temperature > 0.0f)) continue;
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i) finite += zs[i] > -INFINITE;
    float found;
    const float before = block_prefix_sum(static_cast<float>(finite), shared, found) - finite;
    int at = gathered + static_cast<int>(before);
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i) {
      if (!(zs[i] > -INFINITE)) continue;
      if (at < GATHERED) {
        d.costs[at] = zs[i];
        d.tokens[at] = first + i;
      }
      ++at;
    }
    gathered += static_cast<int>(found);
  }
  best = block_best(best, shared);
  own = merge_normalisers(own, shared);
  if (threadIdx.x == 0) {
    d.normaliser = own;
    d.best = best.token;
    d.gathered = gathered;
  }
  __syncthreads();
}

// Walks over the tokens that can be drawn, GATHERED at a time and in their order; the gathered ones are loaded once.
template <Dtype D>
class Walk {
 public:
  __device__ Walk(const Inputs<D>& in, const Chunks& chunks, const Draw& d, bool kl_direction)
      : in_(in), chunks_(chunks), d_(d), kl_direction_(kl_direction), steps_(d.gathered <= GATHERED ? 1 : chunks.steps()) {
    if (d.gathered <= GATHERED) load_gathered();
  }

  // body(candidates) for each step until it returns false, which it must do in all threads alike.
  template <class Body>
  __device__ void operator()(const Body& body) {
    for (int step = 0; step < steps_; ++step) {
      if (d_.gathered > GATHERED) load_chunk(chunks_.own(step));
      if (!body(own_)) return;
    }
  }

 private:
  __device__ void load_gathered() {
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i) {
      const int at = static_cast<int>(threadIdx.x) * PER_LANE + i;
      own_.cost[i] = at < d_.gathered ? d_.normaliser.max - d_.costs[at] : INFINITE;
      own_.token[i] = at < d_.gathered ? d_.tokens[at] : NO_TOKEN;
    }
  }
  __device__ void load_chunk(int index) {
    float zs[PER_LANE];
    int first = 0;
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i) zs[i] = -INFINITE;
    if (chunks_.holds(index)) {
      first = first_token(chunks_.tile(index), chunks_.chunk(index));
      chunk_zs(in_, chunks_.tile(index), chunks_.chunk(index), d_.row, kl_direction_, zs);
    }
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i) {
      own_.cost[i] = zs[i] > -INFINITE ? d_.normaliser.max - zs[i] : INFINITE;
      own_.token[i] = first + i;
    }
  }

  const Inputs<D>& in_;
  const Chunks& chunks_;
  const Draw& d_;
  const bool kl_direction_;
  const int steps_;
  Candidates own_;
};

// Number (or, with a temperature, mass) of the tokens that cost less than `limit` and at most `kept`.
template <class Walker>
__device__ float measure_below(Walker& walk, float limit, float kept, float temperature, Shared& shared) {
  float sum = 0.0f;
  walk([&](const Candidates& c) {
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i) {
      const bool counts = c.cost[i] < limit && c.cost[i] <= kept && c.cost[i] < INFINITE;
      sum += counts ? (temperature > 0.0f ? exponential(-c.cost[i] / temperature) : 1.0f) : 0.0f;
    }
    return true;
  });
  return block_reduce(sum, shared, Sum());
}

// The largest cost below which the measure is less than `wanted`; non-negative floats are ordered as their bits are.
template <class Walker>
__device__ float largest_cost(Walker& walk, float wanted, float kept, float temperature, Shared& shared) {
  unsigned low = 0, high = 0x7F800000u;
  while (low < high) {
    const unsigned middle = low + (high - low + 1) / 2;
    if (measure_below(walk, __uint_as_float(middle), kept, temperature, shared) < wanted) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return __uint_as_float(low);
}

template <class Walker>
__device__ int draw_token(const SampleArguments& g, float uniform, Walker& walk, Shared& shared) {
  float kept = INFINITE;
  if (g.top_k > 0) kept = largest_cost(walk, static_cast<float>(g.top_k), INFINITE, 0.0f, shared);
  if (g.top_p < 1.0f) {
    const float wanted = g.top_p * measure_below(walk, INFINITE, kept, g.temperature, shared);
    kept = smaller(kept, largest_cost(walk, wanted, kept, g.temperature, shared));
  }
  const float target = uniform * measure_below(walk, INFINITE, kept, g.temperature, shared);
  float before = 0.0f, last = -1.0f, chosen = 0x1p30f;
  walk([&](const Candidates& c) {
    float weight[PER_LANE], own = 0.0f;
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i) {
      weight[i] = c.cost[i] <= kept && c.cost[i] < INFINITE ? exponential(-c.cost[i] / g.temperature) : 0.0f;
      own += weight[i];
    }
    float sum;
    float reached = before + (block_prefix_sum(own, shared, sum) - own);
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i) {
      reached += weight[i];
      if (weight[i] > 0.0f) last = larger(last, static_cast<float>(c.token[i]));
      if (weight[i] > 0.0f && reached > target) chosen = smaller(chosen, static_cast<float>(c.token[i]));
    }
    before += sum;
    chosen = -block_reduce(-chosen, shared, Max());
    return chosen == 0x1p30f;
  });
  last = block_reduce(last, shared, Max());
  return static_cast<int>(chosen < 0x1p30f ? chosen : last);  // rounding may leave the target above the whole mass
}

template <int DTYPE>
__global__ void __launch_bounds__(THREADS, 3) sample_kernel(SampleArguments g, Scratch scratch) {
  constexpr Dtype D = static_cast<Dtype>(DTYPE);
  __shared__ Shared shared;
  __shared__ Draw d;
  __shared__ bool last;
  const Place at = place(g.rows);
  if (!at.exists) return;
  const RowScratch own = scratch.row(at.row, at.tiles);
  const auto in = row_inputs<D>(g.rows, at.row);
  first_pass(in, at, own, false, nullptr);
  if (!is_last(own.arrived, at.splits, last)) return;

  merge_steered(g, at, own, d.row, shared);
  int token = NO_TOKEN;
  if (d.row.row.valid) {
    const Chunks chunks = {own.list, CHUNKS * d.row.listed};
    gather(g, in, chunks, d, shared);
    token = d.best;
    if (g.temperature > 0.0f && token != NO_TOKEN) {
      Walk<D> walk(in, chunks, d, g.settings.kl_direction);
      token = draw_token(g, g.uniform[at.row], walk, shared);
    }
  }
  if (threadIdx.x != 0) return;
  float logprob = NOT_A_NUMBER;
  if (token >= 0 && token < in.vocabulary) {
    logprob = token_zs(in.ft[token], in.pre[token], d.row, g.settings.kl_direction) - log_total(d.normaliser);
  }
  g.tokens_out[at.row] = logprob == logprob ? token : -1;
  g.logprobs_out[at.row] = logprob;
}

}  // namespace

void steer_sample(const SampleArguments& g, void* memory, void* stream_) {
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  const Scratch scratch = lay_out(g.rows, memory);
  check(cudaMemsetAsync(scratch.arrived, 0, counter_bytes(g.rows), stream));
  with_dtype(g.rows, [&](auto dtype) { launch(sample_kernel<static_cast<int>(decltype(dtype)::value)>, g, scratch, stream); });
}

}  // namespace cuda
}  // namespace svdecode
