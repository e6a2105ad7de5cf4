// Attention for short sequences on the CPU, straight from the packed QKV product and back into it.
//
//   o_i = sum_j softmax_j(scale * q_i . k_j) v_j        within one sequence and one head
//
// qkv (T, 3, H, D) holds the tokens of all sequences one after another, cu_seqlens (B + 1) their limits. One thread
// holds a whole (sequence, head) in its cache: q, k and v are widened to fp32 once, softmax needs no second pass, and
// the backward recomputes the probabilities, so nothing but qkv is kept and dQ, dK, dV are summed in one fixed order
// (bitwise the same for any number of threads). All sums are fp32.
#include <ATen/Parallel.h>
#include <ATen/ATen.h>

#include <cmath>
#include <cstdint>
#include <vector>

#include "simd.h"

namespace fastclip {
namespace {

struct Shape {
  int64_t heads, dim, dim_pad;  // dim_pad: head_dim rounded up to a whole vector
  float scale;
  bool causal;
};

// Rows of q, k, v or d_out of one head as fp32, (n, dim_pad), zero in the padding.
template <typename scalar_t>
FASTCLIP_INLINE void load_rows(float* out, const scalar_t* first, int64_t n, int64_t stride, const Shape& s) {
  for (int64_t i = 0; i < n; ++i) {
    widen(out + i * s.dim_pad, first + i * stride, s.dim);
    for (int64_t d = s.dim; d < s.dim_pad; ++d) out[i * s.dim_pad + d] = 0.f;
  }
}
template <typename scalar_t>
FASTCLIP_INLINE void store_rows(scalar_t* first, const float* in, int64_t n, int64_t stride, const Shape& s) {
  for (int64_t i = 0; i < n; ++i) narrow(first + i * stride, in + i * s.dim_pad, s.dim);
}

FASTCLIP_INLINE void transpose(float* out, const float* in, int64_t n, int64_t width, int64_t dim_pad) {
  for (int64_t d = 0; d < dim_pad; ++d) {
    for (int64_t i = 0; i < n; ++i) out[d * width + i] = in[i * dim_pad + d];
    for (int64_t i = n; i < width; ++i) out[d * width + i] = 0.f;
  }
}

// p (n, width) = softmax(scale * q k^T): zero right of the diagonal when causal, and in the padding.
FASTCLIP_INLINE void probabilities(float* p, const float* q, const float* kt, int64_t n, int64_t width, const Shape& s) {
  gemm(p, width, q, s.dim_pad, 1, kt, width, n, width, s.dim_pad);
  for (int64_t i = 0; i < n; ++i) {
    float* row = p + i * width;
    const int64_t seen = s.causal ? i + 1 : n;
    for (int64_t j = seen; j < width; ++j) row[j] = -INFINITY;
    Vec best = splat(-INFINITY), total = {};
    for (int64_t j = 0; j < width; j += kLanes) best = maximum(best, load(row + j));
    const Vec top = splat(maximum(best));
    for (int64_t j = 0; j < width; j += kLanes) {
      const Vec e = exponential((load(row + j) - top) * s.scale);
      store(row + j, e);
      total += e;
    }
    const Vec inverse = splat(1.f / sum(total));
    for (int64_t j = 0; j < width; j += kLanes) store(row + j, load(row + j) * inverse);
  }
}

// dS = scale * P (dP - sum_j P dP), in place of dP.
FASTCLIP_INLINE void probabilities_backward(float* dp, const float* p, int64_t n, int64_t width, const Shape& s) {
  for (int64_t i = 0; i < n; ++i) {
    float* row = dp + i * width;
    const float* probability = p + i * width;
    Vec total = {};
    for (int64_t j = 0; j < width; j += kLanes) total += load(row + j) * load(probability + j);
    const Vec delta = splat(sum(total));
    for (int64_t j = 0; j < width; j += kLanes) store(row + j, load(probability + j) * (load(row + j) - delta) * s.scale);
  }
}

template <typename scalar_t>
FASTCLIP_INLINE void head_forward(const scalar_t* qkv, scalar_t* out, int64_t n, float* scratch, const Shape& s) {
  const int64_t out_token = s.heads * s.dim, token = 3 * out_token, width = round_up(n), rows = width * s.dim_pad;
  float *q = scratch, *k = q + rows, *v = k + rows, *kt = v + rows, *p = kt + rows;
  load_rows(q, qkv, n, token, s);
  load_rows(k, qkv + out_token, n, token, s);
  load_rows(v, qkv + 2 * out_token, n, token, s);
  transpose(kt, k, n, width, s.dim_pad);
  probabilities(p, q, kt, n, width, s);
  gemm(q, s.dim_pad, p, width, 1, v, s.dim_pad, n, s.dim_pad, n);
  store_rows(out, q, n, out_token, s);
}

template <typename scalar_t>
FASTCLIP_INLINE void head_backward(const scalar_t* d_out, const scalar_t* qkv, scalar_t* d_qkv, int64_t n, float* scratch, const Shape& s) {
  const int64_t out_token = s.heads * s.dim, token = 3 * out_token, width = round_up(n), rows = width * s.dim_pad;
  float *q = scratch, *k = q + rows, *v = k + rows, *dout = v + rows, *grad = dout + rows, *kt = grad + rows, *vt = kt + rows;
  float *p = vt + rows, *ds = p + width * width;
  load_rows(q, qkv, n, token, s);
  load_rows(k, qkv + out_token, n, token, s);
  load_rows(v, qkv + 2 * out_token, n, token, s);
  load_rows(dout, d_out, n, out_token, s);
  transpose(kt, k, n, width, s.dim_pad);
  transpose(vt, v, n, width, s.dim_pad);
  probabilities(p, q, kt, n, width, s);
  gemm(ds, width, dout, s.dim_pad, 1, vt, width, n, width, s.dim_pad);  // dP = dO V^T
  probabilities_backward(ds, p, n, width, s);
  gemm(grad, s.dim_pad, ds, width, 1, k, s.dim_pad, n, s.dim_pad, n);  // dQ = dS K
  store_rows(d_qkv, grad, n, token, s);
  gemm(grad, s.dim_pad, ds, 1, width, q, s.dim_pad, n, s.dim_pad, n);  // dK = dS^T Q
  store_rows(d_qkv + out_token, grad, n, token, s);
  gemm(grad, s.dim_pad, p, 1, width, dout, s.dim_pad, n, s.dim_pad, n);  // dV = P^T dO
  store_rows(d_qkv + 2 * out_token, grad, n, token, s);
}

FASTCLIP_MULTIVERSION void run_forward(const float* qkv, float* out, int64_t n, float* scratch, const Shape& s) {
  head_forward(qkv, out, n, scratch, s);
}
FASTCLIP_MULTIVERSION void run_forward_bf16(const at::BFloat16* qkv, at::BFloat16* out, int64_t n, float* scratch, const Shape& s) {
  head_forward(qkv, out, n, scratch, s);
}
FASTCLIP_MULTIVERSION void run_backward(const float* d_out, const float* qkv, float* d_qkv, int64_t n, float* scratch, const Shape& s) {
  head_backward(d_out, qkv, d_qkv, n, scratch, s);
}
FASTCLIP_MULTIVERSION void run_backward_bf16(const at::BFloat16* d_out, const at::BFloat16* qkv, at::BFloat16* d_qkv, int64_t n, float* scratch,
                                             const Shape& s) {
  head_backward(d_out, qkv, d_qkv, n, scratch, s);
}

// Calls head(sequence start, length, head index, scratch) for every (sequence, head), in parallel.
template <typename Head>
void for_each_head(const at::Tensor& cu_seqlens, int64_t max_seqlen, const Shape& s, int64_t row_buffers, int64_t squares, const Head& head) {
  const auto* cu = cu_seqlens.const_data_ptr<int32_t>();
  const int64_t width = round_up(max_seqlen), floats = row_buffers * width * s.dim_pad + squares * width * width;
  at::parallel_for(0, (cu_seqlens.numel() - 1) * s.heads, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(floats);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t start = cu[item / s.heads], n = cu[item / s.heads + 1] - start;
      if (n > 0) head(start, n, item % s.heads, scratch.data());
    }
  });
}

Shape shape_of(const at::Tensor& qkv, bool causal, double softmax_scale) {
  const int64_t dim = qkv.size(3);
  return {qkv.size(2), dim, round_up(dim), static_cast<float>(softmax_scale), causal};
}

}  // namespace

at::Tensor attention_fwd(const at::Tensor& qkv, const at::Tensor& cu_seqlens, int64_t max_seqlen, bool causal, double softmax_scale) {
  const auto s = shape_of(qkv, causal, softmax_scale);
  const auto x = qkv.contiguous();
  auto out = at::empty({x.size(0), s.heads, s.dim}, x.options());
  const int64_t out_token = s.heads * s.dim, token = 3 * out_token;
  for_each_head(cu_seqlens, max_seqlen, s, 4, 1, [&](int64_t start, int64_t n, int64_t h, float* scratch) {
    const int64_t in = start * token + h * s.dim, to = start * out_token + h * s.dim;
    if (x.scalar_type() == at::kBFloat16)
      run_forward_bf16(x.const_data_ptr<at::BFloat16>() + in, out.mutable_data_ptr<at::BFloat16>() + to, n, scratch, s);
    else
      run_forward(x.const_data_ptr<float>() + in, out.mutable_data_ptr<float>() + to, n, scratch, s);
  });
  return out;
}

at::Tensor attention_bwd(const at::Tensor& d_out, const at::Tensor& qkv, const at::Tensor& cu_seqlens, int64_t max_seqlen, bool causal,
                         double softmax_scale) {
  const auto s = shape_of(qkv, causal, softmax_scale);
  const auto x = qkv.contiguous(), dy = d_out.contiguous();
  auto dx = at::empty_like(x);
  const int64_t out_token = s.heads * s.dim, token = 3 * out_token;
  for_each_head(cu_seqlens, max_seqlen, s, 7, 2, [&](int64_t start, int64_t n, int64_t h, float* scratch) {
    const int64_t in = start * token + h * s.dim, from = start * out_token + h * s.dim;
    if (x.scalar_type() == at::kBFloat16)
      run_backward_bf16(dy.const_data_ptr<at::BFloat16>() + from, x.const_data_ptr<at::BFloat16>() + in, dx.mutable_data_ptr<at::BFloat16>() + in,
                        n, scratch, s);
    else
      run_backward(dy.const_data_ptr<float>() + from, x.const_data_ptr<float>() + in, dx.mutable_data_ptr<float>() + in, n, scratch, s);
  });
  return dx;
}

}  // namespace fastclip
