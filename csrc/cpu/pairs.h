// What the losses do with own pairs, image i and text i, in O(N D), where all of it is one call.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>  // methods alone: the headers of at::empty and its like take 5 s of every file

#include <numeric>
#include <vector>

#include "simd.h"

namespace fastclip {

// Whether waking the other threads costs more than they do, for n x m logits of D products.
inline bool is_tiny(int64_t n, int64_t m, int64_t depth) { return n * m * depth <= 1 << 20; }

// x with `count` zeros behind its last dimension.
inline at::Tensor zero_padded(const at::Tensor& x, int64_t count) {
  auto sizes = x.sizes().vec();
  sizes.back() += count;
  auto out = x.new_zeros(sizes);
  out.narrow(-1, 0, x.size(-1)).copy_(x);
  return out;
}

template <typename T>
FASTCLIP_INLINE float dot(const T* a, const T* b, int64_t depth) {
  Vec total = {};
  for (int64_t d = 0; d < depth; d += kLanes) total += load(a + d) * load(b + d);
  return sum(total);
}

// Adds weight_i other_i to the rows of grad (n, D), after writing own_i . grad_i to dots multiplies them by the scale.
template <typename T>
FASTCLIP_INLINE void finish(float* grad, const T* own, const T* other, const double* weight, float scale, double* dots, int64_t n, int64_t depth) {
  for (int64_t i = 0; i < n; ++i) {
    Vec product = {};
    for (int64_t d = i * depth; d < (i + 1) * depth; d += kLanes) {
      const Vec g = load(grad + d) + load(other + d) * static_cast<float>(weight[i]);
      product += load(own + d) * g;
      store(grad + d, g * scale);
    }
    dots[i] = sum(product);
  }
}
FASTCLIP_MULTIVERSION void finish_rows(float* grad, const float* own, const float* other, const double* weight, float scale, double* dots,
                                       int64_t n, int64_t depth) {
  finish(grad, own, other, weight, scale, dots, n, depth);
}
FASTCLIP_MULTIVERSION void finish_rows(float* grad, const c10::BFloat16* own, const c10::BFloat16* other, const double* weight, float scale,
                                       double* dots, int64_t n, int64_t depth) {
  finish(grad, own, other, weight, scale, dots, n, depth);
}

// The same in parallel; returns the sum of the dots.
template <typename T>
double finish_gradient(float* grad, const T* own, const T* other, const double* weight, float scale, int64_t n, int64_t depth) {
  std::vector<double> dots(n);
  at::parallel_for(0, n, (1 << 15) / depth + 1, [&](int64_t begin, int64_t end) {
    finish_rows(grad + begin * depth, own + begin * depth, other + begin * depth, weight + begin, scale, dots.data() + begin, end - begin, depth);
  });
  return std::accumulate(dots.begin(), dots.end(), 0.0);
}

// out_i = a_i . b_i
FASTCLIP_MULTIVERSION void row_dots(double* out, const float* a, const float* b, int64_t n, int64_t depth) {
  for (int64_t i = 0; i < n; ++i) out[i] = dot(a + i * depth, b + i * depth, depth);
}
FASTCLIP_MULTIVERSION void row_dots(double* out, const c10::BFloat16* a, const c10::BFloat16* b, int64_t n, int64_t depth) {
  for (int64_t i = 0; i < n; ++i) out[i] = dot(a + i * depth, b + i * depth, depth);
}

}  // namespace fastclip
