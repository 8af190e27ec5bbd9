// SparseLookup on the CPU: a tile of columns is summed over a token's rows in registers, while rows further on are fetched.
#include <algorithm>

#include "kernels.h"

namespace {

constexpr int64_t kTile = 128;            // columns summed at once: fills the registers of AVX2
constexpr int64_t kAhead = 8;             // rows fetched ahead of the sums: random rows of a large table are in no cache
constexpr int64_t kLine = 64;             // bytes of a cache line
constexpr int64_t kPieceBytes = 1 << 15;  // read for one piece of work: less is not worth waking a thread
constexpr int64_t kMostPieces = 256;

template <int64_t W, class T, class I>
MEMREWRITE_INLINE void tile(const Lookup<T, I>& job, int64_t token, int64_t column) {
  const I* indices = job.indices + token * job.reads;
  const T* weights = job.weights + token * job.reads;
  const T* values = job.values + column;
  float sums[W] = {};
  for (int64_t j = 0; j < job.reads; ++j) {
    const char* ahead = reinterpret_cast<const char*>(values + int64_t(indices[std::min(j + kAhead, job.reads - 1)]) * job.width);
    for (int64_t byte = 0; byte < W * int64_t(sizeof(T)); byte += kLine) __builtin_prefetch(ahead + byte);
    const T* row = values + int64_t(indices[j]) * job.width;
    const float weight = widen(weights[j]);
    for (int64_t c = 0; c < W; ++c) sums[c] += weight * widen(row[c]);
  }
  T* y = job.y + token * job.width + column;
  for (int64_t c = 0; c < W; ++c) narrow(sums[c], y + c);
}

// Columns begin to end in tiles of W, what is left in smaller ones.
template <int64_t W, class T, class I>
MEMREWRITE_INLINE void columns(const Lookup<T, I>& job, int64_t token, int64_t begin, int64_t end) {
  for (; end - begin >= W; begin += W) tile<W>(job, token, begin);
  if constexpr (W > 1) columns<W / 2>(job, token, begin, end);
}

// Units are tiles of tokens, numbered token by token.
template <class T, class I>
MEMREWRITE_CLONES void units(const Lookup<T, I>& job, int64_t tiles, int64_t begin, int64_t end) {
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t column = unit % tiles * kTile;
    columns<kTile>(job, unit / tiles, column, std::min(column + kTile, job.width));
  }
}

}  // namespace

template <class T, class I>
void lookup_cpu(const Lookup<T, I>& job, const Threads& threads) {
  const int64_t tiles = (job.width + kTile - 1) / kTile;
  const int64_t total = job.tokens * tiles;
  if (total == 0) return;
  const int64_t bytes = (job.reads + 1) * std::min(kTile, job.width) * int64_t(sizeof(T));  // of one unit
  const int64_t least = std::max(kPieceBytes / bytes, (total + kMostPieces - 1) / kMostPieces);
  const int64_t each = std::max<int64_t>(least, 1);
  threads.run(size_t((total + each - 1) / each), [&](size_t piece) {
    const int64_t begin = int64_t(piece) * each;
    units(job, tiles, begin, std::min(begin + each, total));
  });
}

#define INSTANTIATE(T)                                                    \
  template void lookup_cpu(const Lookup<T, int64_t>&, const Threads&); \
  template void lookup_cpu(const Lookup<T, int32_t>&, const Threads&);
MEMREWRITE_FOR_TYPES(INSTANTIATE)
