// Enough of CUDA to run the kernels of csrc/cuda on the host, compiled by g++: a test bed, not a fast path.
//
// Blocks run one after another, forwards, backwards or shuffled (SVDECODE_EMULATION_ORDER=forward|reverse|random), so a result
// that depends on their order shows. The threads of a block are fibers that run until they meet a barrier or a warp shuffle,
// and warps run ahead of one another as far as barriers let them, so a missing barrier shows as a wrong number. Threads that
// wait at different barriers, or at one that others have left the kernel without, abort the process with a message.
#pragma once

#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <math.h>

#include <functional>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __noinline__ __attribute__((noinline))
#define __shared__ static
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct uint4 {
  uint32_t x, y, z, w;
};
struct float4 {
  float x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace emulation {

constexpr int WARP = 32;
constexpr size_t STACK = size_t{1} << 17;

[[noreturn]] inline void fail(const char* what) {
  fprintf(stderr, "CUDA emulation: %s\n", what);
  abort();
}

struct Fiber {
  enum State { ready, at_block_barrier, at_warp_barrier, done } state = ready;
  int line = 0;    // of the block barrier
  int parity = 0;  // which half of the shuffle slots comes next
  bool started = false;
  ucontext_t context;
  jmp_buf resume;
  std::vector<char> stack = std::vector<char>(STACK);
};

// One block at a time.
class Block {
 public:
  static Block& current() {
    static Block block;
    return block;
  }

  void run(dim3 index, dim3 grid, int threads, const std::function<void()>& kernel) {
    block_index = index;
    grid_size = grid;
    kernel_ = &kernel;
    if (static_cast<int>(fibers_.size()) < threads) fibers_ = std::vector<Fiber>(threads);
    threads_ = threads;
    slots_.assign(2 * threads, 0);
    for (int t = 0; t < threads; ++t) {
      fibers_[t].state = Fiber::ready;
      fibers_[t].started = false;
      fibers_[t].parity = 0;
    }
    // A warp runs ahead as far as it can, to the next block barrier, before another starts: what it then overwrites too early,
    // or the other reads too early, shows. Which warp is first changes from barrier to barrier.
    const int warps = threads / WARP;
    for (unsigned round = 0;; ++round) {
      for (int i = 0; i < warps; ++i) {
        const int in_order = round % 2 ? warps - 1 - i : i;
        run_warp(static_cast<int>((in_order + 3 * round) % warps) * WARP, round);
      }
      if (release()) return;
    }
  }

  void block_barrier(int line) {
    fibers_[thread].line = line;
    wait(Fiber::at_block_barrier);
  }

  // The 32-bit value that another lane of the warp offers at the same shuffle.
  uint32_t shuffle(uint32_t value, int lane) {
    Fiber& fiber = fibers_[thread];
    uint32_t* half = slots_.data() + threads_ * fiber.parity;
    fiber.parity ^= 1;
    half[thread] = value;
    const int from = thread / WARP * WARP + lane;
    wait(Fiber::at_warp_barrier);
    return half[from];
  }

  // The bits that the lanes of the warp offer at the same vote.
  uint32_t ballot(bool bit) {
    const int first = thread / WARP * WARP;
    const uint32_t* half = slots_.data() + threads_ * fibers_[thread].parity;
    shuffle(bit, 0);
    uint32_t bits = 0;
    for (int lane = 0; lane < WARP; ++lane) bits |= half[first + lane] << lane;
    return bits;
  }

  int thread = 0;
  dim3 block_index, grid_size;

 private:
  static void enter() {
    Block& block = current();
    (*block.kernel_)();
    block.fibers_[block.thread].state = Fiber::done;
    _longjmp(block.scheduler_, 1);
  }

  void step(int t) {
    thread = t;
    Fiber& fiber = fibers_[t];
    if (_setjmp(scheduler_) != 0) return;
    if (fiber.started) _longjmp(fiber.resume, 1);
    fiber.started = true;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
    setcontext(&fiber.context);
  }

  void wait(Fiber::State at) {
    Fiber& fiber = fibers_[thread];
    fiber.state = at;
    if (_setjmp(fiber.resume) == 0) _longjmp(scheduler_, 1);
  }

  // Run the lanes of a warp from shuffle to shuffle, until all wait at a block barrier or are done.
  void run_warp(int first, unsigned round) {
    for (;;) {
      int at_shuffle = 0;
      for (int i = 0; i < WARP; ++i) {
        const int t = first + (round % 2 ? WARP - 1 - i : i);
        if (fibers_[t].state == Fiber::ready) step(t);
        at_shuffle += fibers_[t].state == Fiber::at_warp_barrier;
      }
      if (at_shuffle == 0) return;
      if (at_shuffle != WARP) fail("some lanes of a warp are missing from a shuffle");
      for (int t = first; t < first + WARP; ++t) fibers_[t].state = Fiber::ready;
    }
  }

  // Open the block barrier that all threads have reached; true when all are done instead.
  bool release() {
    int done = 0;
    for (int t = 0; t < threads_; ++t) done += fibers_[t].state == Fiber::done;
    if (done == threads_) return true;
    if (done > 0) fail("some threads of a block wait at a __syncthreads that others never reach");
    for (int t = 0; t < threads_; ++t) {
      if (fibers_[t].line != fibers_[0].line) fail("threads of a block wait at different __syncthreads");
      fibers_[t].state = Fiber::ready;
    }
    return false;
  }

  const std::function<void()>* kernel_ = nullptr;
  int threads_ = 0;
  std::vector<Fiber> fibers_;
  std::vector<uint32_t> slots_;
  jmp_buf scheduler_;
};

struct ThreadIndex {
  struct X {
    operator unsigned() const { return static_cast<unsigned>(Block::current().thread); }
  } x;
};
// A member of the block that is running.
template <dim3 Block::* FIELD, unsigned dim3::* AXIS>
struct Coordinate {
  operator unsigned() const { return Block::current().*FIELD.*AXIS; }
};
template <dim3 Block::* FIELD>
struct Coordinates {
  Coordinate<FIELD, &dim3::x> x;
  Coordinate<FIELD, &dim3::y> y;
  Coordinate<FIELD, &dim3::z> z;
};

// Run all blocks of a grid.
inline void launch(dim3 grid, int threads, const std::function<void()>& kernel) {
  const unsigned blocks = grid.x * grid.y * grid.z;
  std::vector<unsigned> order(blocks);
  for (unsigned b = 0; b < blocks; ++b) order[b] = b;
  const char* wanted = getenv("SVDECODE_EMULATION_ORDER");
  if (wanted && strcmp(wanted, "reverse") == 0) {
    for (unsigned b = 0; b < blocks; ++b) order[b] = blocks - 1 - b;
  } else if (wanted && strcmp(wanted, "random") == 0) {
    std::mt19937 random(blocks);
    for (unsigned b = blocks; b > 1; --b) std::swap(order[b - 1], order[random() % b]);
  }
  for (const unsigned b : order) {
    Block::current().run(dim3(b % grid.x, b / grid.x % grid.y, b / grid.x / grid.y), grid, threads, kernel);
  }
}

}  // namespace emulation

static const emulation::ThreadIndex threadIdx;
static const emulation::Coordinates<&emulation::Block::block_index> blockIdx;
static const emulation::Coordinates<&emulation::Block::grid_size> gridDim;

#define __syncthreads() emulation::Block::current().block_barrier(__LINE__)
inline void __threadfence() {}

inline float __uint_as_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}
inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float __shfl_xor_sync(uint32_t, float x, int mask) {
  const int lane = emulation::Block::current().thread % emulation::WARP;
  return __uint_as_float(emulation::Block::current().shuffle(__float_as_uint(x), lane ^ mask));
}
inline int __shfl_xor_sync(uint32_t, int x, int mask) {
  const int lane = emulation::Block::current().thread % emulation::WARP;
  return static_cast<int>(emulation::Block::current().shuffle(static_cast<uint32_t>(x), lane ^ mask));
}
inline float __shfl_sync(uint32_t, float x, int lane) {
  return __uint_as_float(emulation::Block::current().shuffle(__float_as_uint(x), lane));
}
inline unsigned __ballot_sync(uint32_t, bool bit) { return emulation::Block::current().ballot(bit); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
inline float __shfl_up_sync(uint32_t, float x, int offset) {
  const int lane = emulation::Block::current().thread % emulation::WARP;
  return __uint_as_float(emulation::Block::current().shuffle(__float_as_uint(x), lane >= offset ? lane - offset : lane));
}

inline uint4 __ldg(const uint4* from) {
  if (reinterpret_cast<uintptr_t>(from) % 16 != 0) emulation::fail("a 16-byte load from a misaligned address");
  return *from;
}
inline unsigned atomicAdd(unsigned* counter, unsigned value) {
  const unsigned before = *counter;
  *counter += value;
  return before;
}

struct BFloat16Bits {
  uint16_t bits;
};
struct HalfBits {
  uint16_t bits;
};
inline BFloat16Bits __ushort_as_bfloat16(uint16_t bits) { return {bits}; }
inline HalfBits __ushort_as_half(uint16_t bits) { return {bits}; }
inline float __bfloat162float(BFloat16Bits x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
inline float __half2float(HalfBits x) {
  const float magnitude = __uint_as_float(static_cast<uint32_t>(x.bits & 0x7FFF) << 13) * 0x1p112f;
  const uint32_t special = (x.bits & 0x7C00) == 0x7C00 ? 0x7F800000u : 0u;
  return __uint_as_float(__float_as_uint(magnitude) | special | static_cast<uint32_t>(x.bits & 0x8000) << 16);
}

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
inline const char* cudaGetErrorString(cudaError_t) { return ""; }
inline cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
  memset(memory, value, bytes);
  return cudaSuccess;
}
