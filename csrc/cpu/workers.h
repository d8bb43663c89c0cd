// Threads and memory of the CPU operators.
#pragma once

#include <stdlib.h>

#include "../arguments.h"
#include "../maths.h"

namespace svdecode {
namespace SVDECODE_TARGET {

constexpr int TILE = 2048;              // tokens whose sums are kept together
constexpr int64_t TASK_TOKENS = 16384;  // less than this is not worth waking a thread for

// Threads: the shares of [0, count) run on torch's pool, or here where there is one thread.
class Workers {
 public:
  Workers(ParallelFor parallel_for, int threads) : parallel_for_(parallel_for), threads_(threads) {}
  static Workers one() { return Workers(nullptr, 1); }
  int threads() const { return threads_; }

  template <class Body>
  void run(int64_t count, int64_t grain, const Body& body) const {
    if (threads_ == 1 || count <= grain) {
      if (count > 0) body(int64_t{0}, count);
      return;
    }
    parallel_for_(
        0, count, grain, [](int64_t begin, int64_t end, void* f) { (*static_cast<const Body*>(f))(begin, end); },
        const_cast<void*>(static_cast<const void*>(&body)));
  }

  // body(begin, end) over tiles, `busy` of which are work; a few are not worth waking a thread for.
  template <class Body>
  void tiles(int64_t count, int64_t busy, const Body& body) const {
    const int64_t grain = TASK_TOKENS / TILE;
    run(count, busy < 2 * grain ? count : grain, body);
  }

  // body(row, workers for inside): rows are shared out where they keep all threads busy, else the tiles inside each.
  template <class Body>
  void rows(const Rows& rows, const Body& body) const {
    const bool balanced = rows.count % threads_ == 0 || rows.count >= 8 * threads_;
    if (balanced || rows.vocabulary < TASK_TOKENS) {
      const int64_t grain = 1 + (TASK_TOKENS - 1) / rows.vocabulary;
      run(rows.count, grain, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) body(row, one());
      });
    } else {
      for (int64_t row = 0; row < rows.count; ++row) body(row, *this);
    }
  }

 private:
  ParallelFor parallel_for_;
  int threads_;
};

// Uninitialised or zeroed memory of one row's work, trivially constructible types only. Not std::vector: its members would be
// compiled for one instruction set and linked into the code of another.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count) : data_(static_cast<T*>(calloc(count ? count : 1, sizeof(T)))) {
    if (data_ == nullptr) abort();
  }
  ~Scratch() { free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T& operator[](int64_t i) { return data_[i]; }
  T* get() { return data_; }

 private:
  T* data_;
};

}  // namespace SVDECODE_TARGET
}  // namespace svdecode
