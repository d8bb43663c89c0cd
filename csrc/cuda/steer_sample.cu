// steer_sample on a GPU: one launch, one token per row, no sort, nothing of size V.
//
// Every block reads its split once; the last block of a row draws. The tokens that can be drawn are gathered in shared memory,
// in their order, and then sit in registers while top_k and top_p, limits on the cost max(zs) - zs of a token, are found by
// bisection on the bits of a float. If there are more than SPLIT of them, each step walks over the splits again.
#include "scratch.h"
#include "steered_row.h"

namespace svdecode {
namespace cuda {
namespace {

struct Candidates {
  float cost[PER_THREAD];  // +inf where there is none
  int token[PER_THREAD];
};

struct Draw : SteeredRow {
  float top, total;  // steered maximum and normaliser
  int best;          // the lowest token at the maximum
  int gathered;      // tokens in the lists below, or more than SPLIT
  float costs[SPLIT];
  int tokens[SPLIT];
};

// Maximum, normaliser and best token of the row, and the tokens that can be drawn while there is room for them.
__device__ void gather(const SampleArguments& g, const RowInputs& in, const Statistics* splits, int count, Draw& d,
                       Shared& shared) {
  float max = -INFINITE, total = 0.0f;
  int best = NO_TOKEN, gathered = 0;
  for (int split = 0; split < count; ++split) {
    if (!is_reachable(splits[split], d)) continue;
    float zs[PER_THREAD];
    steered_tokens(in, split, d, g.settings.kl_direction, zs);
    const Best here = block_best(thread_best(zs, split), shared);
    if (here.max > max) best = here.token;  // a tie keeps the lower split
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < PER_THREAD; ++i) sum += exponential(zs[i] - finite_or_zero(here.max));
    add_totals(max, total, here.max, block_reduce(sum, shared, Sum()));
    if (g.temperature > 0.0f) {
      int finite = 0;
#pragma unroll
      for (int i = 0; i < PER_THREAD; ++i) finite += zs[i] > -INFINITE;
      float found;
      const float before = block_prefix_sum(static_cast<float>(finite), shared, found) - finite;
      int at = gathered + static_cast<int>(before);
#pragma unroll
      for (int i = 0; i < PER_THREAD; ++i) {
        if (zs[i] == -INFINITE) continue;
        if (at < SPLIT) {
          d.costs[at] = zs[i];
          d.tokens[at] = first_token(split) + i;
        }
        ++at;
      }
      gathered += static_cast<int>(found);
    }
  }
  if (threadIdx.x == 0) {
    d.top = max;
    d.total = total;
    d.best = best;
    d.gathered = gathered;
  }
  __syncthreads();
}

// Walks over the tokens that can be drawn, SPLIT at a time and in their order; the gathered ones are loaded once.
class Walk {
 public:
  __device__ Walk(const SampleArguments& g, const RowInputs& in, const Statistics* splits, int count, const Draw& d)
      : g_(g), in_(in), splits_(splits), d_(d), steps_(d.gathered <= SPLIT ? 1 : count) {
    if (steps_ == 1) load_gathered();
  }

  // body(candidates) for each step until it returns false, which it must do in all threads alike.
  template <class Body>
  __device__ void operator()(const Body& body) {
    for (int step = 0; step < steps_; ++step) {
      if (d_.gathered > SPLIT) {
        if (!is_reachable(splits_[step], d_)) continue;
        load_split(step);
      }
      if (!body(own_)) return;
    }
  }

 private:
  __device__ void load_gathered() {
#pragma unroll
    for (int i = 0; i < PER_THREAD; ++i) {
      const int at = first_token(0) + i;
      own_.cost[i] = at < d_.gathered ? d_.top - d_.costs[at] : INFINITE;
      own_.token[i] = at < d_.gathered ? d_.tokens[at] : NO_TOKEN;
    }
  }
  __device__ void load_split(int split) {
    float zs[PER_THREAD];
    steered_tokens(in_, split, d_, g_.settings.kl_direction, zs);
#pragma unroll
    for (int i = 0; i < PER_THREAD; ++i) {
      own_.cost[i] = zs[i] > -INFINITE ? d_.top - zs[i] : INFINITE;
      own_.token[i] = first_token(split) + i;
    }
  }

  const SampleArguments& g_;
  const RowInputs& in_;
  const Statistics* splits_;
  const Draw& d_;
  const int steps_;
  Candidates own_;
};

// Number (or, with a temperature, mass) of the tokens that cost less than `limit` and at most `kept`.
__device__ float measure_below(Walk& walk, float limit, float kept, float temperature, Shared& shared) {
  float sum = 0.0f;
  walk([&](const Candidates& c) {
#pragma unroll
    for (int i = 0; i < PER_THREAD; ++i) {
      const bool counts = c.cost[i] < limit && c.cost[i] <= kept && c.cost[i] < INFINITE;
      sum += counts ? (temperature > 0.0f ? exponential(-c.cost[i] / temperature) : 1.0f) : 0.0f;
    }
    return true;
  });
  return block_reduce(sum, shared, Sum());
}

// The largest cost below which the measure is less than `wanted`; non-negative floats are ordered as their bits are.
__device__ float largest_cost(Walk& walk, float wanted, float kept, float temperature, Shared& shared) {
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

__device__ int draw_token(const SampleArguments& g, float uniform, Walk& walk, Shared& shared) {
  float kept = INFINITE;
  if (g.top_k > 0) kept = largest_cost(walk, static_cast<float>(g.top_k), INFINITE, 0.0f, shared);
  if (g.top_p < 1.0f) {
    const float wanted = g.top_p * measure_below(walk, INFINITE, kept, g.temperature, shared);
    kept = smaller(kept, largest_cost(walk, wanted, kept, g.temperature, shared));
  }
  const float target = uniform * measure_below(walk, INFINITE, kept, g.temperature, shared);
  float before = 0.0f, last = -1.0f, chosen = 0x1p30f;
  walk([&](const Candidates& c) {
    float weight[PER_THREAD], own = 0.0f;
#pragma unroll
    for (int i = 0; i < PER_THREAD; ++i) {
      weight[i] = c.cost[i] <= kept && c.cost[i] < INFINITE ? exponential(-c.cost[i] / g.temperature) : 0.0f;
      own += weight[i];
    }
    float sum;
    float reached = before + (block_prefix_sum(own, shared, sum) - own);
#pragma unroll
    for (int i = 0; i < PER_THREAD; ++i) {
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

__global__ void __launch_bounds__(THREADS, 4) sample_kernel(SampleArguments g, Scratch scratch) {
  __shared__ Shared shared;
  __shared__ Draw d;
  __shared__ bool is_last;
  const Place at = place(g.rows);
  const RowScratch own = scratch.row(at.row, at.splits);
  const RowInputs in = row_inputs(g.rows, at.row);
  const Statistics statistics = split_statistics(in, at.split, false, shared);
  if (threadIdx.x == 0) own.splits[at.split] = statistics;
  if (!is_last_of_row(scratch.arrived + at.row, at.splits, is_last)) return;

  merge_steered(own.splits, at.splits, g.settings, g.mu_rows ? g.mu_rows[at.row] : g.mu, d, shared);
  int token = NO_TOKEN;
  if (d.row.valid) {
    gather(g, in, own.splits, at.splits, d, shared);
    token = d.best;
    if (g.temperature > 0.0f && token != NO_TOKEN) {
      Walk walk(g, in, own.splits, at.splits, d);
      token = draw_token(g, g.uniform[at.row], walk, shared);
    }
  }
  if (threadIdx.x != 0) return;
  float logprob = NOT_A_NUMBER;
  if (token >= 0 && token < g.rows.vocabulary) {
    const float z = load_one(in.ft, token);
    const Steering s = steering(z, load_one(in.pre, token), d.row, g.settings.kl_direction);
    logprob = steered(s.u, s.delta, z >= d.threshold, d.mu, d.shift) - d.top - logarithm(d.total);
  }
  g.tokens_out[at.row] = logprob == logprob ? token : -1;
  g.logprobs_out[at.row] = logprob;
}

}  // namespace

void steer_sample(const SampleArguments& g, void* memory, void* stream_) {
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  const Scratch scratch = lay_out(g.rows, memory);
  check(cudaMemsetAsync(scratch.arrived, 0, counter_bytes(g.rows), stream));
  launch(sample_kernel, g, scratch, stream);
}

}  // namespace cuda
}  // namespace svdecode
