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

// The same, for row-wise Adam. M is the type of the first moment.
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

// The same, with one second moment per element. M is the type of both moments.
template <class M>
MEMREWRITE_CLONES void lazy_adam(const Update& job, int64_t slot, float* g, int64_t width) {
  const RandomRow random1(job.seed, uint64_t(slot), 1), random2(job.seed, uint64_t(slot), 2);
  M* first = static_cast<M*>(job.exp_avg.data) + slot * width;
  M* second = static_cast<M*>(job.exp_avg_sq.data) + slot * width;
  for (int64_t c = 0; c < width; ++c) {
    const float mean = job.beta1 * widen(first[c]) + job.rest1 * g[c];
    const float square = job.beta2 * widen(second[c]) + job.rest2 * (g[c] * g[c]);
    narrow(mean, random1.at(c), first + c);
    narrow(square, random2.at(c), second + c);
    g[c] = mean / job.correct1 * job.lr / (std::sqrt(square / job.correct2) + job.eps);
  }
}

// The scale of numbers that are stored in FLOAT8. The bits of magnitudes have the order of the magnitudes; NaN is largest.
MEMREWRITE_INLINE float scale_of(const float* x, int64_t count) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < count; ++i) largest = std::max(largest, bit_cast<uint32_t>(x[i]) & 0x7fffffffu);
  return largest == 0 ? 1.0f : bit_cast<float>(largest) / kFloat8Max;
}

// The same, with moments in FLOAT8, block by block. The second moment is stored as its root.
MEMREWRITE_CLONES void lazy_adam_float8(const Update& job, int64_t slot, float* g, int64_t width) {
  const RandomRow random1(job.seed, uint64_t(slot), 1), random2(job.seed, uint64_t(slot), 2);
  Float8* first = static_cast<Float8*>(job.exp_avg.data) + slot * width;
  Float8* second = static_cast<Float8*>(job.exp_avg_sq.data) + slot * width;
  const int64_t blocks = ceil_div(width, kBlock);
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t begin = block * kBlock, count = std::min(kBlock, width - begin);
    float* scale1 = job.exp_avg_scale + slot * blocks + block;
    float* scale2 = job.exp_avg_sq_scale + slot * blocks + block;
    float mean[kBlock], root[kBlock];
    for (int64_t i = 0, c = begin; i < count; ++i, ++c) {
      const float known = widen(second[c]) * *scale2;
      const float square = job.beta2 * (known * known) + job.rest2 * (g[c] * g[c]);
      mean[i] = job.beta1 * (widen(first[c]) * *scale1) + job.rest1 * g[c];
      root[i] = std::sqrt(square);
      g[c] = mean[i] / job.correct1 * job.lr / (std::sqrt(square / job.correct2) + job.eps);
    }
    *scale1 = scale_of(mean, count);
    *scale2 = scale_of(root, count);
    for (int64_t i = 0, c = begin; i < count; ++i, ++c) {
      narrow(mean[i] / *scale1, random1.at(c), first + c);
      narrow(root[i] / *scale2, random2.at(c), second + c);
      second[c].bits = uint8_t(second[c].bits + (second[c].bits == 0 && root[i] > 0));  // zero would divide by eps
    }
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
  const Type type = job.exp_avg.type;
  if (job.exp_avg.data == nullptr) {
    adagrad(job, slot, g, width);
  } else if (job.exp_avg_sq.data == nullptr) {
    type == FLOAT32 ? adam<float>(job, slot, g, width) : adam<BFloat16>(job, slot, g, width);
  } else if (type == FLOAT8) {
    lazy_adam_float8(job, slot, g, width);
  } else {
    type == FLOAT32 ? lazy_adam<float>(job, slot, g, width) : lazy_adam<BFloat16>(job, slot, g, width);
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
          for (const Floats& state : {job.exp_avg, job.exp_avg_sq}) {
            if (state.data != nullptr) prefetch(state, reads.slots[s + 1], job.reads.width);
          }
        }
        sum_segment<G>(reads, s, job.reads.width, g.data(), rows.data());
        update(job, reads.slots[s], g.data());
      }
    });
  });
}
