// What the losses do with own pairs, image i and text i, in O(N D), where all of it is one call.
#pragma once

#include "simd.h"

namespace fastclip {

// Whether waking the other threads costs more than they do, for n x m logits of D products.
inline bool is_tiny(int64_t n, int64_t m, int64_t depth) { return n * m * depth <= 1 << 19; }

template <typename T>
FASTCLIP_INLINE float dot(const T* a, const T* b, int64_t depth) {
  Vec total = {};
  for (int64_t d = 0; d < depth; d += kLanes) total += load(a + d) * load(b + d);
  return sum(total);
}

// Adds weight_i other_i to the rows of grad (n, D), multiplies them by the scale, and returns sum_i own_i . grad_i before that.
template <typename T>
FASTCLIP_INLINE double finish_rows(float* grad, const T* own, const T* other, const double* weight, float scale, int64_t n, int64_t depth) {
  double total = 0;
  for (int64_t i = 0; i < n; ++i) {
    Vec product = {};
    for (int64_t d = i * depth; d < (i + 1) * depth; d += kLanes) {
      const Vec g = load(grad + d) + load(other + d) * static_cast<float>(weight[i]);
      product += load(own + d) * g;
      store(grad + d, g * scale);
    }
    total += sum(product);
  }
  return total;
}
FASTCLIP_MULTIVERSION double finish_gradient(float* grad, const float* own, const float* other, const double* weight, float scale, int64_t n,
                                             int64_t depth) {
  return finish_rows(grad, own, other, weight, scale, n, depth);
}
FASTCLIP_MULTIVERSION double finish_gradient(float* grad, const c10::BFloat16* own, const c10::BFloat16* other, const double* weight,
                                             float scale, int64_t n, int64_t depth) {
  return finish_rows(grad, own, other, weight, scale, n, depth);
}

// out_i = a_i . b_i
FASTCLIP_MULTIVERSION void row_dots(double* out, const float* a, const float* b, int64_t n, int64_t depth) {
  for (int64_t i = 0; i < n; ++i) out[i] = dot(a + i * depth, b + i * depth, depth);
}
FASTCLIP_MULTIVERSION void row_dots(double* out, const c10::BFloat16* a, const c10::BFloat16* b, int64_t n, int64_t depth) {
  for (int64_t i = 0; i < n; ++i) out[i] = dot(a + i * depth, b + i * depth, depth);
}

}  // namespace fastclip
