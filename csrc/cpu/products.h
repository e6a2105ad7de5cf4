// Matrix products on small blocks through the library's micro-kernels, and the layouts these read.
//
// A product is c (m, n) (+)= a (m, k) b (k, n) in fp32 accumulation, a with any row stride, n at most 64, and b "blocked": 64
// columns wide, and in 16 bits with each pair of rows interleaved, (k / 2, 64, 2). One block's worth of rows is contiguous, so
// that its rows do not fall on the same cache sets, as the rows of a wide power-of-two matrix do. The result of a product does
// not depend on who computes it: callers cut the work in blocks of fixed size and share those out among the threads.
#pragma once

#include <ATen/native/CPUBlas.h>

#include <algorithm>

#include "simd.h"

namespace fastclip {

constexpr int64_t kBlock = 64;

template <typename T>
constexpr int64_t kInterleaved = sizeof(T) == 2 ? 2 : 1;  // rows of b

constexpr int64_t ceil_to(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

template <typename T>
void product(int64_t m, int64_t n, int64_t k, const T* a, int64_t lda, const T* b, float* c, int64_t ldc, bool add) {
  at::native::cpublas::brgemm(m, n, k, lda, kBlock, ldc, add, a, b, c, kInterleaved<T> == 2);
}

// Gives back the processor's matrix unit; at the end of every task that called `product`.
template <typename T>
void release() {
  at::native::cpublas::brgemm_release(kInterleaved<T> == 2);
}

// out (k / V, 64, V) = the transpose of rows (count, k), V interleaved: 32-bit words change places. k is a multiple of 16 words;
// columns count..63 are zero.
FASTCLIP_MULTIVERSION void block_transposed(uint32_t* out, const uint32_t* rows, int64_t count, int64_t words) {
  for (int64_t first = 0; first < words; first += kLanes)
    for (int64_t j = 0; j < kBlock; ++j)
      for (int64_t w = first; w < first + kLanes; ++w) out[w * kBlock + j] = j < count ? rows[j * words + w] : 0u;
}

// out (padded / V, 64, V) = columns [0, width) of rows (count, .), row stride ld, V interleaved; rows count..padded-1 are zero.
FASTCLIP_MULTIVERSION void block_rows(float* out, const float* rows, int64_t ld, int64_t count, int64_t width, int64_t padded) {
  for (int64_t i = 0; i < padded; ++i)
    for (int64_t j = 0; j < width; ++j) out[i * kBlock + j] = i < count ? rows[i * ld + j] : 0.f;
}
FASTCLIP_MULTIVERSION void block_rows(c10::BFloat16* out, const c10::BFloat16* rows, int64_t ld, int64_t count, int64_t width,
                                      int64_t padded) {
  const c10::BFloat16 zero(0.f);
  for (int64_t i = 0; i < padded; i += 2) {
    for (int64_t j = 0; j < width; ++j) {
      out[i * kBlock + 2 * j] = i < count ? rows[i * ld + j] : zero;
      out[i * kBlock + 2 * j + 1] = i + 1 < count ? rows[(i + 1) * ld + j] : zero;
    }
  }
}

// out (cols, ld_out) = the transpose of rows (count, cols), row stride ld; entries count..padded-1 of each row of out are zero.
template <typename T>
FASTCLIP_INLINE void transpose_rows(T* out, int64_t ld_out, const T* rows, int64_t ld, int64_t count, int64_t cols, int64_t padded) {
  constexpr int64_t kStep = 16;
  for (int64_t i0 = 0; i0 < padded; i0 += kStep)
    for (int64_t j0 = 0; j0 < cols; j0 += kStep)
      for (int64_t j = j0; j < std::min(j0 + kStep, cols); ++j)
        for (int64_t i = i0; i < std::min(i0 + kStep, padded); ++i) out[j * ld_out + i] = i < count ? rows[i * ld + j] : T(0.f);
}

}  // namespace fastclip
