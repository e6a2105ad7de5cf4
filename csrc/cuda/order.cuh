// Numbers as integers in the same order, for atomic maxima of any sign; 0 is below all.
#pragma once

#include <stdint.h>

namespace fastclip {

__device__ __forceinline__ uint32_t in_order(float x) {
  const uint32_t bits = __float_as_uint(x);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float from_order(uint32_t x) {
  return __uint_as_float(x & 0x80000000u ? x & 0x7fffffffu : ~x);
}

}  // namespace fastclip
