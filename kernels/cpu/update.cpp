// A fused optimizer step: one pass over the rows that were read, which sums a row's gradient and updates the row.
#include <cmath>
#include <vector>

#include "reads.h"
#include "rounding.h"
#include "rows.h"

namespace {

constexpr int64_t kMostPieces = 256;
constexpr float kFloat8Max = 448.0f;

MEMREWRITE_INLINE float mean_of_squares(const float* g, int64_t width) {
  float lanes[kLanes] = {};
  int64_t c = 0;
  for (; c + kLanes <= width; c += kLanes) {
    for (int64_t i = 0; i < kLanes; ++i) lanes[i] += g[c + i] * g[c + i];
  }
  for (int64_t i = 0; c < width; ++c, ++i) lanes[i] += g[c] * g[c];
  return total_of(lanes) / float(width);
}

// g = the gradient of a segment's row. `rows` has room for the reads of a segment and kRows more.
template <class G>
MEMREWRITE_CLONES void sum_segment(const SortedReads& reads, int64_t s, int64_t width, float* g, const void** rows) {
  const int64_t first = reads.starts[s], count = reads.starts[s + 1] - first;
  const int64_t known = std::min(count + kRows, int64_t(reads.rows.size()) - first);
  for (int64_t column = 0; column < width; column += kTile) {
    for (int64_t i = 0; i < known; ++i) rows[i] = static_cast<const G*>(reads.rows[first + i]) + column;
    sum_rows<G>(rows, reads.weights.data() + first, count, known, std::min(kTile, width - column), g + column);
  }
}

// From the gradient of a row to its change, in place.
MEMREWRITE_CLONES void adagrad(const Update& job, int64_t slot, float* g, int64_t width) {
  const float below = std::sqrt(job.square[slot] += mean_of_squares(g, width)) + job.eps;
  for (int64_t c = 0; c < width; ++c) g[c] = g[c] * job.lr / below;
}

// The same. M is the type of the first moment.
template <class M>
MEMREWRITE_CLONES void adam(const Update& job, int64_t slot, float* g, int64_t width) {
  const float square = job.beta2 * job.square[slot] + job.rest2 * mean_of_squares(g, width);
  job.square[slot] = square;
  const float below = std::sqrt(square / job.correct2) + job.eps;
  const RandomRow random(job.seed, uint64_t(slot), 1);
  M* moment = static_cast<M*>(job.exp_avg.data) + slot * width;
  for (int64_t c = 0; c < width; ++c) {
    const float mean = job.beta1 * widen(moment[c]) + job.rest1 * g[c];
    narrow(mean, random.at(c), moment + c);
    g[c] = mean / job.correct1 * job.lr / below;
  }
}

// Decays the row, subtracts the change, and stores the row.
template <class T>
MEMREWRITE_CLONES void apply(const Update& job, int64_t slot, float* change, int64_t width) {
  T* row = static_cast<T*>(job.values.data) + slot * width;
  const RandomRow random(job.seed, uint64_t(slot), 0);
  if (job.scale == nullptr) {
    for (int64_t c = 0; c < width; ++c) narrow(widen(row[c]) * job.keep - change[c], random.at(c), row + c);
    return;
  }
  float largest = 0;
  for (int64_t c = 0; c < width; ++c) {
    change[c] = widen(row[c]) * job.scale[slot] * job.keep - change[c];
    largest = std::max(largest, std::fabs(change[c]));
  }
  const float scale = largest == 0 ? 1.0f : largest / kFloat8Max;
  job.scale[slot] = scale;
  for (int64_t c = 0; c < width; ++c) narrow(change[c] / scale, random.at(c), row + c);
}

void update(const Update& job, int64_t slot, float* g) {
  const int64_t width = job.reads.width;
  if (job.exp_avg.data == nullptr) {
    adagrad(job, slot, g, width);
  } else if (job.exp_avg.type == FLOAT32) {
    adam<float>(job, slot, g, width);
  } else {
    adam<BFloat16>(job, slot, g, width);
  }
  with_type(job.values.type, [&](auto number) { apply<decltype(number)>(job, slot, g, width); });
}

// Requests a row that is used later.
void prefetch(const Floats& table, int64_t row, int64_t width) {
  const int64_t bytes = width * bytes_of(table.type);
  const char* begin = static_cast<const char*>(table.data) + row * bytes;
  for (int64_t b = 0; b < bytes; b += kLine) __builtin_prefetch(begin + b);
}

}  // namespace

void update_cpu(const Update& job, const Threads& threads) {
  const SortedReads reads = sorted(job.reads);
  const int64_t total = int64_t(reads.rows.size());
  int64_t most = 0;
  for (int64_t s = 0; s < reads.segments(); ++s) most = std::max(most, reads.starts[s + 1] - reads.starts[s]);
  const int64_t bytes = total * job.reads.width * 4;
  const int64_t pieces = std::max<int64_t>(1, std::min({bytes / threads.piece_bytes, kMostPieces, reads.segments()}));
  with_wide_type(job.reads.grad, [&](auto number) {
    using G = decltype(number);
    threads.run(pieces, [&](int64_t piece) {
      thread_local std::vector<float> g;
      thread_local std::vector<const void*> rows;
      g.resize(size_t(job.reads.width));
      rows.resize(size_t(most + kRows));
      const int64_t end = reads.segment_at(total * (piece + 1) / pieces);
      for (int64_t s = reads.segment_at(total * piece / pieces); s < end; ++s) {
        if (s + 1 < end) {
          prefetch(job.values, reads.slots[s + 1], job.reads.width);
          if (job.exp_avg.data != nullptr) prefetch(job.exp_avg, reads.slots[s + 1], job.reads.width);
        }
        sum_segment<G>(reads, s, job.reads.width, g.data(), rows.data());
        update(job, reads.slots[s], g.data());
      }
    });
  });
}
