// The interface between `ops.cpp` and the kernels of each provider: their arguments, which are already checked, and their
// declarations.
#pragma once

#include <cstddef>
#include <cstdint>

#include "numbers.h"

// y[t] = sum over j of weights[t, j] * values[indices[t, j]]
template <class T, class I>
struct Lookup {
  const T* values;   // [slots, width]
  const I* indices;  // [tokens, reads]
  const T* weights;  // [tokens, reads]
  T* y;              // [tokens, width]
  int64_t slots, width, tokens, reads;
};

// The k best sums of one score of each half.
template <class T>
struct Topk {
  const T* scores1;  // [rows, n1]
  const T* scores2;  // [rows, n2]
  float* scores;     // [rows, k]
  int64_t* indices;  // [rows, k]
  int64_t rows, n1, n2, k;
  bool softmax;
};

// An index into a half, and the number of a pair, are stored in 32 bits.
constexpr int64_t kMostScores = INT32_MAX;
constexpr int64_t kMostK = int64_t(1) << 26;  // 1.2e9 pairs
constexpr int64_t kMostKCuda = 1024;          // the most that one block can sort

// A runtime's thread pool: `run` calls work(i) for every i below `total`, in any order, and returns when all calls are done.
struct Threads {
  const void* context;
  void (*start)(const void* context, void (*work)(void* user, size_t index), size_t total, void* user);

  template <class Work>
  void run(size_t total, Work work) const {
    start(context, [](void* user, size_t index) { (*static_cast<Work*>(user))(index); }, total, &work);
  }
};

template <class T, class I>
void lookup_cpu(const Lookup<T, I>& job, const Threads& threads);

// Called once before the first lookup in a table of `bytes` that is not moved afterwards.
void prepare_cpu(const void* table, size_t bytes);

template <class T>
void topk_cpu(const Topk<T>& job, const Threads& threads);  // throws std::bad_alloc

// Launched on a stream; returns nullptr, or CUDA's error message.
template <class T, class I>
const char* lookup_cuda(const Lookup<T, I>& job, void* stream);

template <class T>
const char* topk_cuda(const Topk<T>& job, void* stream);

// The element types of both operators, for explicit instantiation.
#define MEMREWRITE_FOR_TYPES(DO) DO(float) DO(Half) DO(BFloat16)

// One function, compiled for several instruction sets; the dynamic loader chooses the best. Only on platforms that support it.
#if defined(__x86_64__) && defined(__linux__) && defined(__GLIBC__) && defined(__GNUC__) && __GNUC__ >= 12 && \
    !defined(__clang__) && !defined(__SANITIZE_ADDRESS__)
#define MEMREWRITE_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define MEMREWRITE_CLONES
#endif
#define MEMREWRITE_INLINE inline __attribute__((always_inline))
