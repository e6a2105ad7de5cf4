// The contrastive block on the CPU: statistics of the negatives of every row and column, and their gradient.
//
// z = scale * image text^T is made chunk by chunk by the library's fp32 product, small enough to stay in the second-level
// cache, and used up there by one vectorised pass over its rows and one over its columns. Chunks are visited in one fixed
// order and rows and columns are summed whole, so that the result does not depend on the number of threads beyond what the
// library's product does. bfloat16 features are widened, which loses nothing. See ops/contrastive_loss/reference.py for
// the maths.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>

#include "simd.h"

namespace fastclip {
namespace {

constexpr int64_t kChunkRows = 512, kChunkCols = 2048;  // 4 MB of fp32 logits
constexpr int64_t kGrain = 16;                          // rows, or vectors of columns, that are worth a thread
constexpr float kNone = -std::numeric_limits<float>::infinity();

// A chunk of logits (rows, cols), row stride `ld`; the positive of row i lies in column `diagonal` + i when inside.
struct Chunk {
  float* z;
  int64_t ld, rows, cols, diagonal;
};

FASTCLIP_INLINE float anchor(float highest) { return highest == kNone ? 0.f : highest; }
FASTCLIP_INLINE Vec anchor(Vec highest) { return highest == kNone ? Vec{} : highest; }

// Loads and stores of the last, partial vector of a row; lanes beyond the end read as `fill`.
FASTCLIP_INLINE Vec load_some(const float* p, int64_t count, float fill) {
  Vec v = splat(fill);
  for (int64_t i = 0; i < count; ++i) v[i] = p[i];
  return v;
}
FASTCLIP_INLINE void store_some(float* p, Vec v, int64_t count) {
  for (int64_t i = 0; i < count; ++i) p[i] = v[i];
}
FASTCLIP_INLINE Vec load_upto(const float* p, int64_t count, float fill) {
  return count >= kLanes ? load(p) : load_some(p, count, fill);
}
FASTCLIP_INLINE void store_upto(float* p, Vec v, int64_t count) {
  count >= kLanes ? store(p, v) : store_some(p, v, count);
}

// Scales a row in place and replaces its positive, if it lies here, by -inf; returns that positive's logit or NaN.
FASTCLIP_INLINE float scale_row(float* z, int64_t cols, int64_t positive, float scale) {
  for (int64_t j = 0; j < cols; j += kLanes) store_upto(z + j, load_upto(z + j, cols - j, 0.f) * scale, cols - j);
  if (positive < 0 || positive >= cols) return std::numeric_limits<float>::quiet_NaN();
  const float value = z[positive];
  z[positive] = kNone;
  return value;
}

// Rows [begin, end): scale, take out the positives, and fold each row into its running (max, sum of exp(z - max)).
FASTCLIP_MULTIVERSION void fold_rows(Chunk c, int64_t begin, int64_t end, float scale, float* positive, float* highest, float* sums) {
  for (int64_t i = begin; i < end; ++i) {
    float* z = c.z + i * c.ld;
    const int64_t own = c.diagonal + i;
    const float found = scale_row(z, c.cols, own, scale);
    if (own >= 0 && own < c.cols) positive[i] = found;
    Vec top = splat(highest[i]);
    for (int64_t j = 0; j < c.cols; j += kLanes) top = maximum(load_upto(z + j, c.cols - j, kNone), top);
    const float next = maximum(top), base = anchor(next);
    Vec total = {};
    for (int64_t j = 0; j < c.cols; j += kLanes) total += exponential(load_upto(z + j, c.cols - j, kNone) - base);
    sums[i] = sums[i] * std::exp(highest[i] - base) + sum(total);
    highest[i] = next;
  }
}

// Columns in vectors [begin, end) of 16: the same fold, after `fold_rows`.
FASTCLIP_MULTIVERSION void fold_cols(Chunk c, int64_t begin, int64_t end, float* highest, float* sums) {
  for (int64_t j = begin * kLanes; j < std::min(end * kLanes, c.cols); j += kLanes) {
    const int64_t count = c.cols - j;
    const Vec before = load_upto(highest + j, count, kNone);
    Vec top = before;
    for (int64_t i = 0; i < c.rows; ++i) top = maximum(load_upto(c.z + i * c.ld + j, count, kNone), top);
    const Vec base = anchor(top);
    Vec total = load_upto(sums + j, count, 0.f) * exponential(before - base);
    for (int64_t i = 0; i < c.rows; ++i) total += exponential(load_upto(c.z + i * c.ld + j, count, kNone) - base);
    store_upto(highest + j, top, count);
    store_upto(sums + j, total, count);
  }
}

struct Lse {
  const float *row, *col, *d_row, *d_col;
};

// Rows [begin, end): logits to dz_ij = d_row_i exp(z_ij - row_i) + d_col_j exp(z_ij - col_j), zero at the positives.
FASTCLIP_MULTIVERSION void differentiate_rows(Chunk c, int64_t begin, int64_t end, float scale, Lse lse) {
  for (int64_t i = begin; i < end; ++i) {
    float* z = c.z + i * c.ld;
    scale_row(z, c.cols, c.diagonal + i, scale);
    const Vec row = splat(lse.row[i]), d_row = splat(lse.d_row[i]);
    for (int64_t j = 0; j < c.cols; j += kLanes) {
      const int64_t count = c.cols - j;
      const Vec logit = load_upto(z + j, count, kNone), col = load_upto(lse.col + j, count, 0.f);
      const Vec d = d_row * exponential(logit - row) + load_upto(lse.d_col + j, count, 0.f) * exponential(logit - col);
      store_upto(z + j, d, count);
    }
  }
}

// image (n, D) and text (M, D) in fp32 and the scratch for one chunk of their logits.
struct Problem {
  at::Tensor image, text, scratch;
  float scale;
  int64_t n, m, offset;

  Problem(const at::Tensor& image_features, const at::Tensor& text_features, const at::Tensor& logit_scale, int64_t offset)
      : image(image_features.to(at::kFloat).contiguous()),
        text(text_features.to(at::kFloat).contiguous()),
        scale(*logit_scale.const_data_ptr<float>()),
        n(image.size(0)),
        m(text.size(0)),
        offset(offset) {
    scratch = at::empty({std::min(n, kChunkRows), std::min(m, kChunkCols)}, image.options());
  }

  // visit(chunk tensor, chunk, first row, first column) for every chunk, columns fastest; not yet scaled.
  template <typename Visit>
  void for_each_chunk(const Visit& visit) {
    for (int64_t row = 0; row < n; row += kChunkRows) {
      const auto left = image.narrow(0, row, std::min(kChunkRows, n - row));
      for (int64_t col = 0; col < m; col += kChunkCols) {
        const auto right = text.narrow(0, col, std::min(kChunkCols, m - col));
        auto z = scratch.narrow(0, 0, left.size(0)).narrow(1, 0, right.size(0));
        at::mm_out(z, left, right.t());
        visit(z, Chunk{z.mutable_data_ptr<float>(), z.stride(0), z.size(0), z.size(1), offset + row - col}, row, col);
      }
    }
  }
};

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> contrastive_loss_statistics(
    const at::Tensor& image_features, const at::Tensor& text_features, const at::Tensor& logit_scale, int64_t offset) {
  Problem problem(image_features, text_features, logit_scale, offset);
  const auto options = problem.image.options();
  auto positive = at::empty({problem.n}, options);
  auto row_max = at::full({problem.n}, kNone, options), row_sum = at::zeros({problem.n}, options);
  auto col_max = at::full({problem.m}, kNone, options), col_sum = at::zeros({problem.m}, options);
  auto at = [](const at::Tensor& x, int64_t first) { return x.mutable_data_ptr<float>() + first; };
  problem.for_each_chunk([&](const at::Tensor&, const Chunk& c, int64_t row, int64_t col) {
    at::parallel_for(0, c.rows, kGrain, [&](int64_t begin, int64_t end) {
      fold_rows(c, begin, end, problem.scale, at(positive, row), at(row_max, row), at(row_sum, row));
    });
    at::parallel_for(0, round_up(c.cols) / kLanes, kGrain, [&](int64_t begin, int64_t end) {
      fold_cols(c, begin, end, at(col_max, col), at(col_sum, col));
    });
  });
  return {positive, row_max, row_sum.log_(), col_max, col_sum.log_()};
}

std::tuple<at::Tensor, at::Tensor> contrastive_loss_negative_gradients(
    const at::Tensor& image_features, const at::Tensor& text_features, const at::Tensor& logit_scale, const at::Tensor& row_lse,
    const at::Tensor& col_lse, const at::Tensor& d_row_lse, const at::Tensor& d_col_lse, int64_t offset) {
  Problem problem(image_features, text_features, logit_scale, offset);
  const auto row = row_lse.contiguous(), col = col_lse.contiguous(), d_row = d_row_lse.contiguous(), d_col = d_col_lse.contiguous();
  auto at = [](const at::Tensor& x, int64_t first) { return x.const_data_ptr<float>() + first; };
  auto grad_image = at::zeros_like(problem.image), grad_text = at::zeros_like(problem.text);
  problem.for_each_chunk([&](const at::Tensor& z, const Chunk& c, int64_t i, int64_t j) {
    at::parallel_for(0, c.rows, kGrain, [&](int64_t begin, int64_t end) {
      differentiate_rows(c, begin, end, problem.scale, {at(row, i), at(col, j), at(d_row, i), at(d_col, j)});
    });
    grad_image.narrow(0, i, c.rows).addmm_(z, problem.text.narrow(0, j, c.cols));
    grad_text.narrow(0, j, c.cols).addmm_(z.t(), problem.image.narrow(0, i, c.rows));
  });
  return {grad_image, grad_text};
}

}  // namespace fastclip
