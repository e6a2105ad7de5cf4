// What is O(N) or O(N D) around the contrastive block: merged statistics, weights of dz, features as float16, gradients
// with the positives' part, and rounded. Each is one launch; chunks.py says the same in PyTorch.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>

#include "launch.h"
#include "order.cuh"

namespace fastclip {
namespace {

constexpr float HALF_RANGE = 16384.0f;  // as in chunks.py
constexpr int THREADS = 256;

__device__ __forceinline__ void raise(uint32_t* highest, uint32_t x) {
  x = __reduce_max_sync(~0u, x);
  if (threadIdx.x % 32 == 0) atomicMax(highest, x);
}

// (max, sum) of `count` parts, each `length` behind the other.
__device__ __forceinline__ float2 merged(const float2* parts, int64_t length, int count, float scale) {
  float highest = -INFINITY, total = 0;
#pragma unroll 8
  for (int k = 0; k < count; k++) highest = fmaxf(highest, parts[k * length].x);
#pragma unroll 8
  for (int k = 0; k < count; k++) total += parts[k * length].y * expf(scale * (parts[k * length].x - highest));
  return make_float2(highest, total);
}

// (max, log sum) of n rows and m columns from (max, sum) of their parts, as `merge` in chunks.py.
__global__ void merge_kernel(const float2* row_parts, const float2* col_parts, const float* scale_of, float* row_max,
                             float* row_log_sum, float* col_max, float* col_log_sum, int n, int m, int row_count,
                             int col_count) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  if (at >= static_cast<int64_t>(n) + m) return;
  const bool is_row = at < n;
  const int64_t length = is_row ? n : m, i = is_row ? at : at - n;
  const float2* parts = (is_row ? row_parts : col_parts) + i;
  const int count = is_row ? row_count : col_count;
  const float scale = *scale_of;
  const float2 all = merged(parts, length, count, scale);
  const float maximum = all.y == 0 ? -INFINITY : all.x * scale;
  const float lost = all.y == 0 ? 0 : static_cast<float>(static_cast<double>(all.x) * scale - maximum);
  (is_row ? row_max : col_max)[i] = maximum;
  (is_row ? row_log_sum : col_log_sum)[i] = logf(all.y) + lost;
}

// lse / scale in float32, and d changed by what its rounding changes.
__device__ __forceinline__ float cosine_of(double lse, double scale, float& d) {
  if (lse == -INFINITY) return INFINITY;
  const float cosine = static_cast<float>(lse / scale);
  d *= expf(static_cast<float>(cosine * scale - lse));
  return cosine;
}

// lse / scale and d of rows and columns, as `Weights` in chunks.py but for the unit; bounds, zero before: the largest
// |d| and, in order, the largest lse / scale and the largest -lse / scale.
__global__ void weights_kernel(const float* row_max, const float* row_log_sum, const float* d_row,
                               const float* col_max, const float* col_log_sum, const float* d_col,
                               const float* scale_of, float* row_cosine, float* row_weight, float* col_cosine,
                               float* col_weight, uint32_t* bounds, int n, int m) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  uint32_t largest = 0, highest = 0, lowest = 0;
  if (at < static_cast<int64_t>(n) + m) {
    const bool is_row = at < n;
    const int64_t i = is_row ? at : at - n;
    const double scale = *scale_of;
    const double lse = static_cast<double>((is_row ? row_max : col_max)[i]) + (is_row ? row_log_sum : col_log_sum)[i];
    float d = (is_row ? d_row : d_col)[i];
    largest = __float_as_uint(fabsf(d));
    const float cosine = cosine_of(lse, scale, d);
    (is_row ? row_cosine : col_cosine)[i] = cosine;
    (is_row ? row_weight : col_weight)[i] = d;
    highest = in_order(cosine), lowest = in_order(-cosine);
  }
  raise(bounds, largest);
  raise(bounds + 1, highest);
  raise(bounds + 2, lowest);
}

// Of the mean loss over n pairs, text i image i's: each pair's loss, NaN where the scale is not positive, its gradient
// for the positive, and what `weights_kernel` has of the negatives.
__global__ void mean_kernel(const float2* row_parts, const float2* col_parts, const float* positive,
                            const float* scale_of, float* loss, float* d_positive, float* row_cosine,
                            float* row_weight, float* col_cosine, float* col_weight, uint32_t* bounds, int n,
                            int row_count, int col_count) {
  const int i = blockIdx.x * THREADS + threadIdx.x;
  uint32_t highest = 0, lowest = 0;
  if (i < n) {
    const float scale = *scale_of, z = positive[i], each = scale > 0 ? 0.5f / n : NAN;
    float sum = 0, d_sum = 0;
#pragma unroll
    for (int is_col = 0; is_col < 2; is_col++) {
      const float2 all = merged((is_col ? col_parts : row_parts) + i, n, is_col ? col_count : row_count, scale);
      const double lse = all.y == 0 ? -INFINITY : static_cast<double>(all.x) * scale + logf(all.y);
      const float beyond = static_cast<float>(lse - z), t = expf(-fabsf(beyond));  // what the negatives are above z
      sum += fmaxf(beyond, 0.0f) + log1pf(t);
      float d = each * (beyond < 0 ? t : 1.0f) / (1 + t);
      d_sum += d;
      const float cosine = cosine_of(lse, scale, d);
      (is_col ? col_cosine : row_cosine)[i] = cosine;
      (is_col ? col_weight : row_weight)[i] = d;
      highest = max(highest, in_order(cosine)), lowest = max(lowest, in_order(-cosine));
    }
    loss[i] = n * each * sum + 0 * z;  // an infinite positive is no loss of 0
    d_positive[i] = -d_sum;
  }
  raise(bounds, __float_as_uint(0.5f / n));
  raise(bounds + 1, highest);
  raise(bounds + 2, lowest);
}

template <typename T>
__device__ __forceinline__ float wide(T x) {
  return static_cast<float>(x);
}

// The largest |x| of two matrices of bfloat16, as bits of a float32; zero before.
__global__ void largest_kernel(const __nv_bfloat16* image, const __nv_bfloat16* text, uint32_t* largest,
                               int64_t image_size, int64_t text_size) {
  const bool is_text = blockIdx.y;
  const __nv_bfloat162* x = reinterpret_cast<const __nv_bfloat162*>(is_text ? text : image);
  const int64_t pairs = (is_text ? text_size : image_size) / 2;
  const int64_t step = static_cast<int64_t>(gridDim.x) * THREADS;
  float found = 0;
#pragma unroll 4
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x; i < pairs; i += step) {
    const float2 both = __bfloat1622float2(x[i]);
    found = fmaxf(found, fmaxf(fabsf(both.x), fabsf(both.y)));
  }
  if (blockIdx.x == 0 && threadIdx.x == 0 && (is_text ? text_size : image_size) % 2) {
    found = fmaxf(found, fabsf(wide((is_text ? text : image)[2 * pairs])));
  }
  raise(largest + is_text, __float_as_uint(found));
}

// 2^(14 - e) for a largest value of 2^e to 2^(e + 1): its number lies between 2^14 and 2^15 then.
__device__ __forceinline__ int half_exponent(uint32_t largest) {
  const int exponent = largest >> 23;
  return exponent == 0 || exponent == 255 ? 0 : 14 - (exponent - 127);
}

// Both as float16 times 2^half_exponent, as `as_half` in chunks.py.
__global__ void half_kernel(const __nv_bfloat16* image, const __nv_bfloat16* text, const uint32_t* largest,
                            __half* image_half, __half* text_half, int64_t image_size, int64_t text_size) {
  const bool is_text = blockIdx.y;
  const int64_t size = is_text ? text_size : image_size, step = 2 * static_cast<int64_t>(gridDim.x) * THREADS;
  const __nv_bfloat16* x = is_text ? text : image;
  __half* y = is_text ? text_half : image_half;
  const int exponent = half_exponent(largest[is_text]);
  for (int64_t i = 2 * (static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x); i < size; i += step) {
    if (i + 1 < size) {
      const float2 both = __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(x + i));
      *reinterpret_cast<__half2*>(y + i) = __floats2half2_rn(ldexpf(both.x, exponent), ldexpf(both.y, exponent));
    } else {
      y[i] = __float2half_rn(ldexpf(wide(x[i]), exponent));
    }
  }
}

// grad = factor (unit grad + d_positive other), of the images (blockIdx.y 0) and of the texts, whose row offset + i is
// image i's; unit undoes what the weights and the other matrix were multiplied with. Without `factor` 1; with it dots_i
// = image_i . grad_i before it.
template <typename T>
__global__ void finish_kernel(float* grad_image, float* grad_text, const T* image, const T* text,
                              const float* d_positive, const uint32_t* bounds, const uint32_t* largest,
                              const float* factor, float* dots, int n, int m, int d, int offset, bool has_positives) {
  const bool is_text = blockIdx.y;
  const int row = blockIdx.x;
  if (row >= (is_text ? m : n)) return;
  float unit = fmaxf(__uint_as_float(bounds[0]), 1.17549435e-38f) / HALF_RANGE;
  if (largest != nullptr) unit = ldexpf(unit, -half_exponent(largest[!is_text]));
  const int64_t own = is_text ? row - static_cast<int64_t>(offset) : row + static_cast<int64_t>(offset);
  const bool has_own = has_positives && own >= 0 && own < (is_text ? n : m);
  const float weight = has_own ? d_positive[is_text ? own : row] : 0;
  float* grad = (is_text ? grad_text : grad_image) + static_cast<int64_t>(row) * d;
  const T *other = (is_text ? image : text) + own * d, *self = image + static_cast<int64_t>(row) * d;
  const float by = factor == nullptr ? 1 : *factor;
  const bool has_dot = factor != nullptr && !is_text;
  float dot = 0;
  for (int k = threadIdx.x; k < d; k += blockDim.x) {
    const float value = grad[k] * unit + (has_own ? weight * wide(other[k]) : 0);
    if (has_dot) dot += value * wide(self[k]);
    grad[k] = value * by;
  }
  if (!has_dot) return;
  __shared__ float of_warp[4];
  for (int lanes = 16; lanes > 0; lanes /= 2) dot += __shfl_xor_sync(~0u, dot, lanes);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = dot;
  __syncthreads();
  if (threadIdx.x == 0) dots[row] = of_warp[0] + of_warp[1] + of_warp[2] + of_warp[3];
}

// out = factor x, rounded once; dots_i = a_i . x_i where `a` is given.
template <typename T>
__global__ void scaled_kernel(const float* x, const T* a, const float* factor, T* out, float* dots, int n, int d) {
  const int row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (row >= n) return;
  const int64_t first = static_cast<int64_t>(row) * d;
  const float by = *factor;
  float dot = 0;
#pragma unroll 4
  for (int k = lane; k < d; k += 32) {
    const float value = x[first + k];
    if (a != nullptr) dot += value * wide(a[first + k]);
    out[first + k] = static_cast<T>(value * by);
  }
  if (a == nullptr) return;
  for (int lanes = 16; lanes > 0; lanes /= 2) dot += __shfl_xor_sync(~0u, dot, lanes);
  if (lane == 0) dots[row] = dot;
}

template <typename T>
__global__ void dots_kernel(const T* a, const T* b, float* out, int n, int d) {
  const int row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (row >= n) return;
  const int64_t first = static_cast<int64_t>(row) * d;
  float dot = 0;
#pragma unroll 4
  for (int k = lane; k < d; k += 32) dot += wide(a[first + k]) * wide(b[first + k]);
  for (int lanes = 16; lanes > 0; lanes /= 2) dot += __shfl_xor_sync(~0u, dot, lanes);
  if (lane == 0) out[row] = dot;
}

__global__ void sum_parts_kernel(const float2* row_sums, float* loss, float* total, int n, int count, bool is_first) {
  const int i = blockIdx.x * THREADS + threadIdx.x;
  if (i >= n) return;
  float2 sums = is_first ? make_float2(0, 0) : make_float2(loss[i], total[i]);
  for (int k = 0; k < count; k++) {
    const float2 part = row_sums[static_cast<int64_t>(k) * n + i];
    sums.x += part.x, sums.y += part.y;
  }
  loss[i] = sums.x, total[i] = sums.y;
}

int blocks(int64_t size, int64_t most = 1 << 30) {
  const int64_t all = (size + THREADS - 1) / THREADS;
  return static_cast<int>(all < most ? all : most);
}

}  // namespace
}  // namespace fastclip

using namespace fastclip;

extern "C" int fastclip_merge(const void* row_parts, const void* col_parts, const float* scale, float* row_max,
                              float* row_log_sum, float* col_max, float* col_log_sum, int n, int m, int row_count,
                              int col_count, cudaStream_t stream) {
  merge_kernel<<<blocks(static_cast<int64_t>(n) + m), THREADS, 0, stream>>>(
      static_cast<const float2*>(row_parts), static_cast<const float2*>(col_parts), scale, row_max, row_log_sum,
      col_max, col_log_sum, n, m, row_count, col_count);
  return cudaGetLastError();
}

extern "C" int fastclip_weights(const float* row_max, const float* row_log_sum, const float* d_row,
                                const float* col_max, const float* col_log_sum, const float* d_col, const float* scale,
                                float* row_cosine, float* row_weight, float* col_cosine, float* col_weight,
                                uint32_t* bounds, int n, int m, cudaStream_t stream) {
  weights_kernel<<<blocks(static_cast<int64_t>(n) + m), THREADS, 0, stream>>>(
      row_max, row_log_sum, d_row, col_max, col_log_sum, d_col, scale, row_cosine, row_weight, col_cosine, col_weight,
      bounds, n, m);
  return cudaGetLastError();
}

extern "C" int fastclip_mean(const void* row_parts, const void* col_parts, const float* positive, const float* scale,
                             float* loss, float* d_positive, float* row_cosine, float* row_weight, float* col_cosine,
                             float* col_weight, uint32_t* bounds, int n, int row_count, int col_count,
                             cudaStream_t stream) {
  mean_kernel<<<blocks(n), THREADS, 0, stream>>>(static_cast<const float2*>(row_parts),
                                                 static_cast<const float2*>(col_parts), positive, scale, loss,
                                                 d_positive, row_cosine, row_weight, col_cosine, col_weight, bounds, n,
                                                 row_count, col_count);
  return cudaGetLastError();
}

extern "C" int fastclip_as_half(const void* image, const void* text, uint32_t* largest, void* image_half,
                                void* text_half, int n, int m, int d, cudaStream_t stream) {
  const int64_t image_size = static_cast<int64_t>(n) * d, text_size = static_cast<int64_t>(m) * d;
  const dim3 grid(blocks((image_size > text_size ? image_size : text_size) / 2 + 1, 2048), 2);
  const auto* x = static_cast<const __nv_bfloat16*>(image);
  const auto* y = static_cast<const __nv_bfloat16*>(text);
  largest_kernel<<<grid, THREADS, 0, stream>>>(x, y, largest, image_size, text_size);
  half_kernel<<<grid, THREADS, 0, stream>>>(x, y, largest, static_cast<__half*>(image_half),
                                            static_cast<__half*>(text_half), image_size, text_size);
  return cudaGetLastError();
}

extern "C" int fastclip_finish(float* grad_image, float* grad_text, const void* image, const void* text,
                               const float* d_positive, const uint32_t* bounds, const uint32_t* largest,
                               const float* factor, float* dots, int n, int m, int d, int is_half, int offset,
                               int has_positives, cudaStream_t stream) {
  const dim3 grid(n > m ? n : m, 2);
  if (is_half) {
    finish_kernel<<<grid, 128, 0, stream>>>(grad_image, grad_text, static_cast<const __half*>(image),
                                            static_cast<const __half*>(text), d_positive, bounds, largest, factor, dots,
                                            n, m, d, offset, has_positives != 0);
  } else {
    finish_kernel<<<grid, 128, 0, stream>>>(grad_image, grad_text, static_cast<const __nv_bfloat16*>(image),
                                            static_cast<const __nv_bfloat16*>(text), d_positive, bounds, largest,
                                            factor, dots, n, m, d, offset, has_positives != 0);
  }
  return cudaGetLastError();
}

extern "C" int fastclip_dots(const void* a, const void* b, float* out, int n, int d, int is_half, cudaStream_t stream) {
  const int grid = (n + 7) / 8;
  if (is_half) {
    dots_kernel<<<grid, THREADS, 0, stream>>>(static_cast<const __half*>(a), static_cast<const __half*>(b), out, n, d);
  } else {
    dots_kernel<<<grid, THREADS, 0, stream>>>(static_cast<const __nv_bfloat16*>(a),
                                              static_cast<const __nv_bfloat16*>(b), out, n, d);
  }
  return cudaGetLastError();
}

extern "C" int fastclip_sum_parts(const void* row_sums, float* loss, float* total, int n, int count, int is_first,
                                  cudaStream_t stream) {
  sum_parts_kernel<<<blocks(n), THREADS, 0, stream>>>(static_cast<const float2*>(row_sums), loss, total, n, count,
                                                      is_first != 0);
  return cudaGetLastError();
}

extern "C" int fastclip_scaled(const float* x, const void* a, const float* factor, void* out, float* dots, int n,
                               int d, int is_half, cudaStream_t stream) {
  const int grid = (n + 7) / 8;
  if (is_half) {
    scaled_kernel<<<grid, THREADS, 0, stream>>>(x, static_cast<const __half*>(a), factor, static_cast<__half*>(out),
                                                dots, n, d);
  } else {
    scaled_kernel<<<grid, THREADS, 0, stream>>>(x, static_cast<const __nv_bfloat16*>(a), factor,
                                                static_cast<__nv_bfloat16*>(out), dots, n, d);
  }
  return cudaGetLastError();
}
