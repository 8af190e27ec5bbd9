// SparseLookup on CUDA: one block a token and a range of its columns; groups of threads share the token's rows.
//
// A block is `across` threads wide, each summing one vector of columns, and kThreads / across groups deep; group g sums every
// rows g, g + groups, ... and the groups' sums are added at the end. Indices and weights come through shared memory, kThreads at
// a time.
#include "kernels.h"

namespace {

constexpr int kThreads = 256;
constexpr int kFlying = 8;         // rows that a thread reads before it sums: random rows take long to come
constexpr int kMostGroups = 32;    // with kThreads / kMostGroups = 8 threads across
constexpr int kFewBlocks = 512;    // fewer would leave multiprocessors idle
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

// One vector, or zeros where there is none to be read. Without a branch, so that several are under way at once, and past the
// first cache, since no other block waits for the same row.
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
  Lookup<T, I> job;
  int across;      // threads, a power of two
  int64_t ranges;  // of columns: blocks a token
};

// V columns a thread: 16 bytes, or one where rows do not begin at multiples of 16 bytes.
template <int V, class T, class I>
__global__ void __launch_bounds__(kThreads) lookup(Launch<V, T, I> launch) {
  using Vector = typename Packed<V * sizeof(T)>::Type;
  __shared__ int64_t rows[kThreads + kFlying * kMostGroups];  // where a row begins, or -1
  __shared__ float weights[kThreads + kFlying * kMostGroups];
  __shared__ float sums[kThreads][V];
  const Lookup<T, I>& job = launch.job;
  const int thread = threadIdx.x, groups = kThreads / launch.across;
  const int group = thread / launch.across, lane = thread % launch.across;

  for (int64_t unit = blockIdx.x; unit < job.tokens * launch.ranges; unit += gridDim.x) {
    const int64_t token = unit / launch.ranges;
    const int64_t column = (unit % launch.ranges * launch.across + lane) * V;
    const bool inside = column < job.width;
    float sum[V] = {};
    for (int64_t begin = 0; begin < job.reads; begin += kThreads) {
      const int count = int(job.reads - begin < kThreads ? job.reads - begin : kThreads);
      __syncthreads();  // what the last chunk, or the last unit, still reads
      for (int j = thread; j < kThreads + kFlying * groups; j += kThreads) {
        const int64_t at = token * job.reads + begin + j;
        const int64_t index = j < count ? int64_t(job.indices[at]) : -1;
        const bool valid = uint64_t(index) < uint64_t(job.slots);
        rows[j] = valid ? index * job.width : -1;
        weights[j] = valid ? widen(job.weights[at]) : j < count ? NAN : 0.0f;  // of no row: NaN shows it
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
const char* start(const Lookup<T, I>& job, void* stream) {
  const int64_t vectors = (job.width + V - 1) / V;
  const auto blocks = [&](int across) { return job.tokens * ((vectors + across - 1) / across); };
  int across = kThreads / kMostGroups;
  while (across < kThreads && across < vectors && blocks(2 * across) >= kFewBlocks) across *= 2;
  while (across < 32 && across < vectors) across *= 2;  // a warp reads one row, however few the tokens
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
const char* lookup_cuda(const Lookup<T, I>& job, void* stream) {
  constexpr int kVector = 16 / sizeof(T);
  if (job.tokens == 0 || job.width == 0) return nullptr;
  const bool whole = job.width % kVector == 0 && aligned(job.values) && aligned(job.y);
  return whole ? start<kVector>(job, stream) : start<1>(job, stream);
}

#define INSTANTIATE(T)                                               \
  template const char* lookup_cuda(const Lookup<T, int64_t>&, void*); \
  template const char* lookup_cuda(const Lookup<T, int32_t>&, void*);
MEMREWRITE_FOR_TYPES(INSTANTIATE)
