// The part of CUDA that the kernels use, on the CPU: blocks run one after another, and the threads of a block are fibers that
// switch at every barrier. A barrier that some threads miss aborts the process. Between barriers, threads run in ascending or
// descending order, so that a missing barrier changes the result.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
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
#define __launch_bounds__(threads)
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

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  bool done;
};

inline ucontext_t scheduler;
inline Fiber* running;
inline std::function<void()> body;

// The address sanitizer must know which stack is in use.
inline const void* scheduler_stack;
inline size_t scheduler_size;

inline void leave(bool forever) {
#ifdef __SANITIZE_ADDRESS__
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(forever ? nullptr : &fake, scheduler_stack, scheduler_size);
#endif
  swapcontext(&running->context, &scheduler);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fake, &scheduler_stack, &scheduler_size);
#endif
  (void)forever;
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
  running->done = true;
  leave(true);
}

inline void run_block(std::vector<Fiber>& fibers) {
  for (Fiber& fiber : fibers) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    fiber.done = false;
    makecontext(&fiber.context, trampoline, 0);
  }
  for (size_t done = 0; done < fibers.size();) {
    done = 0;
    for (size_t i = 0; i < fibers.size(); ++i) {
      const size_t thread = upward ? i : fibers.size() - 1 - i;
      threadIdx.x = unsigned(thread);
      enter(fibers[thread]);
      done += fibers[thread].done;
    }
    if (done != 0 && done != fibers.size()) {
      fprintf(stderr, "%zu of %zu threads missed a barrier\n", done, fibers.size());
      abort();
    }
  }
}

}  // namespace cuda_on_cpu

inline void __syncthreads() { cuda_on_cpu::leave(false); }

template <class Job>
cudaError_t cudaLaunchKernel(void (*kernel)(Job), dim3 grid, dim3 block, void** arguments, size_t, cudaStream_t) {
  static std::vector<cuda_on_cpu::Fiber> fibers;
  if (fibers.size() != block.x) fibers = std::vector<cuda_on_cpu::Fiber>(block.x);
  cuda_on_cpu::body = [&] { kernel(*static_cast<Job*>(arguments[0])); };
  gridDim = grid;
  for (unsigned b = 0; b < grid.x; ++b) {
    blockIdx.x = b;
    cuda_on_cpu::run_block(fibers);
  }
  return cudaSuccess;
}
