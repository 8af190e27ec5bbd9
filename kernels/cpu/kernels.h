// The kernels on the CPU: their arguments, which are already checked, and their declarations.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <new>

#include "numbers.h"

enum Type : int64_t { FLOAT32, FLOAT16, BFLOAT16, FLOAT8 };

// Numbers whose type is known at run time.
struct Floats {
  void* data;
  Type type;

  MEMREWRITE_BOTH float read(int64_t i) const {
    switch (type) {
      case FLOAT16:
        return widen(static_cast<const Half*>(data)[i]);
      case BFLOAT16:
        return widen(static_cast<const BFloat16*>(data)[i]);
      case FLOAT8:
        return widen(static_cast<const Float8*>(data)[i]);
      default:
        return static_cast<const float*>(data)[i];
    }
  }
};

template <class T>
constexpr Type type_of = FLOAT32;
template <>
constexpr Type type_of<Half> = FLOAT16;
template <>
constexpr Type type_of<BFloat16> = BFLOAT16;

template <class T>
Floats floats(const T* data) {
  return {const_cast<T*>(data), type_of<T>};
}

// int64 or int32.
struct Indices {
  const void* data;
  int64_t wide;  // a truth value

  MEMREWRITE_BOTH int64_t read(int64_t i) const {
    return wide != 0 ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }
};

// Calls `body` with a number of the type, of 16 bits or more.
template <class Body>
void with_wide_type(Type type, Body body) {
  switch (type) {
    case FLOAT16:
      return body(Half{});
    case BFLOAT16:
      return body(BFloat16{});
    default:
      return body(float{});
  }
}

// The same for every type.
template <class Body>
void with_type(Type type, Body body) {
  return type == FLOAT8 ? body(Float8{}) : with_wide_type(type, body);
}

inline int64_t bytes_of(Type type) { return type == FLOAT32 ? 4 : type == FLOAT8 ? 1 : 2; }

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A runtime's thread pool: `start` calls work(i) for every i below `total`, in any order, and returns when all calls are done.
struct Threads {
  const void* context;
  void (*start)(const void* context, void (*work)(void* user, size_t index), size_t total, void* user);
  int64_t piece_bytes;  // that one task reads at least: waking a thread takes longer than reading less

  // Throws std::bad_alloc if a call does: an exception must not leave a thread of the runtime.
  template <class Work>
  void run(int64_t total, Work work) const {
    struct Call {
      Work* work;
      std::atomic<bool> failed;
    } call{&work, {false}};
    const auto one = [](void* user, size_t index) {
      Call* of = static_cast<Call*>(user);
      try {
        (*of->work)(int64_t(index));
      } catch (const std::bad_alloc&) {
        of->failed = true;
      }
    };
    if (total == 1) {
      one(&call, 0);
    } else if (total > 1) {
      start(context, one, size_t(total), &call);
    }
    if (call.failed) throw std::bad_alloc();
  }
};

// y[t] = sum over j of weights[t, j] * values[indices[t, j]]
struct Lookup {
  Floats values;       // [slots, width]
  Indices indices;     // [tokens, reads]
  Floats weights;      // [tokens, reads]
  const float* scale;  // [slots], of the rows of values; or nullptr
  Floats y;            // [tokens, width]
  int64_t slots, width, tokens, reads;
};

// The number of the first index outside the table, or -1.
int64_t first_outside(const Indices& indices, int64_t count, int64_t slots);

void lookup_cpu(const Lookup& job, const Threads& threads);

// Called once before the first lookup in a table of `bytes` that is not moved afterwards.
void prepare_cpu(const void* table, size_t bytes);

// out[t, j] = grad[t] . values[indices[t, j]], where `grad` is the lookup's `y` and `out` are its `weights`.
void lookup_dots_cpu(const Lookup& job, const Threads& threads);

// The reads of one lookup, with the gradients of its output.
struct Part {
  const void* grad;  // [tokens, width]
  Indices indices;   // [tokens, reads]
  Floats weights;    // [tokens, reads]
  int64_t tokens, reads;
};

// All reads of a table since its last update. There is at least one read.
struct Reads {
  const Part* parts;
  int64_t count;
  Type grad;  // of every part
  int64_t slots, width;
};

// out[n] = sum of weights * grad over all reads of slot n: [slots, width]
void lookup_scatter_cpu(const Reads& reads, const Floats& out, const Threads& threads);

// The same for the slots that are read, in ascending order, which are written to `found`: [rows, width] with `rows` the number
// of reads or of slots, whichever is smaller. The remaining rows repeat the last slot, with zeros.
void lookup_rows_cpu(const Reads& reads, int64_t* found, const Floats& out, int64_t rows, const Threads& threads);

constexpr int64_t kBlock = 128;  // columns of a state in FLOAT8 that share a scale

// A step of row-wise Adagrad; with `square` and `exp_avg`, of row-wise Adam; with `exp_avg` and `exp_avg_sq`, of Adam with one
// second moment per element. The formulas are in `ops.py`.
struct Update {
  Reads reads;
  Floats values;    // [slots, width]
  float* scale;     // [slots], or nullptr
  float* square;    // [slots]: Adagrad's sum, or the mean of squares of row-wise Adam
  Floats exp_avg;   // [slots, width]
  float* exp_avg_scale;     // [slots, blocks], of FLOAT8
  Floats exp_avg_sq;        // [slots, width], of the type of exp_avg
  float* exp_avg_sq_scale;  // [slots, blocks], of FLOAT8
  float lr, eps;
  float keep;              // 1 - lr * weight_decay
  float beta1, rest1;      // rest: 1 - beta
  float beta2, rest2;
  float correct1, correct2;  // 1 - beta^step
  uint64_t seed;             // of the stochastic rounding
};

void update_cpu(const Update& job, const Threads& threads);

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

template <class T>
void topk_cpu(const Topk<T>& job, const Threads& threads);  // as all kernels, throws std::bad_alloc

// Adds the gradient of each score to both halves: grad and indices [rows, k] -> grad1 [rows, n1], grad2 [rows, n2].
struct TopkGradient {
  const float* grad;
  const int64_t* indices;  // below n1 * n2
  float* grad1;
  float* grad2;
  int64_t rows, n1, n2, k;
};

void topk_gradient_cpu(const TopkGradient& job, const Threads& threads);

// One function, compiled for several instruction sets; the dynamic loader chooses the best. Only on platforms that support it.
#if defined(__x86_64__) && defined(__linux__) && defined(__GLIBC__) && defined(__GNUC__) && __GNUC__ >= 12 && \
    !defined(__clang__) && !defined(__SANITIZE_ADDRESS__)
#define MEMREWRITE_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define MEMREWRITE_CLONES
#endif
#define MEMREWRITE_INLINE inline __attribute__((always_inline))
