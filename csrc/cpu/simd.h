// One processor register of fp32 lanes in GCC's vector extension, and the few small products that CLIP's ops need on them.
//
// The sources are compiled twice (fastclip/ops/_extension.py): with sixteen lanes for AVX-512 alone, and with eight for
// everything else. Vectors wider than a register live in memory: sixteen lanes under AVX2 took six to eight times as long as eight.
// In the library of eight everything is always_inline: a function marked FASTCLIP_MULTIVERSION that calls it is compiled
// for AVX2 and for any x86-64 (or ARM), and the loader picks the right one.
#pragma once

#include <c10/util/BFloat16.h>

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#define FASTCLIP_LANES 16
#define FASTCLIP_MULTIVERSION inline
#elif defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define FASTCLIP_LANES 8
#define FASTCLIP_MULTIVERSION __attribute__((target_clones("arch=x86-64-v3", "default")))
#else
#define FASTCLIP_LANES 8
#define FASTCLIP_MULTIVERSION inline
#endif
#define FASTCLIP_INLINE static inline __attribute__((always_inline))

#pragma GCC diagnostic ignored "-Wpsabi"

namespace fastclip {

constexpr int64_t kLanes = FASTCLIP_LANES;
typedef float Vec __attribute__((vector_size(4 * FASTCLIP_LANES), aligned(4), may_alias));
typedef int32_t IVec __attribute__((vector_size(4 * FASTCLIP_LANES)));
typedef uint32_t UVec __attribute__((vector_size(4 * FASTCLIP_LANES)));
typedef uint16_t HVec __attribute__((vector_size(2 * FASTCLIP_LANES), aligned(2), may_alias));
constexpr int64_t kWide = kLanes / 4;  // vectors of a row in one block of a product, as many as there are registers for

FASTCLIP_INLINE int64_t round_up(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }
FASTCLIP_INLINE Vec load(const float* p) { return *reinterpret_cast<const Vec*>(p); }
FASTCLIP_INLINE void store(float* p, Vec v) { *reinterpret_cast<Vec*>(p) = v; }
FASTCLIP_INLINE Vec splat(float x) { return Vec{} + x; }
FASTCLIP_INLINE Vec maximum(Vec a, Vec b) { return a > b ? a : b; }

FASTCLIP_INLINE Vec load(const c10::BFloat16* p) {
  return (Vec)(__builtin_convertvector(*reinterpret_cast<const HVec*>(p), UVec) << 16);
}
// The nearest bfloat16, ties to even; a NaN stays a NaN.
FASTCLIP_INLINE Vec rounded(Vec v) {
  const UVec bits = (UVec)v;
  const UVec nearest = bits + 0x7fff + ((bits >> 16) & 1);
  return (Vec)((v == v ? nearest : bits | 0x400000u) & 0xffff0000u);
}
FASTCLIP_INLINE void store_rounded(c10::BFloat16* p, Vec v) {
  *reinterpret_cast<HVec*>(p) = __builtin_convertvector((UVec)v >> 16, HVec);
}
FASTCLIP_INLINE void store(c10::BFloat16* p, Vec v) { store_rounded(p, rounded(v)); }
FASTCLIP_INLINE void store_exact(float* p, Vec v) { store(p, v); }
FASTCLIP_INLINE void store_exact(c10::BFloat16* p, Vec v) { store_rounded(p, v); }

// Interleaves two that are `rounded`: out[2 j] = a[j], out[2 j + 1] = b[j].
FASTCLIP_INLINE void store_rounded_pairs(c10::BFloat16* p, Vec a, Vec b) {
  store(reinterpret_cast<float*>(p), (Vec)((UVec)a >> 16 | (UVec)b));
}

// kLanes rows of as many become their columns: blocks of 1, 2, 4 (and 8) on both sides of the diagonal change places in turn.
template <int HALF>
FASTCLIP_INLINE void exchange(Vec* rows) {
  IVec low, high;
  for (int e = 0; e < kLanes; ++e) {
    low[e] = e & HALF ? kLanes + e - HALF : e;
    high[e] = e & HALF ? kLanes + e : e + HALF;
  }
  for (int i = 0; i < kLanes; ++i) {
    if (i & HALF) continue;
    const Vec a = rows[i], b = rows[i + HALF];
    rows[i] = __builtin_shuffle(a, b, low);
    rows[i + HALF] = __builtin_shuffle(a, b, high);
  }
}
FASTCLIP_INLINE void transpose(Vec* rows) {
  exchange<1>(rows);
  exchange<2>(rows);
  exchange<4>(rows);
#if FASTCLIP_LANES == 16
  exchange<8>(rows);
#endif
}

FASTCLIP_INLINE float sum(Vec v) {
  float total = 0.f;
  for (int64_t i = 0; i < kLanes; ++i) total += v[i];
  return total;
}
FASTCLIP_INLINE float maximum(Vec v) {
  float best = v[0];
  for (int64_t i = 1; i < kLanes; ++i) best = best > v[i] || best != best ? best : v[i];
  return best;
}

// e^x to 1 ulp or so: x = n ln 2 + r, a polynomial for e^r, n into the exponent. Below -87.3 it is 0.
FASTCLIP_INLINE Vec exponential(Vec x) {
  const Vec clamped = x < -87.3f ? splat(-87.3f) : (x > 88.f ? splat(88.f) : x);
  const Vec n = clamped * 1.44269504f + 12582912.f;  // round to an integer by the mantissa's end
  const Vec whole = n - 12582912.f;
  const Vec r = (clamped - whole * 0.693359375f) + whole * 2.12194440e-4f;
  Vec y = splat(1.9875691500e-4f);
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1.f;
  const Vec scaled = (Vec)((IVec)y + (__builtin_convertvector(whole, IVec) << 23));
  const Vec result = x < -87.3f ? Vec{} : scaled;
  return x == x ? result : x;
}

template <typename scalar_t>
FASTCLIP_INLINE void widen(float* out, const scalar_t* in, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, load(in + i));
  for (; i < n; ++i) out[i] = static_cast<float>(in[i]);
}
template <typename scalar_t>
FASTCLIP_INLINE void narrow(scalar_t* out, const float* in, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, load(in + i));
  for (; i < n; ++i) out[i] = static_cast<scalar_t>(in[i]);
}

template <int ROWS, int COLS>
FASTCLIP_INLINE void gemm_block(float* c, int64_t ldc, const float* a, int64_t a_row, int64_t a_col, const float* b, int64_t ldb, int64_t k) {
  Vec acc[ROWS][COLS] = {};
  for (int64_t p = 0; p < k; ++p) {
    Vec right[COLS];
    for (int j = 0; j < COLS; ++j) right[j] = load(b + p * ldb + j * kLanes);
    for (int i = 0; i < ROWS; ++i) {
      const Vec left = splat(a[i * a_row + p * a_col]);
      for (int j = 0; j < COLS; ++j) acc[i][j] += left * right[j];
    }
  }
  for (int i = 0; i < ROWS; ++i)
    for (int j = 0; j < COLS; ++j) store(c + i * ldc + j * kLanes, acc[i][j]);
}

template <int ROWS>
FASTCLIP_INLINE void gemm_rows(float* c, int64_t ldc, const float* a, int64_t a_row, int64_t a_col, const float* b, int64_t ldb, int64_t n,
                               int64_t k) {
  int64_t j = 0;
  if constexpr (kWide == 4)
    for (; j + 4 * kLanes <= n; j += 4 * kLanes) gemm_block<ROWS, 4>(c + j, ldc, a, a_row, a_col, b + j, ldb, k);
  for (; j + 2 * kLanes <= n; j += 2 * kLanes) gemm_block<ROWS, 2>(c + j, ldc, a, a_row, a_col, b + j, ldb, k);
  for (; j < n; j += kLanes) gemm_block<ROWS, 1>(c + j, ldc, a, a_row, a_col, b + j, ldb, k);
}

// c (m, n) = a (m, k) b (k, n) in fp32, n a multiple of kLanes; a is read through its two strides, so it may be transposed.
FASTCLIP_INLINE void gemm(float* c, int64_t ldc, const float* a, int64_t a_row, int64_t a_col, const float* b, int64_t ldb, int64_t m, int64_t n,
                          int64_t k) {
  int64_t i = 0;
  for (; i + 4 <= m; i += 4) gemm_rows<4>(c + i * ldc, ldc, a + i * a_row, a_row, a_col, b, ldb, n, k);
  for (; i + 2 <= m; i += 2) gemm_rows<2>(c + i * ldc, ldc, a + i * a_row, a_row, a_col, b, ldb, n, k);
  if (i < m) gemm_rows<1>(c + i * ldc, ldc, a + i * a_row, a_row, a_col, b, ldb, n, k);
}

}  // namespace fastclip
