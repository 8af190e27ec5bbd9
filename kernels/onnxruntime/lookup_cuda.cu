// SparseLookup on CUDA: one block for each token and range of its columns; groups of threads share the token's rows.
//
// A block has kThreads / across groups of `across` threads, and each thread sums one vector of columns. Group g sums the rows
// g, g + groups, ..., and the groups' sums are added at the end. Indices and weights are staged in shared memory, kThreads at a
// time.
#include "kernels.h"

namespace {

constexpr int kThreads = 256;
constexpr int kFlying = 8;         // loads in flight per thread: random rows have a high latency
constexpr int kMostGroups = 32;    // with kThreads / kMostGroups = 8 threads across
constexpr int kFewBlocks = 512;    // with fewer blocks, multiprocessors would be idle
constexpr int64_t kMostBlocks = INT32_MAX;

template <int Bytes>
struct Packed;
template <>
struct Packed<16> {
  using Type = uint4;
};
template <>
struct Packed<4> {
  using Type = uint32_t;
};
template <>
struct Packed<2> {
  using Type = uint16_t;
};

// One vector, or zeros if `present` is false. There is no branch, so that several loads are in flight, and the load bypasses
// the L1 cache, since no other block is likely to read the same row.
__device__ __forceinline__ uint4 read(const uint4* from, bool present) {
#ifdef __CUDA_ARCH__
  uint4 bits{};
  asm volatile(
      "{ .reg .pred present; setp.ne.u32 present, %5, 0;\n"
      "  @present ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4]; }"
      : "+r"(bits.x), "+r"(bits.y), "+r"(bits.z), "+r"(bits.w)
      : "l"(from), "r"(unsigned(present)));
  return bits;
#else
  return present ? *from : uint4{};
#endif
}

template <class P>
__device__ __forceinline__ P read(const P* from, bool present) {
  return present ? *from : P{};
}

template <int V, class T, class I>
struct Launch {
  CudaLookup<T, I> job;
  int across;      // threads, a power of two
  int64_t ranges;  // of columns: blocks for each token
};

// V columns for each thread: 16 bytes, or one column if rows are not aligned to 16 bytes.
template <int V, class T, class I>
__global__ void __launch_bounds__(kThreads) lookup(Launch<V, T, I> launch) {
  using Vector = typename Packed<V * sizeof(T)>::Type;
  __shared__ int64_t rows[kThreads + kFlying * kMostGroups];  // offset of a row, or -1
  __shared__ float weights[kThreads + kFlying * kMostGroups];
  __shared__ float sums[kThreads][V];
  const CudaLookup<T, I>& job = launch.job;
  const int thread = threadIdx.x, groups = kThreads / launch.across;
  const int group = thread / launch.across, lane = thread % launch.across;

  for (int64_t unit = blockIdx.x; unit < job.tokens * launch.ranges; unit += gridDim.x) {
    const int64_t token = unit / launch.ranges;
    const int64_t column = (unit % launch.ranges * launch.across + lane) * V;
    const bool inside = column < job.width;
    float sum[V] = {};
    for (int64_t begin = 0; begin < job.reads; begin += kThreads) {
      const int count = int(job.reads - begin < kThreads ? job.reads - begin : kThreads);
      __syncthreads();  // other threads may still read the previous chunk or unit
      for (int j = thread; j < kThreads + kFlying * groups; j += kThreads) {
        const int64_t at = token * job.reads + begin + j;
        const int64_t index = j < count ? int64_t(job.indices[at]) : -1;
        const bool valid = uint64_t(index) < uint64_t(job.slots);
        rows[j] = valid ? index * job.width : -1;
        weights[j] = valid ? job.weights.read(at) : j < count ? NAN : 0.0f;  // an index outside the table: NaN
      }
      __syncthreads();
      for (int j = group; j < count; j += kFlying * groups) {
        Vector bits[kFlying];
#pragma unroll
        for (int f = 0; f < kFlying; ++f) {
          const int64_t row = rows[j + f * groups];
          bits[f] = read(reinterpret_cast<const Vector*>(job.values + row + column), inside && row >= 0);
        }
#pragma unroll
        for (int f = 0; f < kFlying; ++f) {
          T numbers[V];
          memcpy(numbers, &bits[f], sizeof numbers);
#pragma unroll
          for (int v = 0; v < V; ++v) sum[v] += weights[j + f * groups] * widen(numbers[v]);
        }
      }
    }
    if (groups > 1) {
      __syncthreads();
#pragma unroll
      for (int v = 0; v < V; ++v) sums[thread][v] = sum[v];
      __syncthreads();
      if (group > 0) continue;
      for (int g = 1; g < groups; ++g) {
#pragma unroll
        for (int v = 0; v < V; ++v) sum[v] += sums[g * launch.across + lane][v];
      }
    }
    if (!inside || group > 0) continue;
    T numbers[V];
#pragma unroll
    for (int v = 0; v < V; ++v) narrow(sum[v], &numbers[v]);
    Vector bits;
    memcpy(&bits, numbers, sizeof bits);
    *reinterpret_cast<Vector*>(job.y + token * job.width + column) = bits;
  }
}

template <int V, class T, class I>
const char* start(const CudaLookup<T, I>& job, void* stream) {
  const int64_t vectors = (job.width + V - 1) / V;
  const auto blocks = [&](int across) { return job.tokens * ((vectors + across - 1) / across); };
  int across = kThreads / kMostGroups;
  while (across < kThreads && across < vectors && blocks(2 * across) >= kFewBlocks) across *= 2;
  while (across < 32 && across < vectors) across *= 2;  // a warp reads one row, even with few tokens
  Launch<V, T, I> launch{job, across, (vectors + across - 1) / across};
  const int64_t units = blocks(across);
  void* arguments[] = {&launch};
  const cudaError_t error = cudaLaunchKernel(lookup<V, T, I>, dim3(unsigned(units < kMostBlocks ? units : kMostBlocks)),
                                             dim3(kThreads), arguments, 0, static_cast<cudaStream_t>(stream));
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

}  // namespace

template <class T, class I>
const char* lookup_cuda(const CudaLookup<T, I>& job, void* stream) {
  constexpr int kVector = 16 / sizeof(T);
  if (job.tokens == 0 || job.width == 0) return nullptr;
  const bool whole = job.width % kVector == 0 && aligned(job.values) && aligned(job.y);
  return whole ? start<kVector>(job, stream) : start<1>(job, stream);
}

#define INSTANTIATE(T)                                               \
  template const char* lookup_cuda(const CudaLookup<T, int64_t>&, void*); \
  template const char* lookup_cuda(const CudaLookup<T, int32_t>&, void*);
MEMREWRITE_FOR_TYPES(INSTANTIATE)
