// Attention for short sequences on the CPU, straight from the packed QKV product and back into it.
//
//   o_i = sum_j softmax_j(scale * q_i . k_j) v_j        within one sequence and one head
//
// qkv (T, 3, H, D) holds the tokens of all sequences one after another, cu_seqlens (B + 1) their limits; without it all are
// max_seqlen long. One thread
// holds a whole (sequence, head) in its cache: q, k and v are widened to fp32 once, softmax needs no second pass, and
// the backward recomputes the probabilities, so nothing but qkv is kept and dQ, dK, dV are summed in one fixed order
// (bitwise the same for any number of threads). All sums are fp32.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <cmath>
#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "products.h"

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

// p (m, width) = softmax(scale * q k^T): zero right of the diagonal when causal, and in the padding.
FASTCLIP_INLINE void probabilities(float* p, const float* q, const float* kt, int64_t m, int64_t n, int64_t width, const Shape& s) {
  gemm(p, width, q, s.dim_pad, 1, kt, width, m, width, s.dim_pad);
  for (int64_t i = 0; i < m; ++i) {
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
FASTCLIP_INLINE void probabilities_backward(float* dp, const float* p, int64_t m, int64_t width, const Shape& s) {
  for (int64_t i = 0; i < m; ++i) {
    float* row = dp + i * width;
    const float* probability = p + i * width;
    Vec total = {};
    for (int64_t j = 0; j < width; j += kLanes) total += load(row + j) * load(probability + j);
    const Vec delta = splat(sum(total));
    for (int64_t j = 0; j < width; j += kLanes) store(row + j, load(probability + j) * (load(row + j) - delta) * s.scale);
  }
}

// Where one head of one sequence lies: m queries (all tokens, or the pooled one) against n keys; strides in elements.
template <typename scalar_t>
struct Head {
  scalar_t *q, *k, *v, *out;
  int64_t m, n, q_stride, kv_stride, out_stride;
};

template <typename scalar_t>
FASTCLIP_INLINE void head_forward(const Head<scalar_t>& x, float* scratch, const Shape& s) {
  const int64_t width = round_up(x.n), rows = width * s.dim_pad;
  float *q = scratch, *k = q + rows, *v = k + rows, *kt = v + rows, *p = kt + rows;
  load_rows(q, x.q, x.m, x.q_stride, s);
  load_rows(k, x.k, x.n, x.kv_stride, s);
  load_rows(v, x.v, x.n, x.kv_stride, s);
  transpose_blocks(kt, width, k, s.dim_pad, x.n, s.dim_pad, width);
  probabilities(p, q, kt, x.m, x.n, width, s);
  gemm(q, s.dim_pad, p, width, 1, v, s.dim_pad, x.m, s.dim_pad, x.n);
  store_rows(x.out, q, x.m, x.out_stride, s);
}

// x holds the inputs and, as out, the gradient of the output; d holds the gradients of q, k and v.
template <typename scalar_t>
FASTCLIP_INLINE void head_backward(const Head<scalar_t>& x, const Head<scalar_t>& d, float* scratch, const Shape& s) {
  const int64_t width = round_up(x.n), rows = width * s.dim_pad;
  float *q = scratch, *k = q + rows, *v = k + rows, *dout = v + rows, *grad = dout + rows, *kt = grad + rows, *vt = kt + rows;
  float *p = vt + rows, *ds = p + width * width;
  load_rows(q, x.q, x.m, x.q_stride, s);
  load_rows(k, x.k, x.n, x.kv_stride, s);
  load_rows(v, x.v, x.n, x.kv_stride, s);
  load_rows(dout, x.out, x.m, x.out_stride, s);
  transpose_blocks(kt, width, k, s.dim_pad, x.n, s.dim_pad, width);
  transpose_blocks(vt, width, v, s.dim_pad, x.n, s.dim_pad, width);
  probabilities(p, q, kt, x.m, x.n, width, s);
  gemm(ds, width, dout, s.dim_pad, 1, vt, width, x.m, width, s.dim_pad);  // dP = dO V^T
  probabilities_backward(ds, p, x.m, width, s);
  gemm(grad, s.dim_pad, ds, width, 1, k, s.dim_pad, x.m, s.dim_pad, x.n);  // dQ = dS K
  store_rows(d.q, grad, x.m, x.q_stride, s);
  gemm(grad, s.dim_pad, ds, 1, width, q, s.dim_pad, x.n, s.dim_pad, x.m);  // dK = dS^T Q
  store_rows(d.k, grad, x.n, x.kv_stride, s);
  gemm(grad, s.dim_pad, p, 1, width, dout, s.dim_pad, x.n, s.dim_pad, x.m);  // dV = P^T dO
  store_rows(d.v, grad, x.n, x.kv_stride, s);
}

FASTCLIP_MULTIVERSION void run(const Head<float>& x, float* scratch, const Shape& s) { head_forward(x, scratch, s); }
FASTCLIP_MULTIVERSION void run_bf16(const Head<at::BFloat16>& x, float* scratch, const Shape& s) { head_forward(x, scratch, s); }
FASTCLIP_MULTIVERSION void run_backward(const Head<float>& x, const Head<float>& d, float* scratch, const Shape& s) {
  head_backward(x, d, scratch, s);
}
FASTCLIP_MULTIVERSION void run_backward_bf16(const Head<at::BFloat16>& x, const Head<at::BFloat16>& d, float* scratch, const Shape& s) {
  head_backward(x, d, scratch, s);
}
void dispatch(const Head<float>& x, float* scratch, const Shape& s) { run(x, scratch, s); }
void dispatch(const Head<at::BFloat16>& x, float* scratch, const Shape& s) { run_bf16(x, scratch, s); }
void dispatch(const Head<float>& x, const Head<float>& d, float* scratch, const Shape& s) { run_backward(x, d, scratch, s); }
void dispatch(const Head<at::BFloat16>& x, const Head<at::BFloat16>& d, float* scratch, const Shape& s) { run_backward_bf16(x, d, scratch, s); }

// The tensors of one call: q alone when pooled (one query a sequence, kv (T, 2, H, D)), else packed qkv (T, 3, H, D).
struct Tensors {
  at::Tensor q, kv, out;
  bool pooled;

  template <typename scalar_t>
  Head<scalar_t> head(int64_t sequence, int64_t start, int64_t n, int64_t h, const Shape& s) const {
    const int64_t across = s.heads * s.dim, token = (pooled ? 2 : 3) * across, row = pooled ? sequence : start;
    auto* keys = static_cast<scalar_t*>(kv.data_ptr()) + start * token + h * s.dim + (pooled ? 0 : across);
    auto* queries = pooled ? static_cast<scalar_t*>(q.data_ptr()) + sequence * across + h * s.dim : keys - across;
    auto* outputs = out.defined() ? static_cast<scalar_t*>(out.data_ptr()) + row * across + h * s.dim : nullptr;
    return {queries, keys, keys + across, outputs, pooled ? 1 : n, n, pooled ? across : token, token, across};
  }
};

// The limits of the sequences in `total` rows.
class Sequences {
 public:
  Sequences(const std::optional<at::Tensor>& cu_seqlens, int64_t max_seqlen, int64_t total) : length_(max_seqlen) {
    if (!cu_seqlens.has_value()) {
      count_ = length_ > 0 ? total / length_ : 0;
      return;
    }
    limits_ = cu_seqlens->contiguous();
    cu_ = limits_.const_data_ptr<int32_t>();
    count_ = limits_.numel() - 1;
    bool fits = cu_[0] == 0 && cu_[count_] == total;
    for (int64_t i = 0; i < count_; ++i) fits = fits && cu_[i] <= cu_[i + 1] && cu_[i + 1] - cu_[i] <= max_seqlen;
    TORCH_CHECK_VALUE(fits, "cu_seqlens must rise from 0 to ", total, " in steps of 0 to max_seqlen = ", max_seqlen);
  }
  int64_t count() const { return count_; }
  int64_t longest() const { return length_; }
  int64_t start(int64_t i) const { return cu_ ? cu_[i] : i * length_; }
  int64_t length(int64_t i) const { return cu_ ? cu_[i + 1] - cu_[i] : length_; }

 private:
  at::Tensor limits_;
  const int32_t* cu_ = nullptr;
  int64_t count_, length_;
};

// Calls head(sequence, start, length, head index, scratch) for every (sequence, head), in parallel.
template <typename Call>
void for_each_head(const Sequences& sequences, const Shape& s, int64_t row_buffers, int64_t squares, const Call& call) {
  const int64_t width = round_up(sequences.longest()), floats = row_buffers * width * s.dim_pad + squares * width * width;
  at::parallel_for(0, sequences.count() * s.heads, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(floats);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t sequence = item / s.heads, n = sequences.length(sequence);
      if (n > 0) call(sequence, sequences.start(sequence), n, item % s.heads, scratch.data());
    }
  });
}

void forward(const Tensors& x, const Sequences& sequences, const Shape& s) {
  const bool half = x.kv.scalar_type() == at::kBFloat16;
  for_each_head(sequences, s, 4, 1, [&](int64_t sequence, int64_t start, int64_t n, int64_t h, float* scratch) {
    if (half)
      dispatch(x.head<at::BFloat16>(sequence, start, n, h, s), scratch, s);
    else
      dispatch(x.head<float>(sequence, start, n, h, s), scratch, s);
  });
}

void backward(const Tensors& x, const Tensors& d, const Sequences& sequences, const Shape& s) {
  const bool half = x.kv.scalar_type() == at::kBFloat16;
  for_each_head(sequences, s, 7, 2, [&](int64_t sequence, int64_t start, int64_t n, int64_t h, float* scratch) {
    if (half)
      dispatch(x.head<at::BFloat16>(sequence, start, n, h, s), d.head<at::BFloat16>(sequence, start, n, h, s), scratch, s);
    else
      dispatch(x.head<float>(sequence, start, n, h, s), d.head<float>(sequence, start, n, h, s), scratch, s);
  });
}

Shape shape_of(const at::Tensor& x, bool causal, double softmax_scale) {
  const int64_t dim = x.size(3);
  return {x.size(2), dim, round_up(dim), static_cast<float>(softmax_scale), causal};
}

}  // namespace

at::Tensor attention_fwd(const at::Tensor& qkv, const std::optional<at::Tensor>& cu_seqlens, int64_t max_seqlen, bool causal,
                         double softmax_scale) {
  const auto s = shape_of(qkv, causal, softmax_scale);
  const auto x = qkv.contiguous();
  auto out = x.new_empty({x.size(0), s.heads, s.dim});
  forward({{}, x, out, false}, Sequences(cu_seqlens, max_seqlen, x.size(0)), s);
  return out;
}

at::Tensor attention_bwd(const at::Tensor& d_out, const at::Tensor& qkv, const std::optional<at::Tensor>& cu_seqlens, int64_t max_seqlen,
                         bool causal, double softmax_scale) {
  const auto s = shape_of(qkv, causal, softmax_scale);
  const auto x = qkv.contiguous();
  auto d_qkv = x.new_empty(x.sizes());
  backward({{}, x, d_out.contiguous(), false}, {{}, d_qkv, {}, false}, Sequences(cu_seqlens, max_seqlen, x.size(0)), s);
  return d_qkv;
}

at::Tensor pooled_attention_fwd(const at::Tensor& q, const at::Tensor& kv, const std::optional<at::Tensor>& cu_seqlens, int64_t max_seqlen,
                                double softmax_scale) {
  const auto s = shape_of(kv, false, softmax_scale);
  const auto queries = q.contiguous(), keys = kv.contiguous();
  auto out = queries.new_empty(queries.sizes());
  forward({queries, keys, out, true}, Sequences(cu_seqlens, max_seqlen, keys.size(0)), s);
  return out;
}

std::tuple<at::Tensor, at::Tensor> pooled_attention_bwd(const at::Tensor& d_out, const at::Tensor& q, const at::Tensor& kv,
                                                        const std::optional<at::Tensor>& cu_seqlens, int64_t max_seqlen, double softmax_scale) {
  const auto s = shape_of(kv, false, softmax_scale);
  const auto queries = q.contiguous(), keys = kv.contiguous();
  auto d_q = queries.new_empty(queries.sizes()), d_kv = keys.new_empty(keys.sizes());
  backward({queries, keys, d_out.contiguous(), true}, {d_q, d_kv, {}, true}, Sequences(cu_seqlens, max_seqlen, keys.size(0)), s);
  return {d_q, d_kv};
}

}  // namespace fastclip
