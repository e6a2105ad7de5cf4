// LayerNorm of x + residual in one pass each way, statistics in fp32.
//
//   s = x + residual (rounded to the input's type), y = (s - mean) rstd w + b
//   d_s = rstd (g - mean(g) - s^ mean(g s^)) + d_total, with s^ = (s - mean) rstd and g = d_y w
#include <cmath>
#include <tuple>

#include "rows.h"

namespace fastclip {
namespace {

struct Norm {
  int64_t width, padded;
  float eps;
  const float *weight, *bias;  // zero in the padding
};

FASTCLIP_INLINE float total_of(const float* row, int64_t padded) {
  Vec total = {};
  for (int64_t j = 0; j < padded; j += kLanes) total += load(row + j);
  return sum(total);
}

// residual and total may be null, both or none.
template <typename T>
FASTCLIP_INLINE void forward_rows(T* out, T* total, float* mean, float* rstd, const T* x, const T* residual, int64_t rows, const Norm& n,
                                  float* row) {
  const float inverse = 1.f / static_cast<float>(n.width);
  float* added = row + n.padded;
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t at = i * n.width;
    load_row(row, x + at, n.width, 0.f);
    if (residual) {
      load_row(added, residual + at, n.width, 0.f);
      for (int64_t j = 0; j < n.padded; j += kLanes) store(row + j, load(row + j) + load(added + j));
      narrow(total + at, row, n.width);
      if (sizeof(T) == 2) load_row(row, total + at, n.width, 0.f);
    }
    const float middle = total_of(row, n.padded) * inverse;
    for (int64_t j = n.width; j < n.padded; ++j) row[j] = middle;
    Vec squares = {};
    for (int64_t j = 0; j < n.padded; j += kLanes) {
      const Vec off = load(row + j) - middle;
      squares += off * off;
    }
    const float scale = 1.f / std::sqrt(sum(squares) * inverse + n.eps);
    for (int64_t j = 0; j < n.padded; j += kLanes) store(row + j, (load(row + j) - middle) * scale * load(n.weight + j) + load(n.bias + j));
    narrow(out + at, row, n.width);
    mean[i] = middle;
    rstd[i] = scale;
  }
}

// d_weight and d_bias are added to; d_total may be null.
template <typename T>
FASTCLIP_INLINE void backward_rows(T* d_x, float* d_weight, float* d_bias, const T* d_out, const T* d_total, const T* x, const float* mean,
                                   const float* rstd, int64_t rows, const Norm& n, float* row) {
  const float inverse = 1.f / static_cast<float>(n.width);
  float *d = row + n.padded, *more = d + n.padded;
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t at = i * n.width;
    load_row(row, x + at, n.width, mean[i]);
    load_row(d, d_out + at, n.width, 0.f);
    Vec first = {}, second = {};
    for (int64_t j = 0; j < n.padded; j += kLanes) {
      const Vec grad = load(d + j), off = (load(row + j) - mean[i]) * rstd[i], g = grad * load(n.weight + j);
      store(d_weight + j, load(d_weight + j) + grad * off);
      store(d_bias + j, load(d_bias + j) + grad);
      store(row + j, off);
      store(d + j, g);
      first += g;
      second += g * off;
    }
    const float shift = sum(first) * inverse, slope = sum(second) * inverse;
    if (d_total) load_row(more, d_total + at, n.width, 0.f);
    for (int64_t j = 0; j < n.padded; j += kLanes) {
      Vec grad = (load(d + j) - shift - load(row + j) * slope) * rstd[i];
      if (d_total) grad += load(more + j);
      store(d + j, grad);
    }
    narrow(d_x + at, d, n.width);
  }
}

#define FASTCLIP_LAYER_NORM(T)                                                                                                           \
  FASTCLIP_MULTIVERSION void run(T* out, T* total, float* mean, float* rstd, const T* x, const T* residual, int64_t rows, const Norm& n, \
                                 float* row) {                                                                                           \
    forward_rows(out, total, mean, rstd, x, residual, rows, n, row);                                                                     \
  }                                                                                                                                      \
  FASTCLIP_MULTIVERSION void run_backward(T* d_x, float* d_weight, float* d_bias, const T* d_out, const T* d_total, const T* x,          \
                                          const float* mean, const float* rstd, int64_t rows, const Norm& n, float* row) {               \
    backward_rows(d_x, d_weight, d_bias, d_out, d_total, x, mean, rstd, rows, n, row);                                                   \
  }
FASTCLIP_LAYER_NORM(float)
FASTCLIP_LAYER_NORM(at::BFloat16)
#undef FASTCLIP_LAYER_NORM

template <typename T>
T* pointer(const std::optional<at::Tensor>& x) {
  return x.has_value() ? static_cast<T*>(x->data_ptr()) : nullptr;
}
std::optional<at::Tensor> contiguous(const std::optional<at::Tensor>& x) {
  return x.has_value() ? std::optional<at::Tensor>(x->contiguous()) : std::nullopt;
}

template <typename T>
void forward(const at::Tensor& out, const std::optional<at::Tensor>& total, const at::Tensor& mean, const at::Tensor& rstd, const at::Tensor& x,
             const std::optional<at::Tensor>& residual, const Norm& n) {
  const int64_t rows = mean.numel();
  at::parallel_for(0, rows, std::max<int64_t>(1, kGrain / n.padded), [&](int64_t begin, int64_t end) {
    std::vector<float> row(2 * n.padded);
    const int64_t at = begin * n.width;
    const auto shifted = [&](const std::optional<at::Tensor>& t) { return t.has_value() ? pointer<T>(t) + at : nullptr; };
    run(pointer<T>(out) + at, shifted(total), mean.data_ptr<float>() + begin, rstd.data_ptr<float>() + begin, pointer<T>(x) + at,
        shifted(residual), end - begin, n, row.data());
  });
}

template <typename T>
void backward(const at::Tensor& d_x, const at::Tensor& partial, const at::Tensor& d_out, const std::optional<at::Tensor>& d_total,
              const at::Tensor& x, const at::Tensor& mean, const at::Tensor& rstd, const RowBlocks& blocks, const Norm& n) {
  const int64_t rows = mean.numel();
  at::parallel_for(0, blocks.count, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> row(3 * n.padded);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * blocks.size, at = first * n.width;
      auto* sums = partial.data_ptr<float>() + block * 2 * n.padded;
      run_backward(pointer<T>(d_x) + at, sums, sums + n.padded, pointer<T>(d_out) + at, d_total.has_value() ? pointer<T>(d_total) + at : nullptr,
                   pointer<T>(x) + at, mean.data_ptr<float>() + first, rstd.data_ptr<float>() + first, std::min(blocks.size, rows - first), n,
                   row.data());
    }
  });
}

}  // namespace

// (out, total, mean, rstd); total is empty without a residual.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> layer_norm_fwd(const at::Tensor& x_, const std::optional<at::Tensor>& residual_,
                                                                          const at::Tensor& weight, const at::Tensor& bias, double eps) {
  const auto x = x_.contiguous();
  const auto residual = contiguous(residual_);
  const int64_t width = x.size(-1), rows = x.numel() / std::max<int64_t>(1, width);
  const auto w = columns(weight, width, 0.f), b = columns(bias, width, 0.f);
  const Norm n{width, static_cast<int64_t>(w.size()), static_cast<float>(eps), w.data(), b.data()};
  auto out = x.new_empty(x.sizes()), total = x.new_empty(residual ? x.sizes() : at::IntArrayRef({0}));
  auto mean = x.new_empty({rows}, at::kFloat), rstd = mean.new_empty(mean.sizes());
  const auto sums = residual ? std::optional<at::Tensor>(total) : std::nullopt;
  if (x.scalar_type() == at::kBFloat16)
    forward<at::BFloat16>(out, sums, mean, rstd, x, residual, n);
  else
    forward<float>(out, sums, mean, rstd, x, residual, n);
  return {out, total, mean, rstd};
}

// The gradients for x (and the residual), weight and bias, the last two in fp32.
std::tuple<at::Tensor, at::Tensor, at::Tensor> layer_norm_bwd(const at::Tensor& d_out_, const std::optional<at::Tensor>& d_total_,
                                                              const at::Tensor& total_, const at::Tensor& weight, const at::Tensor& mean,
                                                              const at::Tensor& rstd) {
  const auto x = total_.contiguous(), d_out = d_out_.contiguous();
  const auto d_total = contiguous(d_total_);
  const int64_t width = x.size(-1);
  const auto w = columns(weight, width, 0.f);
  const Norm n{width, static_cast<int64_t>(w.size()), 0.f, w.data(), nullptr};
  const RowBlocks blocks(mean.numel());
  auto d_x = x.new_empty(x.sizes());
  const auto partial = mean.new_zeros({blocks.count, 2, n.padded});
  if (x.scalar_type() == at::kBFloat16)
    backward<at::BFloat16>(d_x, partial, d_out, d_total, x, mean, rstd, blocks, n);
  else
    backward<float>(d_x, partial, d_out, d_total, x, mean, rstd, blocks, n);
  const auto sums = partial.sum(0).narrow(1, 0, width);
  return {d_x, sums[0].clone(), sums[1].clone()};
}

}  // namespace fastclip
