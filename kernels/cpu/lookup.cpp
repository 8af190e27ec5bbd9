// The lookup: weighted sums of table rows.
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "rows.h"

namespace {

constexpr int64_t kLeastTile = 128;  // a narrower tile has too few cache lines for prefetching
constexpr int64_t kFewUnits = 16;    // with fewer units, threads would be idle: tiles are made smaller
constexpr int64_t kMostPieces = 256;

// Working memory of one thread, reused by later calls.
struct Scratch {
  std::vector<const void*> rows;
  std::vector<float> weights;
};

// Units are tiles of tokens, numbered token by token.
template <class T>
MEMREWRITE_CLONES void units(const Lookup& job, int64_t tile, int64_t tiles, int64_t begin, int64_t end, const void** rows,
                             float* weights) {
  const T* values = static_cast<const T*>(job.values.data);
  float sums[kTile];
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t token = unit / tiles, column = unit % tiles * tile, first = token * job.reads;
    const int64_t width = std::min(tile, job.width - column);
    for (int64_t j = 0; j < job.reads; ++j) {
      const int64_t slot = job.indices.read(first + j);
      rows[j] = values + slot * job.width + column;
      weights[j] = job.weights.read(first + j) * (job.scale == nullptr ? 1.0f : job.scale[slot]);
    }
    int64_t known = job.reads;
    if (unit + 1 < end) {  // the first rows of the next unit, to prefetch them
      const int64_t after = (unit + 1) / tiles * job.reads, its_column = (unit + 1) % tiles * tile;
      const int64_t more = std::min(kRows, job.reads);
      for (int64_t j = 0; j < more; ++j) rows[known++] = values + job.indices.read(after + j) * job.width + its_column;
    }
    sum_rows<T>(rows, weights, job.reads, known, width, sums);
    store(sums, width, job.y, token * job.width + column);
  }
}

template <class I>
MEMREWRITE_CLONES bool all_inside(const I* indices, int64_t count, int64_t slots) {
  bool outside = false;
  for (int64_t i = 0; i < count; ++i) outside |= uint64_t(int64_t(indices[i])) >= uint64_t(slots);
  return !outside;
}

}  // namespace

int64_t first_outside(const Indices& indices, int64_t count, int64_t slots) {
  const bool inside = indices.wide ? all_inside(static_cast<const int64_t*>(indices.data), count, slots)
                                   : all_inside(static_cast<const int32_t*>(indices.data), count, slots);
  if (inside) return -1;
  int64_t i = 0;
  while (uint64_t(indices.read(i)) < uint64_t(slots)) ++i;
  return i;
}

void lookup_cpu(const Lookup& job, const Threads& threads) {
  if (job.tokens * job.width == 0) return;
  if (job.reads == 0) {
    std::fill_n(static_cast<char*>(job.y.data), job.tokens * job.width * bytes_of(job.y.type), '\0');
    return;
  }
  const int64_t row_bytes = (job.reads + 1) * bytes_of(job.values.type);  // that one column of a token reads
  int64_t tile = kTile;
  const bool small = job.tokens * job.width * row_bytes <= threads.piece_bytes;
  while (!small && tile > kLeastTile && job.tokens * ceil_div(job.width, tile) < kFewUnits) tile /= 2;
  const int64_t tiles = ceil_div(job.width, tile), total = job.tokens * tiles;
  const int64_t enough = threads.piece_bytes / (std::min(tile, job.width) * row_bytes);
  const int64_t each = std::max<int64_t>({1, enough, ceil_div(total, kMostPieces)});
  with_type(job.values.type, [&](auto number) {
    using T = decltype(number);
    threads.run(ceil_div(total, each), [&](int64_t piece) {
      thread_local Scratch scratch;
      scratch.rows.resize(size_t(job.reads + kRows));
      scratch.weights.resize(size_t(job.reads));
      const int64_t begin = piece * each, end = std::min(begin + each, total);
      units<T>(job, tile, tiles, begin, end, scratch.rows.data(), scratch.weights.data());
    });
  });
}

// Every row that is read is in another page, and the TLB has few entries: this requests huge pages. If the system has none for
// this memory, for example because the table is mapped from a file, nothing changes.
void prepare_cpu(const void* table, size_t bytes) {
#ifdef __linux__
  constexpr uintptr_t kLargePage = 1 << 21;
  constexpr int kCollapse = 25;  // MADV_COLLAPSE of Linux 6.1, missing in older headers: takes effect immediately
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(table) + kLargePage - 1) / kLargePage * kLargePage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(table) + bytes) / kLargePage * kLargePage;
  if (begin >= end) return;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
  madvise(reinterpret_cast<void*>(begin), end - begin, kCollapse);
#else
  (void)table, (void)bytes;
#endif
}
