// The part of CUDA that the kernels use, on the CPU: blocks run one after another, and the threads of a block are fibers that
// switch at every barrier, of their block or of their warp. A barrier that some threads miss aborts the process. Between
// barriers, threads run in ascending or descending order, so that a missing barrier changes the result.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

struct dim3 {
  unsigned x, y = 1, z = 1;
  explicit dim3(unsigned length = 1) : x(length) {}
};

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }

inline dim3 threadIdx, blockIdx, gridDim;

namespace cuda_on_cpu {

inline bool upward = true;  // the order of threads between barriers
constexpr size_t kStack = 1 << 16;
constexpr size_t kLanes = 32;  // of a warp

enum State { READY, AT_WARP_BARRIER, AT_BLOCK_BARRIER, DONE };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  State state;
  uint64_t lent;  // to the other lanes of the warp
};

inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline Fiber* running;
inline std::function<void()> body;

// The address sanitizer must know which stack is in use.
inline const void* scheduler_stack;
inline size_t scheduler_size;

inline void leave(State state) {
  running->state = state;
#ifdef __SANITIZE_ADDRESS__
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(state == DONE ? nullptr : &fake, scheduler_stack, scheduler_size);
#endif
  swapcontext(&running->context, &scheduler);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fake, &scheduler_stack, &scheduler_size);
#endif
}

inline void enter(Fiber& fiber) {
  running = &fiber;
#ifdef __SANITIZE_ADDRESS__
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, fiber.stack.get(), kStack);
#endif
  swapcontext(&scheduler, &fiber.context);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

inline void trampoline() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_size);
#endif
  body();
  leave(DONE);
}

// The state that all fibers from `begin` to `end` are in.
inline State common_state(size_t begin, size_t end) {
  for (size_t i = begin; i < end; ++i) {
    if (fibers[i].state == fibers[begin].state) continue;
    fprintf(stderr, "threads %zu and %zu of a %s are not at the same barrier\n", begin, i, end - begin > kLanes ? "block" : "warp");
    abort();
  }
  return fibers[begin].state;
}

// Runs a warp up to a barrier of the block, or to the end.
inline void run_warp(size_t begin) {
  const size_t lanes = std::min(kLanes, fibers.size() - begin);
  do {
    for (size_t i = 0; i < lanes; ++i) {
      const size_t thread = begin + (upward ? i : lanes - 1 - i);
      threadIdx.x = unsigned(thread);
      enter(fibers[thread]);
    }
  } while (common_state(begin, begin + lanes) == AT_WARP_BARRIER);
}

inline void run_block() {
  for (Fiber& fiber : fibers) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    fiber.state = READY;
    makecontext(&fiber.context, trampoline, 0);
  }
  const size_t warps = (fibers.size() + kLanes - 1) / kLanes;
  do {
    for (size_t i = 0; i < warps; ++i) run_warp(kLanes * (upward ? i : warps - 1 - i));
  } while (common_state(0, fibers.size()) != DONE);
}

// What `lane` of this warp lends in the same call.
inline uint64_t borrow(uint64_t lent, size_t lane) {
  const size_t thread = threadIdx.x;
  running->lent = lent;
  leave(AT_WARP_BARRIER);
  const uint64_t found = fibers[thread / kLanes * kLanes + lane].lent;
  leave(AT_WARP_BARRIER);
  return found;
}

}  // namespace cuda_on_cpu

inline void __syncthreads() { cuda_on_cpu::leave(cuda_on_cpu::AT_BLOCK_BARRIER); }
inline void __syncwarp() { cuda_on_cpu::leave(cuda_on_cpu::AT_WARP_BARRIER); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }

template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  bits = cuda_on_cpu::borrow(bits, size_t(lane));
  memcpy(&value, &bits, sizeof value);
  return value;
}

template <class T>
T __shfl_xor_sync(unsigned all, T value, int distance) {
  return __shfl_sync(all, value, int(threadIdx.x % cuda_on_cpu::kLanes) ^ distance);
}

inline unsigned __ballot_sync(unsigned all, bool value) {
  unsigned votes = 0;
  for (int lane = 0; lane < int(cuda_on_cpu::kLanes); ++lane) votes |= unsigned(__shfl_sync(all, value, lane)) << lane;
  return votes;
}

inline cudaError_t cudaMallocAsync(void** memory, size_t bytes, cudaStream_t) {
  *memory = malloc(bytes);
  memset(*memory, 0xff, bytes);
  return cudaSuccess;
}

inline cudaError_t cudaFreeAsync(void* memory, cudaStream_t) {
  free(memory);
  return cudaSuccess;
}

template <class Job>
cudaError_t cudaLaunchKernel(void (*kernel)(Job), dim3 grid, dim3 block, void** arguments, size_t, cudaStream_t) {
  using cuda_on_cpu::fibers;
  if (fibers.size() != block.x) fibers = std::vector<cuda_on_cpu::Fiber>(block.x);
  cuda_on_cpu::body = [&] { kernel(*static_cast<Job*>(arguments[0])); };
  gridDim = grid;
  for (unsigned b = 0; b < grid.x; ++b) {
    blockIdx.x = b;
    cuda_on_cpu::run_block();
  }
  return cudaSuccess;
}
