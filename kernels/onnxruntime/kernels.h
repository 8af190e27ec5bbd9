// The interface between `ops.cpp` and the kernels of each provider: their arguments, which are already checked, and their
// declarations.
#pragma once

#include "../cpu/kernels.h"

// The same as `Lookup` without a scale, for a kernel of these types.
template <class T, class I>
struct CudaLookup {
  const T* values;   // [slots, width]
  const I* indices;  // [tokens, reads]
  Floats weights;    // [tokens, reads]
  T* y;              // [tokens, width]
  int64_t slots, width, tokens, reads;
};

// Launched on a stream; returns nullptr, or CUDA's error message.
template <class T, class I>
const char* lookup_cuda(const CudaLookup<T, I>& job, void* stream);

template <class T>
const char* topk_cuda(const Topk<T>& job, void* stream);

// The same for all sizes, in temporary memory that it allocates on the stream.
template <class T>
const char* topk_large_cuda(const Topk<T>& job, void* stream);

// The element types of both operators, for explicit instantiation.
#define MEMREWRITE_FOR_TYPES(DO) DO(float) DO(Half) DO(BFloat16)
