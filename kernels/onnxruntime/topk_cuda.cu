// ProductKeyTopk on CUDA: one block for each row. One routine, the k best of a list of scores, is used for each half and for
// the sums.
//
// Shared memory has room for kRoom keys: the best keys so far are sorted together with new ones, until all scores are read.
#include "kernels.h"

namespace {

constexpr int kThreads = 256;
constexpr int kRoom = 2 * kMostKCuda;  // keys sorted at once
constexpr int64_t kMostBlocks = INT32_MAX;
constexpr int64_t kNone = INT64_MIN;  // below the key of every score

template <class T>
struct Launch {
  Topk<T> job;
  uint16_t first[kMostKCuda + 1];  // the number of the first pair of each rank in half 1; k = 1024 has 7,000 pairs
};

// Sorts `count` keys (a power of two) in descending order, by Batcher's bitonic sort.
__device__ void sort(int64_t* keys, int count) {
  for (int size = 2; size <= count; size *= 2) {
    for (int distance = size / 2; distance > 0; distance /= 2) {
      __syncthreads();
      for (int i = threadIdx.x; i < count / 2; i += kThreads) {
        const int low = i / distance * 2 * distance + i % distance, high = low + distance;
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
__device__ void k_best(Score score, int64_t n, int k, int64_t* keys) {
  int kept = 0;
  for (int64_t begin = 0; begin < n; begin += kRoom - kept, kept = k) {
    const int fresh = int(n - begin < kRoom - kept ? n - begin : kRoom - kept);
    int count = 1;
    while (count < kept + fresh) count *= 2;
    for (int i = threadIdx.x; i < count - kept; i += kThreads) {
      keys[kept + i] = i < fresh ? sort_key(order(score(begin + i)), uint32_t(begin + i)) : kNone;
    }
    sort(keys, count);
  }
}

// The k best of one half: their scores and their indices.
struct Best {
  float scores[kMostKCuda];
  uint32_t places[kMostKCuda];
};

// The k best of one half.
template <class T>
__device__ void best_of(const T* scores, int64_t n, int k, int64_t* keys, Best* best) {
  k_best([scores](int64_t i) { return widen(scores[i]); }, n, k, keys);
  for (int r = threadIdx.x; r < k; r += kThreads) {
    best->places[r] = place_of(keys[r]);
    best->scores[r] = widen(scores[best->places[r]]);
  }
  __syncthreads();  // before the keys are overwritten
}

// The exponentials of the scores, which are in descending order, and their sum in terms[0]. `terms` has room for k numbers.
__device__ void softmax(float* scores, int k, float* terms) {
  const float largest = scores[0];
  int half = 1;
  while (2 * half < k) half *= 2;
  __syncthreads();
  for (int r = threadIdx.x; r < k; r += kThreads) terms[r] = scores[r] = expf(scores[r] - largest);
  for (; half > 0; half /= 2) {
    __syncthreads();
    for (int r = threadIdx.x; r < half && r + half < k; r += kThreads) terms[r] += terms[r + half];
    k = half;
  }
  __syncthreads();
}

template <class T>
__global__ void __launch_bounds__(kThreads) topk(Launch<T> launch) {
  __shared__ int64_t keys[kRoom];
  __shared__ Best best1, best2;
  __shared__ float scores[kMostKCuda];
  const Topk<T>& job = launch.job;
  const uint16_t* first = launch.first;
  const int k = int(job.k);

  // The rank in half 1 of a pair: the last rank whose first pair is not after it.
  const auto rank1 = [first, k](int64_t pair) {
    int low = 0, high = k;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (first[middle] <= pair ? low : high) = middle;
    }
    return low;
  };
  const auto sum = [&](int64_t pair) {
    const int i = rank1(pair);
    return best1.scores[i] + best2.scores[pair - first[i]];
  };

  for (int64_t row = blockIdx.x; row < job.rows; row += gridDim.x) {
    best_of(job.scores1 + row * job.n1, job.n1, k, keys, &best1);
    best_of(job.scores2 + row * job.n2, job.n2, k, keys, &best2);
    k_best(sum, first[k], k, keys);
    for (int r = threadIdx.x; r < k; r += kThreads) {
      const int64_t pair = place_of(keys[r]);
      const int i = rank1(pair);
      scores[r] = sum(pair);
      job.indices[row * k + r] = int64_t(best1.places[i]) * job.n2 + best2.places[pair - first[i]];
    }
    __syncthreads();
    float* terms = reinterpret_cast<float*>(keys);
    if (job.softmax) softmax(scores, k, terms);
    for (int r = threadIdx.x; r < k; r += kThreads) job.scores[row * k + r] = job.softmax ? scores[r] / terms[0] : scores[r];
    __syncthreads();  // before the next row overwrites the keys
  }
}

}  // namespace

template <class T>
const char* topk_cuda(const Topk<T>& job, void* stream) {
  if (job.rows == 0) return nullptr;
  Launch<T> launch{job, {}};
  for (int64_t i = 0; i < job.k; ++i) launch.first[i + 1] = uint16_t(launch.first[i] + job.k / (i + 1));
  void* arguments[] = {&launch};
  const cudaError_t error = cudaLaunchKernel(topk<T>, dim3(unsigned(job.rows < kMostBlocks ? job.rows : kMostBlocks)),
                                             dim3(kThreads), arguments, 0, static_cast<cudaStream_t>(stream));
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

#define INSTANTIATE(T) template const char* topk_cuda(const Topk<T>&, void*);
MEMREWRITE_FOR_TYPES(INSTANTIATE)
