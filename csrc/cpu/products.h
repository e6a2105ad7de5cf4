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
constexpr int64_t kChain = 128;  // terms of one running fp32 sum: a longer one loses digits that the logits' exponential shows

template <typename T>
constexpr int64_t kInterleaved = sizeof(T) == 2 ? 2 : 1;  // rows of b

constexpr int64_t ceil_to(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

template <typename T>
void product(int64_t m, int64_t n, int64_t k, const T* a, int64_t lda, const T* b, float* c, int64_t ldc, bool add) {
  const int64_t step = sizeof(T) == 2 ? k : kChain;
  for (int64_t from = 0; from < k; from += step)
    at::native::cpublas::brgemm(m, n, std::min(step, k - from), lda, kBlock, ldc, add || from > 0, a + from, b + from * kBlock, c,
                                kInterleaved<T> == 2);
}

// Gives back the processor's matrix unit; at the end of every task that called `product`.
template <typename T>
void release() {
  at::native::cpublas::brgemm_release(kInterleaved<T> == 2);
}

// out (cols, .) = the transpose of rows (count, cols), row strides ld_out and ld; entries count..padded-1 of each row of out are
// zero.
template <typename T>
FASTCLIP_INLINE void transpose_blocks(T* out, int64_t ld_out, const T* rows, int64_t ld, int64_t count, int64_t cols, int64_t padded) {
  for (int64_t i = 0; i < padded; i += kLanes)
    for (int64_t j = 0; j < cols; j += kLanes) {
      if (i + kLanes > padded || j + kLanes > cols) {
        for (int64_t c = j; c < std::min(j + kLanes, cols); ++c)
          for (int64_t r = i; r < std::min(i + kLanes, padded); ++r) out[c * ld_out + r] = r < count ? rows[r * ld + c] : T(0.f);
        continue;
      }
      Vec block[kLanes];
      for (int64_t r = 0; r < kLanes; ++r) block[r] = i + r < count ? load(rows + (i + r) * ld + j) : Vec{};
      transpose(block);
      for (int64_t r = 0; r < kLanes; ++r) store_exact(out + (j + r) * ld_out + i, block[r]);
    }
}
FASTCLIP_MULTIVERSION void transpose_rows(float* out, int64_t ld_out, const float* rows, int64_t ld, int64_t count, int64_t cols,
                                          int64_t padded) {
  transpose_blocks(out, ld_out, rows, ld, count, cols, padded);
}
FASTCLIP_MULTIVERSION void transpose_rows(c10::BFloat16* out, int64_t ld_out, const c10::BFloat16* rows, int64_t ld, int64_t count,
                                          int64_t cols, int64_t padded) {
  transpose_blocks(out, ld_out, rows, ld, count, cols, padded);
}

// out (k / V, 64, V) = the transpose of rows (count, k), V interleaved: 32-bit words change places, `words` to a row, a multiple
// of 16. Columns count..63 are zero.
inline void block_transposed(float* out, const float* rows, int64_t count, int64_t words) {
  transpose_rows(out, kBlock, rows, words, count, words, kBlock);
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

}  // namespace fastclip
