// ProductKeyTopk on CUDA for a large k, or for more scores than `topk_cuda.cu` supports: one block for each row. One routine, the
// k best of a list of scores, is used for each half and for the sums. Its keys are in global memory: the best keys so far are
// sorted together with new ones, until all scores are read.
#include "kernels.h"

namespace {

constexpr int kThreads = 256;
constexpr int64_t kLeastRoom = 2048;
constexpr int64_t kMostMemory = int64_t(1) << 28;  // of all blocks, in bytes, if one needs less
constexpr int64_t kMostBlocks = 1024;
constexpr int64_t kNone = INT64_MIN;  // below the key of every score

// The k best scores of one half and their indices.
struct Best {
  float* scores;
  uint32_t* places;
};

template <class T>
struct Launch {
  Topk<T> job;
  int64_t room;     // keys sorted at once: a power of two, at least 2 * k
  int64_t words;    // of 8 bytes that a block needs: `room` keys and two `Best`
  int64_t* memory;  // of all blocks
  uint32_t* first;  // [k + 1]: the number of the first pair of each rank in half 1
};

// first[i + 1] = first[i] + k / (i + 1), in one block: the sums of a range of i per thread, then those of all earlier ranges.
template <class T>
__global__ void __launch_bounds__(kThreads) count_pairs(Launch<T> launch) {
  __shared__ uint32_t sums[kThreads];
  const int64_t k = launch.job.k, each = (k + kThreads - 1) / kThreads;
  const int64_t begin = each * threadIdx.x, end = begin + each < k ? begin + each : k;
  uint32_t sum = 0;
  for (int64_t i = begin; i < end; ++i) sum += uint32_t(k / (i + 1));
  sums[threadIdx.x] = sum;
  __syncthreads();
  sum = 0;
  for (unsigned thread = 0; thread < threadIdx.x; ++thread) sum += sums[thread];
  for (int64_t i = begin; i < end; ++i) launch.first[i] = sum, sum += uint32_t(k / (i + 1));
  if (begin < end && end == k) launch.first[k] = sum;
}

// Sorts `count` keys (a power of two) in descending order, by Batcher's bitonic sort.
__device__ void sort(int64_t* keys, int64_t count) {
  for (int64_t size = 2; size <= count; size *= 2) {
    for (int64_t distance = size / 2; distance > 0; distance /= 2) {
      __syncthreads();
      for (int64_t i = threadIdx.x; i < count / 2; i += kThreads) {
        const int64_t low = 2 * i - (i & (distance - 1)), high = low + distance;
        const bool down = (low & size) == 0;
        const int64_t a = keys[low], b = keys[high];
        if (down ? a < b : a > b) keys[low] = b, keys[high] = a;
      }
    }
  }
  __syncthreads();
}

// Writes the k best of `score(0)` to `score(n - 1)` to the first k of `keys`, in descending order. All threads must call it.
template <class Score>
__device__ void k_best(Score score, int64_t n, int64_t k, int64_t room, int64_t* keys) {
  int64_t kept = 0;
  for (int64_t begin = 0; begin < n; begin += room - kept, kept = k) {
    const int64_t fresh = n - begin < room - kept ? n - begin : room - kept;
    int64_t count = 1;
    while (count < kept + fresh) count *= 2;
    for (int64_t i = threadIdx.x; i < count - kept; i += kThreads) {
      keys[kept + i] = i < fresh ? sort_key(order(score(begin + i)), uint32_t(begin + i)) : kNone;
    }
    sort(keys, count);
  }
}

template <class T>
__device__ void best_of(const T* scores, int64_t n, int64_t k, int64_t room, int64_t* keys, Best best) {
  k_best([scores](int64_t i) { return widen(scores[i]); }, n, k, room, keys);
  for (int64_t r = threadIdx.x; r < k; r += kThreads) {
    best.places[r] = place_of(keys[r]);
    best.scores[r] = widen(scores[best.places[r]]);
  }
  __syncthreads();  // before the keys are overwritten
}

// The exponentials of the scores, which are in descending order, and their sum in terms[0]. `terms` has room for k numbers.
__device__ void softmax(float* scores, int64_t k, float* terms) {
  const float largest = scores[0];
  int64_t half = 1;
  while (2 * half < k) half *= 2;
  __syncthreads();
  for (int64_t r = threadIdx.x; r < k; r += kThreads) terms[r] = scores[r] = expf(scores[r] - largest);
  for (; half > 0; half /= 2) {
    __syncthreads();
    for (int64_t r = threadIdx.x; r < half && r + half < k; r += kThreads) terms[r] += terms[r + half];
    k = half;
  }
  __syncthreads();
}

// At least 4 blocks on a multiprocessor: without this number, ptxas spills registers to fit more.
template <class T>
__global__ void __launch_bounds__(kThreads, 4) topk_of_row(Launch<T> launch) {
  const Topk<T>& job = launch.job;
  const uint32_t* first = launch.first;
  const int64_t k = job.k;
  int64_t* keys = launch.memory + blockIdx.x * launch.words;
  float* values = reinterpret_cast<float*>(keys + launch.room);
  uint32_t* places = reinterpret_cast<uint32_t*>(values + 2 * k);
  const Best best1{values, places}, best2{values + k, places + k};

  // The rank in half 1 of a pair: the last rank whose first pair is not after it.
  const auto rank1 = [first, k](int64_t pair) {
    int64_t low = 0, high = k;
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (first[middle] <= pair ? low : high) = middle;
    }
    return low;
  };
  const auto sum = [&](int64_t pair) {
    const int64_t i = rank1(pair);
    return best1.scores[i] + best2.scores[pair - first[i]];
  };

  for (int64_t row = blockIdx.x; row < job.rows; row += gridDim.x) {
    best_of(job.scores1 + row * job.n1, job.n1, k, launch.room, keys, best1);
    best_of(job.scores2 + row * job.n2, job.n2, k, launch.room, keys, best2);
    k_best(sum, first[k], k, launch.room, keys);
    float* scores = job.scores + row * k;
    for (int64_t r = threadIdx.x; r < k; r += kThreads) {
      const int64_t pair = place_of(keys[r]), i = rank1(pair);
      scores[r] = sum(pair);
      job.indices[row * k + r] = int64_t(best1.places[i]) * job.n2 + best2.places[pair - first[i]];
    }
    __syncthreads();
    float* terms = reinterpret_cast<float*>(keys);
    if (job.softmax) {
      softmax(scores, k, terms);
      for (int64_t r = threadIdx.x; r < k; r += kThreads) scores[r] /= terms[0];
    }
    __syncthreads();  // before the next row overwrites the keys
  }
}

template <class T>
cudaError_t launched(void (*kernel)(Launch<T>), Launch<T> launch, int64_t blocks, cudaStream_t stream) {
  void* arguments[] = {&launch};
  return cudaLaunchKernel(kernel, dim3(unsigned(blocks)), dim3(kThreads), arguments, 0, stream);
}

}  // namespace

template <class T>
const char* topk_large_cuda(const Topk<T>& job, void* stream) {
  const auto queue = static_cast<cudaStream_t>(stream);
  Launch<T> launch{job, kLeastRoom, 0, nullptr, nullptr};
  while (launch.room < 2 * job.k) launch.room *= 2;
  launch.words = launch.room + 2 * job.k;
  int64_t blocks = kMostMemory / int64_t(sizeof(int64_t)) / launch.words;
  blocks = blocks < 1 ? 1 : blocks < kMostBlocks ? blocks : kMostBlocks;
  blocks = job.rows < blocks ? job.rows : blocks;
  void* memory = nullptr;
  cudaError_t error = cudaMallocAsync(&memory, size_t(blocks * launch.words) * sizeof(int64_t) + size_t(job.k + 1) * 4, queue);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  launch.memory = static_cast<int64_t*>(memory);
  launch.first = reinterpret_cast<uint32_t*>(launch.memory + blocks * launch.words);
  error = launched(count_pairs<T>, launch, 1, queue);
  if (error == cudaSuccess) error = launched(topk_of_row<T>, launch, blocks, queue);
  const cudaError_t freed = cudaFreeAsync(memory, queue);
  if (error == cudaSuccess) error = freed;
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

#define INSTANTIATE(T) template const char* topk_large_cuda(const Topk<T>&, void*);
MEMREWRITE_FOR_TYPES(INSTANTIATE)
