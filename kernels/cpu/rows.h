// Loops over rows of numbers: weighted sums of rows, and products with rows. A few rows are read at a time, while the next are
// prefetched line by line, since random rows of a large table are not in a cache. The order of all sums is fixed.
#pragma once

#include <algorithm>

#include "kernels.h"

constexpr int64_t kTile = 1024;  // columns summed at once, at most: 4 KiB of sums stay in the L1 cache
constexpr int64_t kRows = 8;     // at once, at most
constexpr int64_t kDotRows = 4;  // multiplied at once
constexpr int64_t kLine = 64;    // bytes of a cache line
constexpr int64_t kLanes = 16;   // numbers added or multiplied at once

template <class T>
constexpr int64_t kStep = kLine / int64_t(sizeof(T));  // numbers of a cache line

// Rows added at once, so that a sum is loaded and stored once for them; measured.
template <class T>
constexpr int64_t kAddedRows = sizeof(T) == 4 ? kRows : 4;

// Adds R rows to the sums of `width` columns, in order, and prefetches the R rows after them, up to the row `last`.
template <int R, class T>
MEMREWRITE_INLINE void add_rows(const void* const* rows, const void* const* last, const float* weights, int64_t width, float* sums) {
  const T* row[R];
  const T* next[R];
  for (int r = 0; r < R; ++r) {
    row[r] = static_cast<const T*>(rows[r]);
    next[r] = static_cast<const T*>(*std::min(rows + R + r, last));
  }
  int64_t c = 0;
  for (; c + kStep<T> <= width; c += kStep<T>) {
    for (int r = 0; r < R; ++r) __builtin_prefetch(next[r] + c);
    for (int64_t s = c; s < c + kStep<T>; s += kLanes) {  // one vector register: GCC keeps a longer array in memory
      float lanes[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) lanes[i] = sums[s + i];
      for (int r = 0; r < R; ++r) {
        for (int64_t i = 0; i < kLanes; ++i) lanes[i] += weights[r] * widen(row[r][s + i]);
      }
      for (int64_t i = 0; i < kLanes; ++i) sums[s + i] = lanes[i];
    }
  }
  for (; c < width; ++c) {
    for (int r = 0; r < R; ++r) sums[c] += weights[r] * widen(row[r][c]);
  }
}

// sums = the weighted sum of `count` rows. `known` rows, of which there are at least `count` and one, are prefetched.
template <class T>
MEMREWRITE_INLINE void sum_rows(const void* const* rows, const float* weights, int64_t count, int64_t known, int64_t width,
                                float* sums) {
  std::fill(sums, sums + width, 0.0f);
  const void* const* last = rows + known - 1;
  int64_t at = 0;
  for (; at + kAddedRows<T> <= count; at += kAddedRows<T>) add_rows<kAddedRows<T>, T>(rows + at, last, weights + at, width, sums);
  for (; at < count; ++at) add_rows<1, T>(rows + at, last, weights + at, width, sums);
}

// The sum of kLanes numbers, pair by pair.
MEMREWRITE_INLINE float total_of(float* lanes) {
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

// out[r] = row r . g for R rows; prefetches the R rows after them, up to the row `last`.
template <int R, class T>
MEMREWRITE_INLINE void dot_rows(const void* const* rows, const void* const* last, const float* g, int64_t width, float* out) {
  const T* row[R];
  const T* next[R];
  for (int r = 0; r < R; ++r) {
    row[r] = static_cast<const T*>(rows[r]);
    next[r] = static_cast<const T*>(*std::min(rows + R + r, last));
  }
  float lanes[R][kLanes] = {};
  int64_t c = 0;
  for (; c + kStep<T> <= width; c += kStep<T>) {
    for (int r = 0; r < R; ++r) __builtin_prefetch(next[r] + c);
    for (int64_t s = 0; s < kStep<T>; s += kLanes) {
      for (int r = 0; r < R; ++r) {
        for (int64_t i = 0; i < kLanes; ++i) lanes[r][i] += g[c + s + i] * widen(row[r][c + s + i]);
      }
    }
  }
  for (int64_t i = 0; c < width; ++c, i = (i + 1) % kLanes) {
    for (int r = 0; r < R; ++r) lanes[r][i] += g[c] * widen(row[r][c]);
  }
  for (int r = 0; r < R; ++r) out[r] = total_of(lanes[r]);
}

// Stores sums in the columns from `begin` on, rounded to nearest.
MEMREWRITE_INLINE void store(const float* sums, int64_t width, const Floats& y, int64_t begin) {
  if (y.type == FLOAT16) {
    for (int64_t c = 0; c < width; ++c) narrow(sums[c], static_cast<Half*>(y.data) + begin + c);
  } else if (y.type == BFLOAT16) {
    for (int64_t c = 0; c < width; ++c) narrow(sums[c], static_cast<BFloat16*>(y.data) + begin + c);
  } else {
    std::copy_n(sums, width, static_cast<float*>(y.data) + begin);
  }
}
