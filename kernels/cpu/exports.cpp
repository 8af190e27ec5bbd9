// The C interface of the kernels, for `native_backend.py`. Every function returns DONE, OUTSIDE (an index is outside; `*found` is
// the index) or NO_MEMORY.
#include <new>

#include "kernels.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

enum Result : int64_t { DONE, OUTSIDE, NO_MEMORY };

// torch's `torch_parallel_for` of its stable C interface: runs parts of [begin, end) on torch's threads.
using ParallelFor = int32_t (*)(int64_t begin, int64_t end, int64_t grain, void (*part)(int64_t, int64_t, void*), void* context);

std::atomic<ParallelFor> parallel_for{nullptr};

constexpr int64_t kPieceBytes = 1 << 19;  // torch's threads sleep between calls and take longer to wake than to read this

// Each of torch's threads takes the next piece that no thread has taken: pieces may take unequal times.
struct Queue {
  void (*work)(void* user, size_t index);
  void* user;
  size_t total;
  std::atomic<size_t> next;
};

void start(const void*, void (*work)(void*, size_t), size_t total, void* user) {
  Queue queue{work, user, total, {0}};
  const auto part = [](int64_t, int64_t, void* context) {
    Queue* of = static_cast<Queue*>(context);
    for (size_t i = of->next++; i < of->total; i = of->next++) of->work(of->user, i);
  };
  const ParallelFor on_threads = parallel_for;
  if (on_threads != nullptr) on_threads(0, int64_t(total), 1, part, &queue);
  part(0, 0, &queue);  // whatever is left
}

const Threads kThreads{nullptr, start, kPieceBytes};

template <class Body>
int64_t guarded(Body body) noexcept {
  try {
    return body();
  } catch (const std::bad_alloc&) {
    return NO_MEMORY;
  }
}

bool outside(const Indices& indices, int64_t count, int64_t slots, int64_t* found) {
  const int64_t place = first_outside(indices, count, slots);
  if (place >= 0) *found = indices.read(place);
  return place >= 0;
}

}  // namespace

// The threads of later calls; nullptr: the calling thread only.
EXPORT void memrewrite_use_threads(ParallelFor function) { parallel_for = function; }

EXPORT int64_t memrewrite_lookup(const Lookup* job, int64_t* found) {
  if (outside(job->indices, job->tokens * job->reads, job->slots, found)) return OUTSIDE;
  return guarded([&] { return lookup_cpu(*job, kThreads), DONE; });
}

EXPORT int64_t memrewrite_lookup_dots(const Lookup* job, int64_t* found) {
  if (outside(job->indices, job->tokens * job->reads, job->slots, found)) return OUTSIDE;
  return guarded([&] { return lookup_dots_cpu(*job, kThreads), DONE; });
}

namespace {

bool outside(const Reads& reads, int64_t* found) {
  for (int64_t p = 0; p < reads.count; ++p) {
    const Part& part = reads.parts[p];
    if (outside(part.indices, part.tokens * part.reads, reads.slots, found)) return true;
  }
  return false;
}

}  // namespace

EXPORT int64_t memrewrite_lookup_scatter(const Reads* reads, const Floats* out, int64_t* found) {
  if (outside(*reads, found)) return OUTSIDE;
  return guarded([&] { return lookup_scatter_cpu(*reads, *out, kThreads), DONE; });
}

EXPORT int64_t memrewrite_lookup_rows(const Reads* reads, int64_t* slots, const Floats* out, int64_t rows, int64_t* found) {
  if (outside(*reads, found)) return OUTSIDE;
  return guarded([&] { return lookup_rows_cpu(*reads, slots, *out, rows, kThreads), DONE; });
}

EXPORT int64_t memrewrite_update(const Update* job, int64_t* found) {
  if (outside(job->reads, found)) return OUTSIDE;
  return guarded([&] { return update_cpu(*job, kThreads), DONE; });
}

EXPORT int64_t memrewrite_topk(int64_t type, const void* scores1, const void* scores2, float* scores, int64_t* indices,
                               int64_t rows, int64_t n1, int64_t n2, int64_t k, int64_t softmax) {
  return guarded([&] {
    with_wide_type(Type(type), [&](auto number) {
      using T = decltype(number);
      const T *one = static_cast<const T*>(scores1), *two = static_cast<const T*>(scores2);
      topk_cpu(Topk<T>{one, two, scores, indices, rows, n1, n2, k, softmax != 0}, kThreads);
    });
    return DONE;
  });
}

EXPORT int64_t memrewrite_topk_gradient(const TopkGradient* job, int64_t* found) {
  if (outside({job->indices, true}, job->rows * job->k, job->n1 * job->n2, found)) return OUTSIDE;
  return guarded([&] { return topk_gradient_cpu(*job, kThreads), DONE; });
}
