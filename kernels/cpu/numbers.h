// Number types of the operators and the order of scores, for the CPU and CUDA. 16-bit floats are stored as bits.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define MEMREWRITE_BOTH __host__ __device__ __forceinline__
#else
#define MEMREWRITE_BOTH inline __attribute__((always_inline))
#endif

struct Half {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

struct Float8 {  // e4m3fn
  uint8_t bits;
};

template <class To, class From>
MEMREWRITE_BOTH To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

MEMREWRITE_BOTH float widen(float x) { return x; }

MEMREWRITE_BOTH float widen(BFloat16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }

// Without branches and tables, so that compilers can vectorize it.
MEMREWRITE_BOTH float widen(Half x) {
#ifdef __CUDA_ARCH__
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
  return wide;
#else
  const uint32_t exponent = 0x7c00u << 13;
  const uint32_t moved = (uint32_t(x.bits) & 0x7fffu) << 13;
  const uint32_t bits = moved + ((127u - 15u) << 23);
  const uint32_t special = bits + ((128u - 16u) << 23);  // infinity and NaN: the largest exponent
  // A subnormal x is a multiple of 2^-24. It is read from the fraction of 2^-14 + x, which is a normal number, so that the
  // result is exact even if the runtime flushes subnormals to zero.
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(bits + (1u << 23)) - bit_cast<float>(113u << 23));
  const uint32_t found = moved & exponent;
  const uint32_t magnitude = found == exponent ? special : found == 0 ? subnormal : bits;
  return bit_cast<float>(magnitude | (uint32_t(x.bits) & 0x8000u) << 16);
#endif
}

MEMREWRITE_BOTH float widen(Float8 x) {
  const uint32_t moved = (uint32_t(x.bits) & 0x7fu) << 20;
  const uint32_t bits = moved + ((127u - 7u) << 23);
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(bits + (1u << 23)) - bit_cast<float>(121u << 23));  // as above
  const uint32_t magnitude = moved == 0x7fu << 20 ? 0x7fc00000u : moved < 1u << 23 ? subnormal : bits;
  return bit_cast<float>(magnitude | (uint32_t(x.bits) & 0x80u) << 24);
}

// Rounds to the nearest number of the type, ties to even. NaN stays NaN.
MEMREWRITE_BOTH void narrow(float x, float* y) { *y = x; }

MEMREWRITE_BOTH void narrow(float x, BFloat16* y) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  y->bits = uint16_t(x != x ? 0x7fc0u : rounded);
}

MEMREWRITE_BOTH void narrow(float x, Half* y) {
#ifdef __CUDA_ARCH__
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y->bits) : "f"(x));
#else
  const uint32_t bits = bit_cast<uint32_t>(x), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;
  } else if (magnitude >= 0x47800000u) {  // 2^16 and more
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // less than 2^-14: adding 0.5 leaves the rounded bits of the subnormal in the low bits
    half = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - bit_cast<uint32_t>(0.5f);
  } else {
    half = (magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13;  // may carry into infinity, which is correct
  }
  y->bits = uint16_t(sign | half);
#endif
}

// An integer with the order of the scores: -0 equals +0, and NaN is above all other scores.
MEMREWRITE_BOTH int32_t order(float x) {
  const int32_t bits = bit_cast<int32_t>(x + 0.0f);  // -0 becomes +0
  return x != x ? INT32_MAX : bits ^ ((bits >> 31) & INT32_MAX);
}

// A score and its index as one key: larger is better; of equal scores the one with the lower index is larger. Keys are unique.
MEMREWRITE_BOTH int64_t sort_key(int32_t ordered, uint32_t place) {
  return int64_t(uint64_t(uint32_t(ordered)) << 32 | (UINT32_MAX - place));
}

MEMREWRITE_BOTH uint32_t place_of(int64_t key) { return UINT32_MAX - uint32_t(uint64_t(key)); }
