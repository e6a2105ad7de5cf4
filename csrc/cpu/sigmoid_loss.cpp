// The sigmoid block on the CPU: the loss of every row's pairs with all texts but its own, and its gradient.
//
// A block of logits is cut into tasks of rows, then, for the text gradient, of columns. A task makes its part by the
// library's micro-kernels (products.h) and uses it up while it is in the second-level cache. Tasks are cut the same way and
// blocks visited in the same order whatever the number of threads, so the result does not depend on it. bfloat16 features
// are multiplied as they are, with fp32 logits and bfloat16 dz, where the processor has 16-bit products, and widened where it
// has none. See ops/sigmoid_loss/reference.py for the maths.
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "pairs.h"
#include "products.h"
#include "simd.h"

namespace fastclip {
namespace {

constexpr int64_t kBlockRows = 1024, kBlockCols = 1024;  // 4 MB of fp32 logits
constexpr float kNone = -std::numeric_limits<float>::infinity();

struct Pair {
  Vec softplus, sigmoid;
};

// log(1 + e^x) and 1 / (1 + e^-x), each to a few ulp however negative x is. With t = e^-|x| and s = t / (2 + t),
// log(1 + t) = 2 artanh(s), and s is at most 1/3. One division serves both.
FASTCLIP_INLINE Pair softplus_and_sigmoid(Vec x) {
  const Vec t = exponential(x < 0.f ? x : -x);
  const Vec a = t + 1.f, b = t + 2.f, inverse = 1.f / (a * b);
  const Vec s = t * a * inverse, s2 = s * s;
  Vec y = splat(1.f / 15);
  y = y * s2 + 1.f / 13;
  y = y * s2 + 1.f / 11;
  y = y * s2 + 1.f / 9;
  y = y * s2 + 1.f / 7;
  y = y * s2 + 1.f / 5;
  y = y * s2 + 1.f / 3;
  const Vec log1p = 2.f * (s + s * s2 * y);
  return {maximum(x, Vec{}) + log1p, (x < 0.f ? t : splat(1.f)) * b * inverse};
}

// Products image_i . text_j of one task, in rows of `ld` floats; columns up to the next multiple of 16 may be written.
struct Task {
  float* z;
  int64_t ld, rows, cols, own;            // the own text of row i is column own + i, where that is inside
  float scale, bias;
  const int64_t *row_groups, *col_groups;  // nullptr without groups
  const float* weights;                    // nullptr: no gradient
  float *loss, *d_logits;                  // added to; d_logits only with weights
};

// sign_j = -y_ij: -1 where the column is of the row's group, else 1.
FASTCLIP_INLINE void signs_of(float* sign, const int64_t* col_groups, int64_t group, int64_t cols) {
  for (int64_t j = 0; j < cols; ++j) sign[j] = col_groups[j] == group ? -1.f : 1.f;
}

// Adds sum_j softplus(x_ij) to the losses; with weights also sum_j dz_ij to d_logits, and weights_i dz_ij go to `out`, which may
// be z, in rows of `ld_out`; what lies behind the columns is zero.
template <typename T>
FASTCLIP_INLINE void differentiate_rows(const Task& c, T* out, int64_t ld_out) {
  alignas(64) float sign[kBlockCols];
  const int64_t padded = round_up(c.cols);
  std::fill(sign, sign + padded, 1.f);
  for (int64_t i = 0; i < c.rows; ++i) {
    float* x = c.z + i * c.ld;
    if (c.col_groups != nullptr) signs_of(sign, c.col_groups, c.row_groups[i], c.cols);
    for (int64_t j = 0; j < padded; j += kLanes) store(x + j, (load(x + j) * c.scale + c.bias) * load(sign + j));
    std::fill(x + c.cols, x + padded, kNone);
    if (c.own + i >= 0 && c.own + i < c.cols) x[c.own + i] = kNone;
    Vec loss = {}, d_logits = {};
    const Vec weight = splat(c.weights != nullptr ? c.weights[i] : 0.f);
    for (int64_t j = 0; j < padded; j += kLanes) {
      const Pair pair = softplus_and_sigmoid(load(x + j));
      loss += pair.softplus;
      if (c.weights == nullptr) continue;
      const Vec d = pair.sigmoid * load(sign + j);
      d_logits += d;
      store(out + i * ld_out + j, d * weight);
    }
    c.loss[i] += sum(loss);
    if (c.weights != nullptr) c.d_logits[i] += sum(d_logits);
  }
}

FASTCLIP_MULTIVERSION void differentiate(const Task& c, float* out, int64_t ld_out) { differentiate_rows(c, out, ld_out); }
FASTCLIP_MULTIVERSION void differentiate(const Task& c, c10::BFloat16* out, int64_t ld_out) { differentiate_rows(c, out, ld_out); }

// Calls task(first, count, scratch) for every `step` of `total`, in parallel or not; `elements` of scratch for each thread.
template <typename T, typename Call>
void for_each_task(int64_t total, int64_t step, int64_t elements, bool in_parallel, const Call& task) {
  const int64_t tasks = (total + step - 1) / step;
  at::parallel_for(0, tasks, in_parallel ? 1 : tasks, [&](int64_t begin, int64_t end) {
    std::vector<T> scratch(elements);
    for (int64_t i = begin; i < end; ++i) task(i * step, std::min(step, total - i * step), scratch.data());
    release<T>();
  });
}

// (n, D) as T, D padded with zeros to a multiple of 16 words of 32 bits as `block_transposed` needs.
template <typename T>
at::Tensor as(const at::Tensor& x) {
  const int64_t missing = ceil_to(x.size(1), kLanes * kInterleaved<T>) - x.size(1);
  const auto wide = x.detach().to(c10::CppTypeToScalarType<T>::value);
  return (missing != 0 ? zero_padded(wide, missing) : wide).contiguous();
}

at::Tensor ids(const std::optional<at::Tensor>& x) { return x.has_value() ? x->contiguous() : at::Tensor(); }

// One rank's rows against all columns, multiplied as T; `weights` is undefined where no gradient is wanted.
template <typename T>
struct Problem {
  at::Tensor image, text, row_groups, col_groups, weights, loss, d_logits, grad_image, grad_text;
  at::Tensor logits, dz, text_transposed, text_blocked, image_blocked;
  float scale, bias;
  int64_t offset, depth, ld, step;  // step: rows, or columns, of a task: large, but some for every thread
  bool in_parallel;

  Problem(const at::Tensor& image_features, const at::Tensor& text_features, const at::Tensor& logit_scale, const at::Tensor& logit_bias,
          const std::optional<at::Tensor>& rows, const std::optional<at::Tensor>& cols, int64_t offset, const at::Tensor& row_weights)
      : image(as<T>(image_features)),
        text(as<T>(text_features)),
        row_groups(ids(rows)),
        col_groups(ids(cols)),
        scale(*logit_scale.const_data_ptr<float>()),
        bias(*logit_bias.const_data_ptr<float>()),
        offset(offset),
        depth(image.size(1)) {
    const int64_t n = image.size(0), m = text.size(0), height = std::min(n, kBlockRows), width = ceil_to(std::min(m, kBlockCols), kBlock);
    ld = width + kLanes;  // so that rows fall on different cache sets
    in_parallel = !is_tiny(n, m, depth);
    step = n <= 64 ? 32 : n <= 256 ? kBlock : 128;
    loss = image.new_zeros({n}, at::kFloat);
    logits = image.new_empty({height, ld}, at::kFloat);
    text_transposed = image.new_empty({width, depth});
    if (!row_weights.defined()) return;
    weights = row_weights.detach().to(at::kFloat).contiguous();
    d_logits = image.new_zeros({n}, at::kFloat);
    grad_image = image.new_zeros({n, depth}, at::kFloat);
    grad_text = image.new_zeros({m, depth}, at::kFloat);
    dz = sizeof(T) == sizeof(float) ? logits : image.new_empty({height, ld});
    text_blocked = image.new_empty({ceil_to(depth, kBlock), width});
    image_blocked = image.new_empty({ceil_to(depth, kBlock), even(height)});
  }

  void run() {
    const int64_t n = image.size(0), m = text.size(0);
    for (int64_t col = 0; col < m; col += kBlockCols) {
      const int64_t cols = std::min(kBlockCols, m - col);
      const T* rows = data<T>(text, col);
      for_each_task<T>(cols, kBlock, 0, in_parallel, [&](int64_t first, int64_t count, T*) {
        block_transposed(reinterpret_cast<float*>(data<T>(text_transposed, first)),
                         reinterpret_cast<const float*>(rows + first * depth), count, depth / kInterleaved<T>);
      });
      if (weights.defined()) take_rows(text_blocked, rows, cols);
      for (int64_t row = 0; row < n; row += kBlockRows) run_block(row, std::min(kBlockRows, n - row), col, cols);
    }
  }

 private:
  template <typename U>
  static U* data(const at::Tensor& x, int64_t row) {
    return x.mutable_data_ptr<U>() + row * x.stride(0);
  }

  // How many rows a product takes together that sums over `count`.
  static constexpr int64_t even(int64_t count) { return ceil_to(count, kInterleaved<T>); }

  // out (depth / 64, even(count), 64) = rows (count, depth), as the right side of a product over rows.
  void take_rows(const at::Tensor& out, const T* rows, int64_t count) const {
    for_each_task<T>(depth, kBlock, 0, in_parallel, [&](int64_t d, int64_t width, T*) {
      block_rows(data<T>(out, 0) + d * even(count), rows + d, depth, count, width, even(count));
    });
  }

  // grad (rows, depth) += left (rows, even(k)) right (even(k), depth), right as `take_rows` lays it out.
  void add_product(float* grad, int64_t rows, const T* left, int64_t ld_left, const at::Tensor& right, int64_t k) const {
    for (int64_t d = 0; d < depth; d += kBlock)
      product(rows, std::min(kBlock, depth - d), even(k), left, ld_left, data<T>(right, 0) + d * even(k), grad + d, depth, true);
  }

  void run_block(int64_t row, int64_t rows, int64_t col, int64_t cols) const {
    const bool gradient = weights.defined();
    for_each_task<T>(rows, step, 0, in_parallel, [&](int64_t first, int64_t count, T*) {
      float* z = data<float>(logits, first);
      T* out = gradient ? data<T>(dz, first) : nullptr;
      for (int64_t j = 0; j < cols; j += kBlock)
        product(count, std::min(kBlock, round_up(cols - j)), depth, data<T>(image, row + first), depth, data<T>(text_transposed, j), z + j, ld, false);
      differentiate(task(z, row + first, count, col, cols), out, ld);
      if (gradient) add_product(data<float>(grad_image, row + first), count, out, ld, text_blocked, cols);
    });
    if (!gradient) return;
    take_rows(image_blocked, data<T>(image, row), rows);
    for_each_task<T>(cols, step, step * even(rows), in_parallel, [&](int64_t first, int64_t count, T* transposed) {
      transpose_rows(transposed, even(rows), data<T>(dz, 0) + first, ld, rows, count, even(rows));
      add_product(data<float>(grad_text, col + first), count, transposed, even(rows), image_blocked, rows);
    });
  }

  Task task(float* z, int64_t row, int64_t rows, int64_t col, int64_t cols) const {
    const bool grouped = row_groups.defined(), gradient = weights.defined();
    return {z,
            ld,
            rows,
            cols,
            offset + row - col,
            scale,
            bias,
            grouped ? row_groups.const_data_ptr<int64_t>() + row : nullptr,
            grouped ? col_groups.const_data_ptr<int64_t>() + col : nullptr,
            gradient ? weights.const_data_ptr<float>() + row : nullptr,
            data<float>(loss, row),
            gradient ? data<float>(d_logits, row) : nullptr};
  }

 public:
  // The mean over the rows, for as many texts as images without groups, and its gradients for image, text, scale and bias.
  std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> mean() {
    run();
    const int64_t n = image.size(0);
    const T *own_image = data<T>(image, 0), *own_text = data<T>(text, 0);
    const float *others = data<float>(loss, 0), *d_others = data<float>(d_logits, 0);
    std::vector<double> d_own(n);
    row_dots(d_own.data(), own_image, own_text, n, depth);
    double total = 0, d_bias = 0;
    for (int64_t i = 0; i < n; ++i) {
      const double z = d_own[i] * scale + bias;
      total += (others[i] + (z > 0 ? std::log1p(std::exp(-z)) : std::log1p(std::exp(z)) - z)) / n;
      d_own[i] = -1 / (n * (1 + std::exp(z)));
      d_bias += static_cast<double>(d_others[i]) / n + d_own[i];
    }
    const double d_scale = finish_gradient(data<float>(grad_image, 0), own_image, own_text, d_own.data(), scale, n, depth);
    finish_gradient(data<float>(grad_text, 0), own_text, own_image, d_own.data(), scale, n, depth);
    const auto scalar = [&](double x) { return loss.new_full({}, x); };
    return {scalar(total), grad_image, grad_text, scalar(d_scale), scalar(d_bias)};
  }

  // A gradient as the caller knows it, without the padding of D.
  at::Tensor unpadded(const at::Tensor& grad, const at::Tensor& features) const { return grad.narrow(1, 0, features.size(1)).contiguous(); }
};

// visit(T()) with the type that these features are multiplied in.
template <typename Visit>
auto with_type(const at::Tensor& features, const Visit& visit) {
  const bool narrow = features.scalar_type() == at::kBFloat16 && at::native::cpublas::could_pack(at::kBFloat16);
  return narrow ? visit(c10::BFloat16()) : visit(float());
}

}  // namespace

at::Tensor sigmoid_loss(const at::Tensor& image_features, const at::Tensor& text_features, const at::Tensor& logit_scale,
                        const at::Tensor& logit_bias, const std::optional<at::Tensor>& row_groups,
                        const std::optional<at::Tensor>& col_groups, int64_t offset) {
  return with_type(image_features, [&](auto type) {
    Problem<decltype(type)> problem(image_features, text_features, logit_scale, logit_bias, row_groups, col_groups, offset, {});
    problem.run();
    return problem.loss;
  });
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> sigmoid_loss_gradients(
    const at::Tensor& image_features, const at::Tensor& text_features, const at::Tensor& logit_scale, const at::Tensor& logit_bias,
    const std::optional<at::Tensor>& row_groups, const std::optional<at::Tensor>& col_groups, int64_t offset, const at::Tensor& weights) {
  return with_type(image_features, [&](auto type) {
    Problem<decltype(type)> problem(image_features, text_features, logit_scale, logit_bias, row_groups, col_groups, offset, weights);
    problem.run();
    return std::make_tuple(problem.loss, problem.d_logits, problem.unpadded(problem.grad_image, image_features),
                           problem.unpadded(problem.grad_text, text_features));
  });
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> sigmoid_loss_mean(const at::Tensor& image_features,
                                                                                         const at::Tensor& text_features,
                                                                                         const at::Tensor& logit_scale,
                                                                                         const at::Tensor& logit_bias) {
  const int64_t n = image_features.size(0);
  const auto weights = image_features.new_full({n}, 1.0 / n, at::kFloat);
  return with_type(image_features, [&](auto type) {
    Problem<decltype(type)> problem(image_features, text_features, logit_scale, logit_bias, std::nullopt, std::nullopt, 0, weights);
    const auto [loss, grad_image, grad_text, d_scale, d_bias] = problem.mean();
    return std::make_tuple(loss, problem.unpadded(grad_image, image_features), problem.unpadded(grad_text, text_features), d_scale, d_bias);
  });
}

}  // namespace fastclip
