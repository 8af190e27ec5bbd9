// ProductKeyTopk on CUDA for the usual sizes: one warp for each row, all keys in registers. `topk_large.cu` has the others.
//
// Of each half: the maxima of groups of neighboring scores, the k best groups, and the k best of their scores. Then the k best
// sums of the pairs of ranks (i, j) with i * j <= k, counted from 1: for any other pair there are k pairs at least as large.
#include <type_traits>

#include "kernels.h"

namespace {

constexpr unsigned kAll = 0xffffffff;
constexpr int kLanes = 32;
constexpr int kWarps = 4;  // of a block
constexpr int kGroup = 8;  // neighboring scores
constexpr int64_t kMostBlocks = INT32_MAX;
constexpr int64_t kMostNarrow = 65536;  // scores of a half whose indices fit into a key of 32 bits
constexpr int64_t kMostKWarp = 256;

// ----------------------------------------------------------------------------------------------------------------------- keys

// An integer with the order of the scores, as `order` for float; for the 16-bit types with 16 bits.
__device__ int32_t rank(float x) { return order(x); }

template <class T>
__device__ int32_t rank(T x) {
  constexpr int32_t infinity = std::is_same<T, Half>::value ? 0x7c00 : 0x7f80;
  const int32_t bits = int16_t(x.bits), size = bits & 0x7fff;
  return size > infinity ? 0x7fff : size == 0 ? 0 : bits ^ ((bits >> 31) & 0x7fff);
}

// A rank and an index as one key, in the order of `sort_key`.
template <class T>
using Key = std::conditional_t<sizeof(T) == 2, int32_t, int64_t>;

template <class K>
__device__ K key_of(int32_t rank, uint32_t place) {
  if constexpr (sizeof(K) == 8) return sort_key(rank, place);
  return K(uint32_t(rank) << 16 | (0xffff - place));
}

__device__ uint32_t place_in(int64_t key) { return place_of(key); }
__device__ uint32_t place_in(int32_t key) { return 0xffff - (uint32_t(key) & 0xffff); }

template <class K>
constexpr K kNone = K(uint64_t(1) << (8 * sizeof(K) - 1));  // the smallest integer: below the key of every score

// The smallest key of the same rank.
template <class K>
__device__ K lowest_of(K key) {
  return sizeof(K) == 8 ? key & ~K(UINT32_MAX) : key & ~K(0xffff);
}

// ------------------------------------------------------------------------------------------------------------------- selection

// The 32 * E best keys that a warp was offered, and a queue of keys that may be better. Position 32 * e + lane is best[e].
template <class K, int E>
struct Selection {
  static constexpr int kRoom = kLanes * E;
  K best[E];
  K floor;   // no lower key is among the k best
  K* queue;  // in shared memory, for kRoom + kLanes keys
  int count, k, lane;

  __device__ Selection(K* queue, int k, int lane) : queue(queue), k(k), lane(lane) {}

  // Select the k best of `key(0)` to `key(total - 1)`, which are unique, or kNone. `from`: a lower bound of the k-th best.
  template <class Source>
  __device__ __forceinline__ void of(int64_t total, K from, Source key) {
    floor = from, count = 0;
    for (int e = 0; e < E; ++e) best[e] = kNone<K>;
    bool last = false;
#pragma unroll 1
    for (int64_t begin = 0; !last; begin += kLanes) {
      const K one = begin + lane < total ? key(begin + lane) : kNone<K>;
      const bool good = one != kNone<K> && one >= floor;
      const unsigned those = __ballot_sync(kAll, good);
      if (good) queue[count + __popc(those & ((1u << lane) - 1))] = one;
      count += __popc(those);
      last = begin + kLanes >= total;
#pragma unroll 1
      while (count >= kRoom || (last && count > 0)) take();
    }
  }

  // The k-th best key.
  __device__ __forceinline__ K kth() const {
    K found = kNone<K>;
    for (int e = 0; e < E; ++e) found = e == (k - 1) / kLanes ? best[e] : found;
    return __shfl_sync(kAll, found, (k - 1) % kLanes);
  }

 private:
  // Merge kRoom keys of the queue into the best, or all if there are fewer.
  __device__ __forceinline__ void take() {
    K x[E];
    __syncwarp();
    for (int e = 0; e < E; ++e) x[e] = kLanes * e + lane < count ? queue[kLanes * e + lane] : kNone<K>;
    const int rest = count > kRoom ? count - kRoom : 0;
    const K moved = lane < rest ? queue[kRoom + lane] : kNone<K>;
    __syncwarp();
    if (lane < rest) queue[lane] = moved;
    count = rest;
#pragma unroll
    for (int size = 2; size <= kRoom; size *= 2) {
#pragma unroll
      for (int distance = size / 2; distance > 0; distance /= 2) step(x, size, distance, false);
    }
    for (int e = 0; e < E; ++e) best[e] = best[e] > x[e] ? best[e] : x[e];  // of a descending and an ascending list
#pragma unroll
    for (int distance = kRoom / 2; distance > 0; distance /= 2) step(best, kRoom, distance, true);
    const K reached = kth();
    floor = reached > floor ? reached : floor;
  }

  // One step of Batcher's bitonic sort: partners differ by `distance`, and each `size` positions change the direction.
  __device__ __forceinline__ void step(K (&x)[E], int size, int distance, bool descending) {
#pragma unroll
    for (int e = 0; e < E; ++e) {
      const bool down = (((kLanes * e + lane) & size) == 0) == descending;
      const int other_e = e ^ (distance / kLanes);
      if (distance < kLanes) {
        const K other = __shfl_xor_sync(kAll, x[e], distance);
        const bool larger = ((lane & distance) == 0) == down;
        x[e] = (other > x[e]) == larger ? other : x[e];
      } else if (other_e > e) {
        const K one = x[e], other = x[other_e];
        if ((other > one) == down) x[e] = other, x[other_e] = one;
      }
    }
  }
};

// ------------------------------------------------------------------------------------------------------------------------ rows

// Working memory of one warp: the k best scores of each half and their indices.
template <int E>
struct Scratch {
  int64_t queue[kLanes * E + kLanes];
  float scores[2][kLanes * E];
  uint32_t places[2][kLanes * E];
};

// The largest rank of a group; `count` scores are left. Groups of an aligned row are read 16 bytes at a time.
template <class T>
__device__ __forceinline__ int32_t largest_rank(const T* scores, int64_t count, bool aligned) {
  T x[kGroup];
  if (aligned && count >= kGroup) {
    constexpr int wide = int(kGroup * sizeof(T) / sizeof(uint4));
    uint4 pieces[wide];
    for (int i = 0; i < wide; ++i) pieces[i] = reinterpret_cast<const uint4*>(scores)[i];
    memcpy(x, pieces, sizeof x);
  } else {
    for (int i = 0; i < kGroup; ++i) x[i] = scores[i < count ? i : 0];
  }
  int32_t largest = rank(x[0]);
  for (int i = 1; i < kGroup; ++i) largest = rank(x[i]) > largest ? rank(x[i]) : largest;
  return largest;
}

// Writes the k best scores of a half and their indices, best first.
template <class T, int E>
__device__ __forceinline__ void best_of_half(const T* scores, int64_t n, int k, int lane, int64_t* queue, float* best,
                                             uint32_t* places) {
  using K = Key<T>;
  Selection<K, E> selection(reinterpret_cast<K*>(queue), k, lane);
  const int64_t groups = (n + kGroup - 1) / kGroup;
  const bool grouped = groups > k;
  const bool aligned = reinterpret_cast<uintptr_t>(scores) % sizeof(uint4) == 0;
  K from = kNone<K>;
  if (grouped) {
    selection.of(groups, from, [=](int64_t group) {
      return key_of<K>(largest_rank(scores + group * kGroup, n - group * kGroup, aligned), uint32_t(group));
    });
    from = lowest_of(selection.kth());  // k scores, the maxima of the best groups, are at least this
    for (int e = 0; e < E; ++e) places[kLanes * e + lane] = place_in(selection.best[e]);
    __syncwarp();
  }
  selection.of(grouped ? int64_t(k) * kGroup : n, from, [=](int64_t i) {
    const int64_t column = grouped ? int64_t(places[i / kGroup]) * kGroup + i % kGroup : i;
    return column < n ? key_of<K>(rank(scores[column]), uint32_t(column)) : kNone<K>;
  });
  __syncwarp();
  for (int e = 0; e < E; ++e) {
    if (kLanes * e + lane >= k) continue;
    const uint32_t place = place_in(selection.best[e]);
    places[kLanes * e + lane] = place;
    best[kLanes * e + lane] = widen(scores[place]);
  }
  __syncwarp();
}

// At least 4 blocks of 4 warps on a multiprocessor: without this number, ptxas spills registers to fit more.
template <class T, int E>
__global__ void __launch_bounds__(kLanes* kWarps, 4) topk_of_rows(Topk<T> job) {
  __shared__ Scratch<E> shared[kWarps];
  constexpr int room = kLanes * E;
  const int lane = int(threadIdx.x) % kLanes, warp = int(threadIdx.x) / kLanes, k = int(job.k);
  Scratch<E>& scratch = shared[warp];
  for (int64_t row = int64_t(blockIdx.x) * kWarps + warp; row < job.rows; row += int64_t(gridDim.x) * kWarps) {
#pragma unroll 1
    for (int half = 0; half < 2; ++half) {
      const int64_t n = half == 0 ? job.n1 : job.n2;
      const T* scores = (half == 0 ? job.scores1 : job.scores2) + row * n;
      best_of_half<T, E>(scores, n, k, lane, scratch.queue, scratch.scores[half], scratch.places[half]);
    }

    // Ranks from 0 here. Block b of the pairs has those with i + 1 in [2^b, 2^(b+1)) and j + 1 <= room / 2^b: `room` pairs. Only
    // i + 1 = room is in none of the blocks; its pair with j = 0 takes a position of the last block whose pair is not needed.
    int blocks = 0;
    while (1 << blocks < room) ++blocks;
    Selection<int64_t, E> selection(scratch.queue, k, lane);
    selection.of(int64_t(blocks) * room, kNone<int64_t>, [&](int64_t position) {
      const int block = int(position) / room, place = int(position) % room;
      int i = (1 << block) - 1 + (place & ((1 << block) - 1)), j = place >> block;
      if (block == blocks - 1 && place == room - 1) i = room - 1, j = 0;
      if ((i + 1) * (j + 1) > k) return kNone<int64_t>;
      return sort_key(order(scratch.scores[0][i] + scratch.scores[1][j]), uint32_t(i * room + j));
    });

    float found[E], scale = 1;
    for (int e = 0; e < E; ++e) {
      if (kLanes * e + lane >= k) continue;
      const int pair = int(place_in(selection.best[e])), i = pair / room, j = pair % room;
      found[e] = scratch.scores[0][i] + scratch.scores[1][j];
      job.indices[row * k + kLanes * e + lane] = int64_t(scratch.places[0][i]) * job.n2 + scratch.places[1][j];
    }
    if (job.softmax) {
      const float largest = __shfl_sync(kAll, found[0], 0);
      float total = 0;
      for (int e = 0; e < E; ++e) {
        if (kLanes * e + lane < k) total += found[e] = expf(found[e] - largest);
      }
      for (int distance = kLanes / 2; distance > 0; distance /= 2) total += __shfl_xor_sync(kAll, total, distance);
      scale = 1 / total;  // one division for all: it takes a call
    }
    for (int e = 0; e < E; ++e) {
      if (kLanes * e + lane < k) job.scores[row * k + kLanes * e + lane] = found[e] * scale;
    }
    __syncwarp();  // before the next row overwrites the scratch
  }
}

}  // namespace

template <class T>
const char* topk_cuda(const Topk<T>& job, void* stream) {
  if (job.rows == 0) return nullptr;
  const int64_t n = job.n1 > job.n2 ? job.n1 : job.n2;
  if (job.k > kMostKWarp || (sizeof(T) == 2 && n > kMostNarrow)) return topk_large_cuda(job, stream);
  const auto kernel = job.k <= 32    ? topk_of_rows<T, 1>
                      : job.k <= 64  ? topk_of_rows<T, 2>
                      : job.k <= 128 ? topk_of_rows<T, 4>
                                     : topk_of_rows<T, 8>;
  Topk<T> copy = job;
  void* arguments[] = {&copy};
  const int64_t blocks = (job.rows + kWarps - 1) / kWarps;
  const cudaError_t error = cudaLaunchKernel(kernel, dim3(unsigned(blocks < kMostBlocks ? blocks : kMostBlocks)),
                                             dim3(kLanes * kWarps), arguments, 0, static_cast<cudaStream_t>(stream));
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

#define INSTANTIATE(T) template const char* topk_cuda(const Topk<T>&, void*);
MEMREWRITE_FOR_TYPES(INSTANTIATE)
