// A fused optimizer step: one pass over the rows that were read, which sums a row's gradient and updates the row.
#include <cmath>
#include <vector>

#include "reads.h"
#include "rounding.h"
#include "rows.h"

namespace {

constexpr int64_t kMostPieces = 256;
constexpr float kFloat8Max = 448.0f;

// Requests a row that is used later.
template <class T>
MEMREWRITE_INLINE void prefetch(const T* row, int64_t width) {
  for (int64_t c = 0; c < width; c += kStep<T>) __builtin_prefetch(row + c);
}

MEMREWRITE_INLINE float mean_of_squares(const float* g, int64_t width) {
  float lanes[kLanes] = {};
  int64_t c = 0;
  for (; c + kLanes <= width; c += kLanes) {
    for (int64_t i = 0; i < kLanes; ++i) lanes[i] += g[c + i] * g[c + i];
  }
  for (int64_t i = 0; c < width; ++c, ++i) lanes[i] += g[c] * g[c];
  return total_of(lanes) / float(width);
}

// From the gradient to the change, in place: Adagrad's.
MEMREWRITE_INLINE void adagrad(const Update& job, int64_t slot, float* g, int64_t width) {
  const float below = std::sqrt(job.square[slot] += mean_of_squares(g, width)) + job.eps;
  for (int64_t c = 0; c < width; ++c) g[c] = g[c] * job.lr / below;
}

// From the gradient to the change, in place: Adam's. M is the type of the first moment.
template <class M>
MEMREWRITE_INLINE void adam(const Update& job, int64_t slot, float* g, int64_t width) {
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
MEMREWRITE_INLINE void apply(const Update& job, int64_t slot, float* change, int64_t width) {
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

// Updates the rows of some segments. `g` has room for a row, `rows` for the reads of a segment and kRows more.
template <class G, class T>
MEMREWRITE_CLONES void update(const Update& job, const SortedReads& reads, int64_t begin, int64_t end, float* g, const void** rows) {
  const int64_t width = job.reads.width;
  for (int64_t s = begin; s < end; ++s) {
    const int64_t slot = reads.slots[s], first = reads.starts[s], count = reads.starts[s + 1] - first;
    const int64_t next = s + 1 < end ? reads.slots[s + 1] : slot;
    prefetch(static_cast<const T*>(job.values.data) + next * width, width);
    if (job.exp_avg.data != nullptr && job.exp_avg.type == FLOAT32) {
      prefetch(static_cast<const float*>(job.exp_avg.data) + next * width, width);
    } else if (job.exp_avg.data != nullptr) {
      prefetch(static_cast<const BFloat16*>(job.exp_avg.data) + next * width, width);
    }
    const int64_t known = std::min(count + kRows, int64_t(reads.rows.size()) - first);
    for (int64_t column = 0; column < width; column += kTile) {
      for (int64_t i = 0; i < known; ++i) rows[i] = static_cast<const G*>(reads.rows[first + i]) + column;
      sum_rows<G>(rows, reads.weights.data() + first, count, known, std::min(kTile, width - column), g + column);
    }
    if (job.exp_avg.data == nullptr) {
      adagrad(job, slot, g, width);
    } else if (job.exp_avg.type == FLOAT32) {
      adam<float>(job, slot, g, width);
    } else {
      adam<BFloat16>(job, slot, g, width);
    }
    apply<T>(job, slot, g, width);
  }
}

}  // namespace

void update_cpu(const Update& job, const Threads& threads) {
  const SortedReads reads = sorted(job.reads);
  const int64_t total = int64_t(reads.rows.size());
  int64_t most = 0;
  for (int64_t s = 0; s < reads.segments(); ++s) most = std::max(most, reads.starts[s + 1] - reads.starts[s]);
  const int64_t bytes = total * job.reads.width * 4;
  const int64_t pieces = std::max<int64_t>(1, std::min({bytes / threads.piece_bytes, kMostPieces, reads.segments()}));
  with_wide_type(job.reads.grad, [&](auto gradient) {
    with_type(job.values.type, [&](auto number) {
      using G = decltype(gradient);
      using T = decltype(number);
      threads.run(pieces, [&](int64_t piece) {
        thread_local std::vector<float> g;
        thread_local std::vector<const void*> rows;
        g.resize(size_t(job.reads.width));
        rows.resize(size_t(most + kRows));
        const int64_t begin = reads.segment_at(total * piece / pieces), end = reads.segment_at(total * (piece + 1) / pieces);
        update<G, T>(job, reads, begin, end, g.data(), rows.data());
      });
    });
  });
}
