// Stochastic rounding of fp32 to fewer bits, as `rounding.py` defines it: up or down with probabilities that make the result
// unbiased. Infinities and NaN do not change. The random bits depend only on seed, row and column.
#pragma once

#include "kernels.h"

// murmur3's finalizers: every bit of the input changes half of the bits of the result.
MEMREWRITE_INLINE uint32_t mixed(uint32_t x) {
  x = (x ^ x >> 16) * 0x85ebca6bu;
  x = (x ^ x >> 13) * 0xc2b2ae35u;
  return x ^ x >> 16;
}

MEMREWRITE_INLINE uint64_t mixed(uint64_t x) {
  x = (x ^ x >> 33) * 0xff51afd7ed558ccdu;
  x = (x ^ x >> 33) * 0xc4ceb9fe1a85ec53u;
  return x ^ x >> 33;
}

// Random bits for the columns of one row. `stream` tells tensors apart.
struct RandomRow {
  uint32_t low, high;

  MEMREWRITE_INLINE RandomRow(uint64_t seed, uint64_t row, uint64_t stream) {
    const uint64_t key = mixed(mixed(seed * 4 + stream) ^ mixed(row + 0x9e3779b97f4a7c15u));
    low = uint32_t(key), high = uint32_t(key >> 32);
  }
  MEMREWRITE_INLINE uint32_t at(int64_t column) const { return mixed(mixed(uint32_t(column) + low) ^ high); }
};

MEMREWRITE_INLINE void narrow(float x, uint32_t, float* y) { *y = x; }

MEMREWRITE_INLINE void narrow(float x, uint32_t random, BFloat16* y) {
  const uint32_t bits = bit_cast<uint32_t>(x), finite = (bits & 0x7f800000u) != 0x7f800000u;
  y->bits = uint16_t(x != x ? 0x7fc0u : (bits + (finite ? random >> 16 : 0u)) >> 16);
}

// A magnitude below the smallest normal number 2^lowest, as a multiple of 2^(lowest - fraction).
template <int lowest, int fraction>
MEMREWRITE_INLINE uint32_t subnormal(float magnitude, uint32_t random) {
  constexpr int kBits = 31 - fraction;  // of a step, that are compared with the random bits
  const float scale = bit_cast<float>(uint32_t(127 + fraction - lowest + kBits) << 23);
  const float scaled = magnitude < bit_cast<float>(uint32_t(127 + lowest) << 23) ? magnitude * scale : 0.0f;
  return (uint32_t(int64_t(scaled)) + (random >> (32 - kBits))) >> kBits;
}

MEMREWRITE_INLINE void narrow(float x, uint32_t random, Half* y) {
  const uint32_t bits = bit_cast<uint32_t>(x), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude - (112u << 23) + (random >> 19)) >> 13;  // may carry into infinity, which is correct
  const uint32_t small = subnormal<-14, 10>(bit_cast<float>(magnitude), random);
  uint32_t half = magnitude < 0x38800000u ? small : normal;
  half = magnitude >= 0x47800000u ? 0x7c00u : half;  // 2^16 and more
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  y->bits = uint16_t(sign | half);
}

// e4m3fn has no infinity: finite numbers are clamped to 448.
MEMREWRITE_INLINE void narrow(float x, uint32_t random, Float8* y) {
  const uint32_t bits = bit_cast<uint32_t>(x), sign = bits >> 24 & 0x80u, magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude - (120u << 23) + (random >> 12)) >> 20;
  const uint32_t small = subnormal<-6, 3>(bit_cast<float>(magnitude), random);
  uint32_t byte = magnitude < 0x3c800000u ? small : normal;
  byte = magnitude >= 0x43e00000u ? 0x7eu : byte;  // 448
  byte = magnitude >= 0x7f800000u ? 0x7fu : byte;
  y->bits = uint8_t(sign | byte);
}
