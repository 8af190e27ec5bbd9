// The reads of a table, sorted by slot: the reads of one slot are a segment.
#pragma once

#include <vector>

#include "kernels.h"

struct SortedReads {
  std::vector<const void*> rows;  // of each read: the gradient of its lookup's output
  std::vector<float> weights;     // of each read
  std::vector<int64_t> slots;     // of each segment, ascending
  std::vector<int64_t> starts;    // of each segment, and the end of the last

  int64_t segments() const { return int64_t(slots.size()); }
  // The first segment whose slot is `slot` or above.
  int64_t segment_from(int64_t slot) const;
  // The first segment that starts at read number `read` or later.
  int64_t segment_at(int64_t read) const;
};

// Stable: the reads of a slot stay in the order of the lookups, so that sums do not depend on threads.
SortedReads sorted(const Reads& reads);
