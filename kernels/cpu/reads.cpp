// Sorts reads by slot, by a radix sort.
#include "reads.h"

#include <algorithm>

namespace {

constexpr int kDigit = 11;  // bits of a digit: the counters stay in the L1 cache

struct Read {
  uint64_t slot;
  const void* row;
  float weight;
};

std::vector<Read> all_reads(const Reads& reads) {
  std::vector<Read> all;
  int64_t total = 0;
  for (int64_t p = 0; p < reads.count; ++p) total += reads.parts[p].tokens * reads.parts[p].reads;
  all.reserve(size_t(total));
  for (int64_t p = 0; p < reads.count; ++p) {
    const Part& part = reads.parts[p];
    int64_t i = 0;
    for (int64_t t = 0; t < part.tokens; ++t) {
      const void* row = static_cast<const char*>(part.grad) + t * reads.width * bytes_of(reads.grad);
      for (int64_t j = 0; j < part.reads; ++j, ++i) {
        all.push_back({uint64_t(part.indices.read(i)), row, part.weights.read(i)});
      }
    }
  }
  return all;
}

// Stably by one digit of the slot.
void sort_by_digit(const std::vector<Read>& from, std::vector<Read>& to, int shift) {
  int64_t places[1 << kDigit] = {};
  const uint64_t mask = (1 << kDigit) - 1;
  for (const Read& read : from) ++places[read.slot >> shift & mask];
  int64_t sum = 0;
  for (int64_t& place : places) {
    const int64_t count = place;
    place = sum;
    sum += count;
  }
  for (const Read& read : from) to[size_t(places[read.slot >> shift & mask]++)] = read;
}

}  // namespace

SortedReads sorted(const Reads& reads) {
  std::vector<Read> all = all_reads(reads), other(all.size());
  for (int shift = 0; shift < 64 && uint64_t(reads.slots - 1) >> shift != 0; shift += kDigit) {
    sort_by_digit(all, other, shift);
    all.swap(other);
  }
  SortedReads found;
  found.rows.reserve(all.size());
  found.weights.reserve(all.size());
  for (size_t i = 0; i < all.size(); ++i) {
    found.rows.push_back(all[i].row);
    found.weights.push_back(all[i].weight);
    if (i > 0 && all[i].slot == all[i - 1].slot) continue;
    found.slots.push_back(int64_t(all[i].slot));
    found.starts.push_back(int64_t(i));
  }
  found.starts.push_back(int64_t(all.size()));
  return found;
}

int64_t SortedReads::segment_from(int64_t slot) const {
  return std::lower_bound(slots.begin(), slots.end(), slot) - slots.begin();
}

int64_t SortedReads::segment_at(int64_t read) const {
  return std::lower_bound(starts.begin(), starts.end() - 1, read) - starts.begin();
}
