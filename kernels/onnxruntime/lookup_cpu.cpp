// SparseLookup on the CPU: a few rows at a time are added to a token's sums, which stay in the L1 cache, while the next rows
// are prefetched line by line, since random rows of a large table are not in a cache.
#include <algorithm>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "kernels.h"

namespace {

constexpr int64_t kTile = 1024;           // columns summed at once, at most: 4 KiB of sums
constexpr int64_t kLeastTile = 128;       // a narrower tile has too few cache lines for prefetching
constexpr int64_t kFewUnits = 16;         // with fewer units, threads would be idle: tiles are made smaller
constexpr int64_t kRows = 4;              // added at once, so that a sum is loaded and stored once for them
constexpr int64_t kLine = 64;             // bytes of a cache line
constexpr int64_t kPieceBytes = 1 << 15;  // read by one task at least: waking a thread takes longer than reading less
constexpr int64_t kMostPieces = 256;

// Adds R rows, from read number `at` on, to the sums of `width` columns, in order, and prefetches the R rows after them
// (before `end`).
template <int R, class T, class I>
MEMREWRITE_INLINE void add_rows(const Lookup<T, I>& job, int64_t at, int64_t end, int64_t column, int64_t width, float* sums) {
  constexpr int64_t kStep = kLine / int64_t(sizeof(T));
  const T* rows[R];
  const T* next[R];
  float weights[R];
  for (int r = 0; r < R; ++r) {
    rows[r] = job.values + int64_t(job.indices[at + r]) * job.width + column;
    next[r] = job.values + int64_t(job.indices[std::min(at + R + r, end - 1)]) * job.width + column;
    weights[r] = widen(job.weights[at + r]);
  }
  int64_t c = 0;
  for (; c + kStep <= width; c += kStep) {
    for (int r = 0; r < R; ++r) __builtin_prefetch(next[r] + c);
    float line[kStep];
    for (int64_t i = 0; i < kStep; ++i) line[i] = sums[c + i];
    for (int r = 0; r < R; ++r) {
      for (int64_t i = 0; i < kStep; ++i) line[i] += weights[r] * widen(rows[r][c + i]);
    }
    for (int64_t i = 0; i < kStep; ++i) sums[c + i] = line[i];
  }
  for (; c < width; ++c) {
    for (int r = 0; r < R; ++r) sums[c] += weights[r] * widen(rows[r][c]);
  }
}

// Units are tiles of tokens, numbered token by token.
template <class T, class I>
MEMREWRITE_CLONES void units(const Lookup<T, I>& job, int64_t tile, int64_t tiles, int64_t begin, int64_t end) {
  float sums[kTile];
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t token = unit / tiles, column = unit % tiles * tile;
    const int64_t width = std::min(tile, job.width - column);
    const int64_t first = token * job.reads, last = first + job.reads;
    const int64_t known = tiles == 1 ? job.tokens * job.reads : last;  // end of the reads to prefetch: also the next token's
    std::fill(sums, sums + width, 0.0f);
    int64_t at = first;
    for (; at + kRows <= last; at += kRows) add_rows<kRows>(job, at, known, column, width, sums);
    for (; at < last; ++at) add_rows<1>(job, at, known, column, width, sums);
    T* y = job.y + token * job.width + column;
    for (int64_t c = 0; c < width; ++c) narrow(sums[c], y + c);
  }
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

template <class T, class I>
void lookup_cpu(const Lookup<T, I>& job, const Threads& threads) {
  int64_t tile = kTile;
  while (tile > kLeastTile && job.tokens * ceil_div(job.width, tile) < kFewUnits) tile /= 2;
  const int64_t tiles = ceil_div(job.width, tile), total = job.tokens * tiles;
  if (total == 0) return;
  const int64_t bytes = (job.reads + 1) * std::min(tile, job.width) * int64_t(sizeof(T));  // of one unit
  const int64_t each = std::max<int64_t>({1, kPieceBytes / bytes, ceil_div(total, kMostPieces)});
  threads.run(size_t(ceil_div(total, each)), [&](size_t piece) {
    const int64_t begin = int64_t(piece) * each;
    units(job, tile, tiles, begin, std::min(begin + each, total));
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

#define INSTANTIATE(T)                                                 \
  template void lookup_cpu(const Lookup<T, int64_t>&, const Threads&); \
  template void lookup_cpu(const Lookup<T, int32_t>&, const Threads&);
MEMREWRITE_FOR_TYPES(INSTANTIATE)
