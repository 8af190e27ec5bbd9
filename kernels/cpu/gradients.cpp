// The gradients of the lookup. That of the weights is a product of each row that was read with a token's gradient; that of the
// values is a lookup in the other direction: a slot's gradient is the weighted sum of the gradients of the tokens that read it.
#include <vector>

#include "reads.h"
#include "rows.h"

namespace {

constexpr int64_t kMostPieces = 256;
constexpr int64_t kLeastTile = 128;
constexpr int64_t kHotShare = 16;  // a slot with more than this share of all reads is divided among threads, by columns
constexpr int64_t kReads = 32;     // of a token, multiplied in one unit

// ------------------------------------------------------------------------------------------------------------- the weights

// Units are groups of reads of a token, numbered token by token. `g` has room for a row.
template <class T>
MEMREWRITE_CLONES void dots(const Lookup& job, int64_t begin, int64_t end, float* g) {
  const T* values = static_cast<const T*>(job.values.data);
  const int64_t groups = ceil_div(job.reads, kReads);
  int64_t widened = -1;  // the token whose gradient is in `g`
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t token = unit / groups, low = unit % groups * kReads, count = std::min(kReads, job.reads - low);
    const int64_t first = token * job.reads + low;
    if (token != widened) {
      for (int64_t c = 0; c < job.width; ++c) g[c] = job.y.read(token * job.width + c);
      widened = token;
    }
    const void* rows[kReads + kRows];
    float scales[kReads], out[kReads];
    for (int64_t j = 0; j < count; ++j) {
      const int64_t slot = job.indices.read(first + j);
      rows[j] = values + slot * job.width;
      scales[j] = job.scale == nullptr ? 1.0f : job.scale[slot];
    }
    int64_t known = count;
    const int64_t more = std::min(kRows, job.tokens * job.reads - (first + count));  // reads of the next units
    for (int64_t j = 0; j < more; ++j) rows[known++] = values + job.indices.read(first + count + j) * job.width;
    const void* const* last = rows + known - 1;
    int64_t at = 0;
    for (; at + kDotRows <= count; at += kDotRows) dot_rows<kDotRows, T>(rows + at, last, g, job.width, out + at);
    for (; at < count; ++at) dot_rows<1, T>(rows + at, last, g, job.width, out + at);
    for (int64_t j = 0; j < count; ++j) out[j] *= scales[j];
    store(out, count, job.weights, first);
  }
}

// -------------------------------------------------------------------------------------------------------------- the values

// The rows of `out` that one task writes, and the segments that are summed into them.
struct Block {
  int64_t segment, segments;      // from, to
  int64_t row, rows;              // from, to
  bool dense;                     // a segment's row is its slot; else its number
};

// Writes `width` columns of the block's rows; those of no segment are zero.
template <class G>
MEMREWRITE_CLONES void sum_block(const SortedReads& reads, const Block& block, int64_t column, int64_t width, int64_t row_width,
                                 const Floats& out, const void** rows) {
  float sums[kTile];
  int64_t row = block.row;
  const auto zeros_to = [&](int64_t to) {
    std::fill(sums, sums + width, 0.0f);
    for (; row < to; ++row) store(sums, width, out, row * row_width + column);
  };
  for (int64_t s = block.segment; s < block.segments; ++s) {
    zeros_to(block.dense ? reads.slots[s] : s);
    const int64_t begin = reads.starts[s], count = reads.starts[s + 1] - begin;
    const int64_t known = std::min(count + kRows, int64_t(reads.rows.size()) - begin);
    for (int64_t i = 0; i < known; ++i) rows[i] = static_cast<const G*>(reads.rows[begin + i]) + column;
    sum_rows<G>(rows, reads.weights.data() + begin, count, known, width, sums);
    store(sums, width, out, row++ * row_width + column);
  }
  zeros_to(block.rows);
}

int64_t most_reads(const SortedReads& reads) {
  int64_t most = 0;
  for (int64_t s = 0; s < reads.segments(); ++s) most = std::max(most, reads.starts[s + 1] - reads.starts[s]);
  return most;
}

// Sums all segments into `out`, which has `rows` rows.
void sum_segments(const Reads& job, const SortedReads& reads, bool dense, int64_t rows, const Floats& out, const Threads& threads) {
  const int64_t total = int64_t(reads.rows.size()), most = most_reads(reads);
  const int64_t tile = most * kHotShare > total ? kLeastTile : kTile, tiles = ceil_div(job.width, tile);
  const int64_t bytes = total * job.width * bytes_of(job.grad) + rows * job.width * bytes_of(out.type);
  const int64_t blocks = std::max<int64_t>(1, std::min({bytes / threads.piece_bytes, kMostPieces, rows}));
  with_wide_type(job.grad, [&](auto number) {
    using G = decltype(number);
    threads.run(blocks * tiles, [&](int64_t piece) {
      thread_local std::vector<const void*> pointers;
      pointers.resize(size_t(most + kRows));
      const int64_t b = piece / tiles, column = piece % tiles * tile;
      Block block{0, 0, rows * b / blocks, rows * (b + 1) / blocks, dense};
      block.segment = dense ? reads.segment_from(block.row) : std::min(block.row, reads.segments());
      block.segments = dense ? reads.segment_from(block.rows) : std::min(block.rows, reads.segments());
      sum_block<G>(reads, block, column, std::min(tile, job.width - column), job.width, out, pointers.data());
    });
  });
}

}  // namespace

void lookup_dots_cpu(const Lookup& job, const Threads& threads) {
  const int64_t total = job.tokens * ceil_div(job.reads, kReads);
  const int64_t bytes = std::min(kReads, job.reads) * job.width * bytes_of(job.values.type);
  const int64_t each = std::max<int64_t>({1, threads.piece_bytes / std::max<int64_t>(bytes, 1), ceil_div(total, kMostPieces)});
  with_type(job.values.type, [&](auto number) {
    using T = decltype(number);
    threads.run(ceil_div(total, each), [&](int64_t piece) {
      thread_local std::vector<float> g;
      g.resize(size_t(job.width));
      dots<T>(job, piece * each, std::min((piece + 1) * each, total), g.data());
    });
  });
}

void lookup_scatter_cpu(const Reads& job, const Floats& out, const Threads& threads) {
  sum_segments(job, sorted(job), true, job.slots, out, threads);
}

void lookup_rows_cpu(const Reads& job, int64_t* found, const Floats& out, int64_t rows, const Threads& threads) {
  const SortedReads reads = sorted(job);
  std::copy(reads.slots.begin(), reads.slots.end(), found);
  std::fill(found + reads.segments(), found + rows, reads.slots.back());
  sum_segments(job, reads, false, rows, out, threads);
}
