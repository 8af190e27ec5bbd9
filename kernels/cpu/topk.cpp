// ProductKeyTopk on the CPU: one routine, the k best of a list of scores, is used for each half and for the sums of their best.
#include <algorithm>
#include <cmath>
#include <functional>
#include <vector>

#include "kernels.h"

namespace {

constexpr int64_t kBlock = 16;         // scores compared at once
constexpr int64_t kFew = 160;          // up to here, counting the larger keys of each key is faster than sorting
constexpr int64_t kPieceShare = 8;     // a byte of scores takes this many times longer than a byte of a table
constexpr int64_t kMostPieces = 256;

// Working memory of one thread, reused by later calls.
struct Scratch {
  std::vector<int32_t> ordered, maxima;
  std::vector<int64_t> keys, best;
  std::vector<float> half1, half2, sums;
  std::vector<uint32_t> place1, place2;
};

// The k-th largest of `count` numbers, which it may reorder.
MEMREWRITE_INLINE int32_t kth_largest(int32_t* numbers, int64_t count, int64_t k) {
  if (count > kFew) {
    std::nth_element(numbers, numbers + (k - 1), numbers + count, std::greater<>());
    return numbers[k - 1];
  }
  int32_t kth = INT32_MAX;
  for (int64_t i = 0; i < count; ++i) {
    int32_t above = 0;
    for (int64_t j = 0; j < count; ++j) above += numbers[j] > numbers[i];
    if (above < k) kth = std::min(kth, numbers[i]);
  }
  return kth;
}

// A threshold that at least k scores reach, and few others: lane i is the maximum of the scores i, i + lanes, ..., and the
// result is the k-th largest lane. A short list has one lane for each score.
MEMREWRITE_INLINE int32_t threshold(const int32_t* ordered, int64_t n, int64_t k, std::vector<int32_t>& maxima) {
  const int64_t enough = (2 * k + kBlock - 1) / kBlock * kBlock;
  const int64_t lanes = n < 2 * enough ? n : enough;
  maxima.resize(size_t(lanes));
  int32_t* largest = maxima.data();
  std::copy_n(ordered, lanes, largest);
  for (int64_t begin = lanes; begin < n; begin += lanes) {
    const int64_t count = std::min(lanes, n - begin);
    for (int64_t i = 0; i < count; ++i) largest[i] = std::max(largest[i], ordered[begin + i]);
  }
  return kth_largest(largest, lanes, k);
}

// Writes the keys of all scores that reach `least`. `ordered` is padded to whole blocks with INT32_MIN, and `keys` has room for
// n + 1.
MEMREWRITE_INLINE int64_t keys_from(const int32_t* ordered, int64_t n, int32_t least, int64_t* keys) {
  int64_t count = 0;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    int32_t reached = 0;
    for (int64_t i = begin; i < begin + kBlock; ++i) reached |= ordered[i] >= least;
    if (!reached) continue;
    for (int64_t i = begin; i < begin + kBlock; ++i) {  // without a branch, which would be unpredictable
      keys[count] = sort_key(ordered[i], uint32_t(i));
      count += ordered[i] >= least;
    }
  }
  return count;
}

// The k largest keys, in descending order.
MEMREWRITE_INLINE void k_largest(std::vector<int64_t>& keys, int64_t count, int64_t k, int64_t* best) {
  if (count > kFew) {
    std::nth_element(keys.begin(), keys.begin() + (k - 1), keys.begin() + count, std::greater<>());
    std::sort(keys.begin(), keys.begin() + k, std::greater<>());
    std::copy_n(keys.begin(), k, best);
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    int64_t above = 0;
    for (int64_t j = 0; j < count; ++j) above += keys[j] > keys[i];
    if (above < k) best[above] = keys[i];
  }
}

// Writes the keys of the k best scores to `scratch.best`, best first.
template <class T>
MEMREWRITE_CLONES void k_best(const T* scores, int64_t n, int64_t k, Scratch& scratch) {
  const int64_t whole = (n + kBlock - 1) / kBlock * kBlock;
  scratch.ordered.resize(size_t(whole));
  scratch.keys.resize(size_t(n) + 1);
  scratch.best.resize(size_t(k));
  int32_t* ordered = scratch.ordered.data();
  for (int64_t i = 0; i < n; ++i) ordered[i] = order(widen(scores[i]));
  std::fill(ordered + n, ordered + whole, INT32_MIN);  // below every score
  const int32_t least = threshold(ordered, n, k, scratch.maxima);
  const int64_t count = keys_from(ordered, n, least, scratch.keys.data());
  k_largest(scratch.keys, count, k, scratch.best.data());
}

template <class T>
void half(const T* scores, int64_t n, int64_t k, Scratch& scratch, std::vector<float>& best, std::vector<uint32_t>& places) {
  k_best(scores, n, k, scratch);
  best.resize(size_t(k));
  places.resize(size_t(k));
  for (int64_t r = 0; r < k; ++r) {
    places[r] = place_of(scratch.best[r]);
    best[r] = widen(scores[places[r]]);
  }
}

void softmax(float* scores, int64_t k) {
  const float largest = scores[0];
  float total = 0;
  for (int64_t r = 0; r < k; ++r) total += scores[r] = std::exp(scores[r] - largest);
  for (int64_t r = 0; r < k; ++r) scores[r] /= total;
}

// `first[i]` is the number of the first pair of rank i in half 1; only pairs with (i + 1) * (j + 1) <= k can be among the k
// best.
template <class T>
void one_row(const Topk<T>& job, const std::vector<int64_t>& first, int64_t row, Scratch& scratch) {
  half(job.scores1 + row * job.n1, job.n1, job.k, scratch, scratch.half1, scratch.place1);
  half(job.scores2 + row * job.n2, job.n2, job.k, scratch, scratch.half2, scratch.place2);
  scratch.sums.resize(size_t(first[job.k]));
  for (int64_t i = 0; i < job.k; ++i) {
    for (int64_t p = first[i]; p < first[i + 1]; ++p) scratch.sums[p] = scratch.half1[i] + scratch.half2[p - first[i]];
  }
  k_best(scratch.sums.data(), first[job.k], job.k, scratch);
  float* scores = job.scores + row * job.k;
  int64_t* indices = job.indices + row * job.k;
  for (int64_t r = 0; r < job.k; ++r) {
    const int64_t pair = place_of(scratch.best[r]);
    const int64_t i = std::upper_bound(first.begin(), first.end(), pair) - first.begin() - 1;
    scores[r] = scratch.sums[pair];
    indices[r] = int64_t(scratch.place1[i]) * job.n2 + scratch.place2[pair - first[i]];
  }
  if (job.softmax) softmax(scores, job.k);
}

}  // namespace

template <class T>
void topk_cpu(const Topk<T>& job, const Threads& threads) {
  if (job.rows == 0) return;
  std::vector<int64_t> first(size_t(job.k) + 1);
  for (int64_t i = 0; i < job.k; ++i) first[i + 1] = first[i] + job.k / (i + 1);
  const int64_t each = std::max({threads.piece_bytes / kPieceShare / (job.n1 + job.n2), ceil_div(job.rows, kMostPieces), int64_t(1)});
  threads.run(ceil_div(job.rows, each), [&](int64_t piece) {
    thread_local Scratch scratch;
    const int64_t begin = piece * each, end = std::min(begin + each, job.rows);
    for (int64_t row = begin; row < end; ++row) one_row(job, first, row, scratch);
  });
}

void topk_gradient_cpu(const TopkGradient& job, const Threads& threads) {
  const int64_t bytes = (job.n1 + job.n2) * int64_t(sizeof(float));
  const int64_t each = std::max({threads.piece_bytes / bytes, ceil_div(job.rows, kMostPieces), int64_t(1)});
  threads.run(ceil_div(job.rows, each), [&](int64_t piece) {
    const int64_t begin = piece * each, end = std::min(begin + each, job.rows);
    std::fill(job.grad1 + begin * job.n1, job.grad1 + end * job.n1, 0.0f);
    std::fill(job.grad2 + begin * job.n2, job.grad2 + end * job.n2, 0.0f);
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t i = row * job.k; i < (row + 1) * job.k; ++i) {
        job.grad1[row * job.n1 + job.indices[i] / job.n2] += job.grad[i];
        job.grad2[row * job.n2 + job.indices[i] % job.n2] += job.grad[i];
      }
    }
  });
}

#define INSTANTIATE(T) template void topk_cpu(const Topk<T>&, const Threads&);
INSTANTIATE(float)
INSTANTIATE(Half)
INSTANTIATE(BFloat16)
